"""Files that a reader never sees half of: written aside, synced and renamed; and a log file that grows by whole lines."""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.common import console
from pipeline.common.system import is_alive

WARN_EVERY_SECONDS = 60.0
OLD_SECONDS = 24 * 3600.0  # a file that was written aside so long ago, by a process of another machine, is left over

# what lies beside a file or folder while it is written; the old folder is kept until the new one has its name
UNFINISHED, REPLACED = "tmp", "old"
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)@(?P<machine>.*)\.(?P<kind>tmp|old)")


def sync(path: Path) -> None:
    """Waits until the file, or the list of names in the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file name to write to. The file is synced and renamed to path at the end; on an error nothing of it is left.

    So a reader sees the old content or the new one, never a part. Raises OSError.
    """
    aside = aside_name(path, UNFINISHED)
    tidy(path.parent, path.name)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def folder_written_aside(path: Path, alone: bool = False) -> Iterator[Path]:
    """A new folder to write files into. All of it is synced and renamed to path at the end; on an error nothing is left.

    A folder at path is replaced: after a kill at any moment `tidy`, or the next writer, finds the old or the new one whole.
    alone: as in `tidy`. Raises OSError.
    """
    path = path.resolve()  # a link to a folder stays one
    aside, replaced = aside_name(path, UNFINISHED), aside_name(path, REPLACED)
    tidy(path.parent, path.name, alone)
    try:
        aside.mkdir()
        yield aside
        for written in (*aside.rglob("*"), aside):
            sync(written)
        put_in_place(aside, path, replaced)
        sync(path.parent)
    finally:
        remove(aside)
        tidy(path.parent, path.name, alone)


def put_in_place(aside: Path, path: Path, replaced: Path) -> None:
    """Renames a folder to path; one that is there, or that another process puts there meanwhile, becomes `replaced`."""
    while True:
        try:
            os.rename(aside, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        remove(replaced)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, replaced)


def remove_folder(path: Path) -> None:
    """Deletes a folder; a half-deleted one never has its name. What cannot be deleted is left to `tidy`. Raises OSError."""
    aside = aside_name(path, UNFINISHED)
    remove(aside)
    os.rename(path, aside)
    remove(aside)


def aside_name(path: Path, kind: str) -> Path:
    """The hidden name beside path that this process writes to, of its own on every machine that shares the folder."""
    return path.with_name(f".{path.name}.{os.getpid()}@{os.uname().nodename}.{kind}")


def tidy(folder: Path, name: str | None = None, alone: bool = False) -> None:
    """Removes what killed processes left aside in a folder, and restores a folder that one of them was replacing.

    name: of the file or folder to tidy up after, None for all. alone: whether no other process writes here now, so that
    whatever lies aside is left over; else it must be a day old, or its process must be gone from this machine.
    """
    for left in list(folder.iterdir()):
        parts = ASIDE.fullmatch(left.name)
        if parts is None or name not in (None, parts["name"]):
            continue
        final = left.with_name(parts["name"])
        if parts["kind"] == REPLACED and not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another process restored it
                os.rename(left, final)
        elif alone or parts["kind"] == REPLACED or is_left_over(left, int(parts["process"]), parts["machine"]):
            remove(left)


def is_left_over(left: Path, process: int, machine: str) -> bool:
    if machine == os.uname().nodename and (process == os.getpid() or not is_alive(process)):
        return True
    try:
        return time.time() - left.stat().st_mtime > OLD_SECONDS
    except OSError:  # renamed by its process meanwhile
        return False


def remove(path: Path) -> None:
    """Deletes a file or a folder as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


class LineFile:
    """Appends lines. One that cannot be written waits in memory, is tried again with the next, and costs a warning.

    The loop appends while the thread that writes checkpoints calls `sync`.
    """

    def __init__(self, path: Path, num_bytes: int):
        """num_bytes: how much of the file to keep; the rest is cut off."""
        self.path = path
        self.file = open(path, "a+b", buffering=0)
        self.file.truncate(num_bytes)
        self.written = num_bytes
        self.waiting = b""
        self.warned_at = -WARN_EVERY_SECONDS
        self.writing = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """The length of all lines so far; after `sync` the file has it."""
        return self.written + len(self.waiting)

    def append(self, line: str) -> None:
        with self.writing:
            self.waiting += line.encode() + b"\n"
            try:
                self.write_waiting()
            except OSError as error:
                if time.monotonic() - self.warned_at >= WARN_EVERY_SECONDS:
                    self.warned_at = time.monotonic()
                    console.warn(f"{self.path} cannot be written ({error.strerror}); its lines wait in memory.")

    def write_waiting(self) -> None:
        """Writes what waits, or nothing of it. Raises OSError."""
        try:
            left = memoryview(self.waiting)
            while left:
                left = left[self.file.write(left) :]
        except OSError:
            self.file.truncate(self.written)
            raise
        self.written += len(self.waiting)
        self.waiting = b""

    def sync(self) -> None:
        """Every line is on the disk, under the file's name, when this returns. Raises OSError when that cannot be."""
        with self.writing:
            self.write_waiting()
            if not self.path.exists() or not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                self.bring_back()
            os.fsync(self.file.fileno())

    def bring_back(self) -> None:
        """Writes the file anew, after somebody removed it, from what the system still holds of it."""
        write_atomically(self.path, os.pread(self.file.fileno(), self.written, 0))
        self.file.close()
        self.file = open(self.path, "a+b", buffering=0)

    def close(self) -> None:
        """Raises OSError when lines are still waiting and cannot be written."""
        self.sync()
        self.file.close()
