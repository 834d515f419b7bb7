"""Files that a reader never sees half of: written aside, synced and renamed; and a log file that grows by whole lines."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.common import console

WARN_EVERY_SECONDS = 60.0


def sync(path: Path) -> None:
    """Waits until the file, or the list of names in the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:  # a full disk
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
