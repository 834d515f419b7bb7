"""Atomic writes: files and folders are written aside, synced and renamed; and a log file of complete lines."""

import contextlib
import errno
import json
import math
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
OLD_SECONDS = 24 * 3600.0  # older temporary files of processes on other machines are treated as left over

# the kinds of temporary names: being written, and the old folder, kept until the new one has its name
UNFINISHED, REPLACED = "tmp", "old"
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)@(?P<machine>.*)\.(?P<kind>tmp|old)")


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary file name. Syncs the file and renames it to `path` at the end; deletes it after an error.

    A reader sees the old content or the new one, never a part. Raises OSError.
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
    """Yields a temporary folder. Syncs it and renames it to `path` at the end; deletes it after an error.

    A folder at `path` is replaced. After a kill at any moment, `tidy` or the next writer restores the complete old or new
    folder. alone: as in `tidy`. Raises OSError.
    """
    path = path.resolve()  # replace the target of a link, not the link
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
    """Renames a folder to path. A folder there, also one that another process creates meanwhile, is renamed to `replaced`."""
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
    """Renames a folder, so that no partly deleted one has its name, and deletes it. `tidy` removes the rest. Raises OSError."""
    aside = aside_name(path, UNFINISHED)
    remove(aside)
    os.rename(path, aside)
    remove(aside)


def aside_name(path: Path, kind: str) -> Path:
    """The hidden temporary name beside path, unique to this process on all machines that share the folder."""
    return path.with_name(f".{path.name}.{os.getpid()}@{os.uname().nodename}.{kind}")


def tidy(folder: Path, name: str | None = None, alone: bool = False) -> None:
    """Removes temporary files and folders of killed processes, and restores a folder that one of them was replacing.

    name: the final name to clean up after, None for all. alone: whether no other process writes here now, so that every
    temporary file is left over; otherwise only those whose process has ended on this machine, or that are a day old.
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
    except OSError:  # its process has renamed it
        return False


def remove(path: Path) -> None:
    """Deletes a file or folder. Ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (to_json(value, indent=1) + "\n").encode())


def to_json(value: Any, **options: Any) -> str:
    """The value as standard JSON: NaN and infinity, which JSON does not have, become null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The value with each float in it that is NaN or infinite replaced by None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LineFile:
    """A file of appended lines. If a line cannot be written, it warns, keeps the line in memory and retries with the next.

    Thread-safe: the training loop appends and reads num_bytes while the thread that writes checkpoints calls `sync`.
    """

    def __init__(self, path: Path, num_bytes: int):
        """num_bytes: the file is truncated to this length."""
        self.path = path
        self.file = open(path, "a+b", buffering=0)
        self.file.truncate(num_bytes)
        self.written = num_bytes
        self.waiting = b""
        self.warned_at = -WARN_EVERY_SECONDS
        self.writing = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """The length of all lines so far, in bytes; the length of the file after `sync`."""
        with self.writing:  # between the two statements that end `write_waiting`, the lines would count twice
            return self.written + len(self.waiting)

    def append(self, line: str) -> None:
        with self.writing:
            self.waiting += line.encode() + b"\n"
            try:
                self.write_waiting()
            except OSError as error:
                if time.monotonic() - self.warned_at >= WARN_EVERY_SECONDS:
                    self.warned_at = time.monotonic()
                    console.warn(f"{self.path} cannot be written ({error.strerror}); its lines are kept in memory.")

    def write_waiting(self) -> None:
        """Writes all waiting lines. Raises OSError and then writes none of them."""
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
        """Writes all lines to the disk, also if the file was deleted. Raises OSError."""
        with self.writing:
            self.write_waiting()
            if not self.path.exists() or not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                self.restore()
            os.fsync(self.file.fileno())

    def restore(self) -> None:
        """Writes a deleted file again, from the content that the open file descriptor still refers to."""
        write_atomically(self.path, os.pread(self.file.fileno(), self.written, 0))
        self.file.close()
        self.file = open(self.path, "a+b", buffering=0)

    def close(self) -> None:
        """Writes all lines and closes the file. Raises OSError if lines cannot be written."""
        self.sync()
        self.file.close()
