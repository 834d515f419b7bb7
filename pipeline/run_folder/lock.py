"""The lock of a folder: one process at a time trains or measures in it, on one machine or in a shared folder."""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

from pipeline.run_folder.paths import cannot_write

BEAT_SECONDS = 5.0
SILENT_BEATS = 3  # a holder on another machine is treated as dead after so many intervals without a heartbeat
LENGTH = 256  # bytes of the file; constant, so that a reader never sees parts of two heartbeats

# the errors of file systems that do not support locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Held from its construction until `release` or the end of the process.

    On one machine, the lock of the operating system (flock) decides; the system releases it when the process ends. A network
    file system may keep that lock local to a machine or not support it. The holder therefore also writes a heartbeat count to
    the file, and a process that finds the name of another machine watches whether this count increases. Every read opens the
    file again, which makes an NFS client ask the server.
    """

    def __init__(self, folder: Path, name: str = ".lock", advice: str = "choose another run_name"):
        """Acquires the lock, a file of this name. Raises ValueError if another process holds it or the folder is not writable.

        advice: what a user may do instead of waiting for the other process.
        """
        self.path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self.beats = 0
        if not self.take():
            os.close(self.file)
            raise ValueError(f"{folder} is in use by {holder_of(self.path)}. Wait for it, or {advice}.")
        os.register_at_fork(after_in_child=self.close_in_child)  # worker processes may outlive a killed parent
        self.released = threading.Event()
        self.beating = threading.Thread(target=self.keep_beating, name="run lock", daemon=True)
        self.beating.start()

    def take(self) -> bool:
        """Tries to acquire the lock; returns whether this process holds it."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_locks = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False
            has_locks = False
        before = read(self.path)
        if has_locks and before.get("machine", os.uname().nodename) == os.uname().nodename:
            self.beat()
            return True
        for _ in range(SILENT_BEATS if before else 0):
            time.sleep(BEAT_SECONDS)
            if read(self.path) != before:
                return False
        ours = self.beat()
        time.sleep(BEAT_SECONDS)
        return read(self.path) == ours  # else another process that waited at the same time took it

    def beat(self) -> dict[str, object]:
        """Writes the next heartbeat to the file and returns its content."""
        self.beats += 1
        facts: dict[str, object] = {"process": os.getpid(), "machine": os.uname().nodename, "beats": self.beats}
        os.ftruncate(self.file, LENGTH)
        os.pwrite(self.file, json.dumps(facts).encode().ljust(LENGTH), 0)
        os.fsync(self.file)
        return facts

    def keep_beating(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk or a missing folder: the checkpoint writer reports it
                self.beat()

    def close_in_child(self) -> None:
        """Closes the file in a forked process. The system releases a lock when its last file descriptor is closed."""
        with contextlib.suppress(OSError):  # released before the fork
            os.close(self.file)

    def release(self) -> None:
        self.released.set()
        self.beating.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, 0)
        os.close(self.file)
        self.file = -1  # a forked process must not close a file that reuses this descriptor


def read(path: Path) -> dict[str, object]:
    """The content of the lock file; empty if the lock is released or the file cannot be read."""
    try:
        facts = json.loads(path.read_bytes())
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


def holder_of(path: Path) -> str:
    facts = read(path)
    return f"process {facts['process']} on {facts['machine']}" if "process" in facts else "another process"


def check_shared(run_dir: Path, accelerator: "Accelerator") -> None:
    """Raises ValueError on every rank unless all see the run folder of rank 0, by the holder of its lock.

    Otherwise the ranks of another machine would miss the best checkpoint after the last epoch. Every rank must call it.
    """
    from accelerate.utils import gather_object  # lazy: reading a run does not import torch

    holder = {name: value for name, value in read(run_dir / ".lock").items() if name != "beats"}
    found = gather_object([(os.uname().nodename, holder)])
    others = sorted({machine for machine, theirs in found if theirs != found[0][1]})
    if others:
        raise ValueError(
            f"{run_dir} on {', '.join(others)} is not the folder that process 0 uses on {found[0][0]}. "
            "Set output_dir to a folder that all machines share."
        )
