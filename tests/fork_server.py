"""The fork server of pipeline/common as the tests use it: output is kept, and what still runs at the end is killed."""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from pipeline.common import fork_server

# How the names of variables begin that Python, the C library, OpenMP and the Hub's client read once.
READ_ONCE = ("PYTHON", "MALLOC_", "OMP_", "MKL_", "LD_", "HF_HOME", "HF_ENDPOINT", "HF_HUB_", "HF_TOKEN_PATH", "XDG_", "HOME")


class Fork(fork_server.Fork):
    """What the tests use of subprocess.Popen."""

    def __init__(self, fork: fork_server.Fork, out: IO[bytes], err: IO[bytes]) -> None:
        super().__init__(fork.args, fork.pid, fork.status)
        self.out, self.err = out, err

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self.status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        status = self.poll()
        assert status is not None, "the fork server ended"
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error of the ended program. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (self.out, self.err))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """Kills the program and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class ForkServer(fork_server.ForkServer):
    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(environment, fork_server.TORCH)
        self.started: list[Fork] = []

    def can_run_with(self, environment: dict[str, str]) -> bool:
        """Whether every variable that is read once has the server's value."""
        names = {name for name in environment | self.environment if name.startswith(READ_ONCE) and name != "PYTHONPATH"}
        return all(environment.get(name) == self.environment.get(name) for name in names)

    def run(self, arguments: list[str], cwd: Path, environment: dict[str, str]) -> Fork:
        """Starts `python ARGUMENTS`."""
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        fork = Fork(self.start(arguments, cwd, environment, out.fileno(), err.fileno()), out, err)
        self.started.append(fork)
        return fork

    def close(self) -> None:
        for fork in self.started:
            if fork.poll() is None:
                fork.kill_group()
        super().close()
