"""Python programs in processes that start in a tenth of a second: forks of one that has imported torch and timm.

`ForkServer` starts this file as that process and asks it for one fork per program. A fork differs from a fresh interpreter
in two ways: modules are imported already, and what was read from the environment at the start is as the server had it.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
# How the names of variables begin that Python, the C library, OpenMP and the Hub's client read once.
READ_ONCE = ("PYTHON", "MALLOC_", "OMP_", "MKL_", "LD_", "HF_HOME", "HF_ENDPOINT", "HF_HUB_", "HF_TOKEN_PATH", "XDG_", "HOME")
MESSAGE_BYTES = 2**17  # more than the arguments and the environment of a program take


class ForkServer:
    """The process that forks, as the tests see it. It ends, and its forks with it, when they close the connection."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def can_run_with(self, environment: dict[str, str]) -> bool:
        """Whether every variable that is read once has the server's value."""
        names = {name for name in environment | self.environment if name.startswith(READ_ONCE) and name != "PYTHONPATH"}
        return all(environment.get(name) == self.environment.get(name) for name in names)

    def start(self, arguments: list[str], cwd: Path, environment: dict[str, str]) -> "Fork":
        """Starts `python ARGUMENTS`."""
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        status, theirs = os.pipe()
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environment": environment}).encode()
        socket.send_fds(self.connection, [request], [out.fileno(), err.fileno(), theirs])
        os.close(theirs)
        reply = self.connection.recv(MESSAGE_BYTES)
        assert reply, "the fork server ended"
        return Fork(arguments, int(reply), out, err, status)

    def close(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)  # closed alone, it stays open in workers that the tests' process has forked
        self.connection.close()
        self.process.wait(timeout=30)


class Fork:
    """A program in a fork, in a process group of its own: what the tests use of subprocess.Popen."""

    def __init__(self, args: list[str], pid: int, out: IO[bytes], err: IO[bytes], status: int) -> None:
        self.args, self.pid, self.out, self.err, self.status = args, pid, out, err, status
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(os.read(self.status, 16))
            os.close(self.status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

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


def serve(connection: socket.socket) -> dict[str, Any]:
    """Answers each request with the number of a new process, and writes how it ended into the request's pipe.

    Returns the request in each of these processes; the server itself ends here.
    """
    forks: dict[int, tuple[int, int]] = {}  # by a descriptor that becomes readable at its end: process and pipe
    while True:
        ready = select.select([connection, *forks], [], [])[0]
        for ended in forks.keys() & set(ready):
            pid, pipe = forks.pop(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                os.write(pipe, str(status).encode())
            os.close(pipe)
            os.close(ended)
        if connection not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            for pid, _ in forks.values():
                os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        out, err, pipe = descriptors
        pid = os.fork()
        if pid == 0:
            connection.close()
            for descriptor in [pipe, *forks, *(pipe for _, pipe in forks.values())]:
                os.close(descriptor)
            set_streams(out, err)
            request: dict[str, Any] = json.loads(message)
            return request
        os.setpgid(pid, pid)
        connection.send(str(pid).encode())
        forks[os.pidfd_open(pid)] = (pid, pipe)
        os.close(out)
        os.close(err)


def set_streams(out: int, err: int) -> None:
    """Standard output and error go to these files."""
    for target, source in ((1, out), (2, err)):
        os.dup2(source, target)
        os.close(source)


def run(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Runs `python ARGUMENTS` in this process."""
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    first = cwd if arguments[0] in ("-m", "-c") else str(Path(arguments[0]).resolve().parent)
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def import_all() -> None:
    """What a training imports. Python's threads would not survive a fork; pyarrow's allocator is prepared for it."""
    sys.path.insert(0, str(ROOT))
    import jsonargparse
    import PIL.Image
    import pyarrow.compute
    import pyarrow.parquet
    import torch

    import pipeline.training.loop

    PIL.Image.init()
    sys.path.remove(str(ROOT))
    assert jsonargparse and pyarrow and pipeline.training.loop
    assert torch.get_num_threads() == threading.active_count() == 1
    gc.collect()
    gc.freeze()  # collections in forks write to fewer of the shared pages


def run_and_exit(request: dict[str, Any]) -> NoReturn:
    """Runs the program and ends as the interpreter would, without the third of a second in which it clears its modules."""
    status: Any = None
    try:
        run(**request)
    except SystemExit as end:
        status = end.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        traceback.print_exc()
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import_all()
    run_and_exit(serve(socket.socket(fileno=int(sys.argv[1]))))
