"""The fork server of pipeline/common as the tests use it: output is kept, and what still runs at the end is killed."""

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
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
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, as in subprocess.Popen
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
        self.started: list[fork_server.Fork] = []
        self.lock = threading.Lock()  # of the connection to the server
        self.listener: socket.socket | None = None

    def can_run_with(self, environment: dict[str, str]) -> bool:
        """Whether every variable that is read once has the server's value."""
        names = {name for name in environment | self.environment if name.startswith(READ_ONCE) and name != "PYTHONPATH"}
        return all(environment.get(name) == self.environment.get(name) for name in names)

    def start(
        self, arguments: Sequence[str], cwd: Path, environment: dict[str, str], out: int, err: int
    ) -> fork_server.Fork:
        with self.lock:
            return super().start(arguments, cwd, environment, out, err)

    def run(self, arguments: list[str], cwd: Path, environment: dict[str, str]) -> Fork:
        """Starts `python ARGUMENTS`."""
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        fork = Fork(self.start(arguments, cwd, environment, out.fileno(), err.fileno()), out, err)
        self.started.append(fork)
        return fork

    def write_python(self, path: Path) -> None:
        """Writes a program that runs the arguments of `python` in a fork, for programs that start `python` themselves."""
        if self.listener is None:
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listener.bind("")  # the system chooses a name in the abstract namespace
            self.listener.listen(16)
            threading.Thread(target=self.answer_programs, args=(self.listener,), daemon=True).start()
        address = self.listener.getsockname()[1:].decode()
        words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("forked_python.py")), address]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)

    def answer_programs(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # a program that was killed meanwhile
                self.answer(connection)

    def answer(self, connection: socket.socket) -> None:
        """Starts a program of forked_python.py and sends it the fork's number and the pipe of its exit status, or nothing."""
        message, descriptors, _, _ = socket.recv_fds(connection, fork_server.MESSAGE_BYTES, 2)
        request = json.loads(message or "{}")
        arguments = request.get("arguments", [])
        arguments = arguments[arguments[:1] == ["-u"] :]
        if arguments and (arguments[0] in ("-m", "-c") or arguments[0][0] != "-") and self.can_run_with(request["environment"]):
            fork = self.start(arguments, request["cwd"], request["environment"], *descriptors)
            self.started.append(fork)
            socket.send_fds(connection, [str(fork.pid).encode()], [fork.status])
        for descriptor in descriptors:
            os.close(descriptor)

    def close(self) -> None:
        for fork in self.started:
            if fork.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(fork.pid, signal.SIGKILL)
        super().close()
