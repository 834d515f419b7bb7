"""The lock of a run's folder: one training process at a time, on one machine or over a shared folder."""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

BEAT_SECONDS = 5.0
SILENT_BEATS = 3  # a holder on another machine that has not stirred for so many beats is dead
LENGTH = 256  # bytes of the file, so that a reader never sees two counts mixed

# of file systems that cannot lock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Held from its making until `release` or the end of the process.

    The system's own lock (flock) decides on one machine, and is freed with the process. Network file systems may keep that
    lock to each machine or have none; so the holder also counts in the file, and a process that finds another machine's
    name watches whether that count goes on. Every reading opens the file anew, which makes NFS look at the server.
    """

    def __init__(self, run_dir: Path):
        """Takes the lock. Raises ValueError when another process trains in this folder, or the folder cannot be written."""
        self.path = run_dir / ".lock"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"Cannot write into {run_dir} ({error.strerror}). Make it writable, or choose another output_dir."
            ) from error
        self.beats = 0
        if not self.take():
            os.close(self.file)
            raise ValueError(f"{run_dir} is in use by {holder_of(self.path)}. Wait for it, or choose another run_name.")
        os.register_at_fork(after_in_child=self.let_go)  # worker processes may live on after a kill
        self.released = threading.Event()
        self.beating = threading.Thread(target=self.keep_beating, name="run lock", daemon=True)
        self.beating.start()

    def take(self) -> bool:
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
        return read(self.path) == ours  # not that of another which began to wait when we did

    def beat(self) -> dict[str, object]:
        """Counts on in the file; returns what it says then."""
        self.beats += 1
        facts: dict[str, object] = {"process": os.getpid(), "machine": os.uname().nodename, "beats": self.beats}
        os.ftruncate(self.file, LENGTH)
        os.pwrite(self.file, json.dumps(facts).encode().ljust(LENGTH), 0)
        os.fsync(self.file)
        return facts

    def keep_beating(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk or a lost folder, of which the run itself tells
                self.beat()

    def let_go(self) -> None:
        """In a forked process: closes the file, and with its last copy the system frees the lock."""
        with contextlib.suppress(OSError):  # released before the fork
            os.close(self.file)

    def release(self) -> None:
        self.released.set()
        self.beating.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, 0)
        os.close(self.file)
        self.file = -1  # whatever else gets its number is not closed in a forked process


def read(path: Path) -> dict[str, object]:
    """What the file says of its holder; nothing when it was released or cannot be read."""
    try:
        facts = json.loads(path.read_bytes())
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


def holder_of(path: Path) -> str:
    facts = read(path)
    return f"process {facts['process']} on {facts['machine']}" if "process" in facts else "another process"
