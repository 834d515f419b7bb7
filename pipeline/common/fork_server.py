"""Python programs that start in a tenth of a second: forks of a server that has imported the modules that they need.

A fork differs from a fresh interpreter in two ways. The server's modules are imported already, and what Python and the C
libraries read from the environment only once is as the server had it. Linux only: on macOS, system libraries do not survive a
fork (https://github.com/python/cpython/issues/77906).
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.common.system import is_alive

ROOT = Path(__file__).parents[2]  # the folder of the package
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.common.fork_server import main; main()"
TORCH = ("jsonargparse", "PIL.Image", "pyarrow.compute", "pyarrow.parquet", "pipeline.training.loop")  # what train.py imports
MESSAGE_BYTES = 2**17  # more than the arguments of a program and the changes of its environment need
UNKNOWN = 256  # instead of an exit status, if the server ended before the program


class ForkServer:
    """The server, as the process that starts programs sees it. It ends when that process ends; its forks do not."""

    def __init__(self, environment: dict[str, str], modules: Sequence[str]) -> None:
        """Returns at once; the server imports the modules meanwhile. environment: the server's."""
        self.environment = environment
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def start(self, arguments: Sequence[str], cwd: Path, environment: dict[str, str], out: int, err: int) -> "Fork":
        """Starts `python ARGUMENTS`. out, err: descriptors of its standard output and error.

        Raises OSError, and ConnectionError if the server was killed.
        """
        changed = {name: value for name, value in environment.items() if self.environment.get(name) != value}
        removed = [name for name in self.environment if name not in environment]
        request = {"arguments": list(arguments), "cwd": str(cwd), "changed": changed, "removed": removed}
        status, theirs = os.pipe()
        try:
            socket.send_fds(self.connection, [json.dumps(request).encode()], [out, err, theirs])
            reply = self.connection.recv(MESSAGE_BYTES)
            if not reply:
                raise ConnectionResetError("the fork server ended")
            answer = json.loads(reply)
            if "error" in answer:
                raise OSError(*answer["error"])
        except OSError:
            os.close(status)
            raise
        finally:
            os.close(theirs)
        return Fork(list(arguments), answer["pid"], status)

    def close(self) -> None:
        """Ends the server. Programs that still run continue without it."""
        self.connection.close()
        self.process.kill()  # it may still import, and it has nothing to save
        self.process.wait()


class Fork:
    """A program in a fork, which leads a session and a process group of its own: a part of subprocess.Popen's interface."""

    def __init__(self, args: list[str], pid: int, status: int) -> None:
        self.args, self.pid, self.status = args, pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status of the ended program, negative for a signal, UNKNOWN if the server was killed; else None."""
        if self.returncode is None and select.select([self.status], [], [], 0)[0]:
            text = os.read(self.status, 16)
            if text:
                self.returncode = int(text)
            elif not is_alive(self.pid):
                self.returncode = UNKNOWN
            if self.returncode is not None:
                os.close(self.status)
        return self.returncode


def main() -> NoReturn:
    """The server: imports the modules, forks on request, and ends when the connection is closed. A fork runs its program here."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    assert threading.active_count() == 1, "Python's threads do not survive a fork"
    gc.collect()
    gc.freeze()  # collections in forks write to fewer of the shared pages
    run_and_exit(serve(connection))


def serve(connection: socket.socket) -> dict[str, Any]:
    """Answers each request with the number of a new process, and writes the exit status into the request's pipe at its end.

    Returns the request in each of these processes; the server itself ends here.
    """
    forks: dict[int, tuple[int, int]] = {}  # by a descriptor that becomes readable at its end: process and pipe
    while True:
        sources: list[Any] = [connection, *forks]
        ready = select.select(sources, [], [])[0]
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
            os._exit(0)
        try:
            pid = fork_leader()
        except OSError as error:
            connection.send(json.dumps({"error": [error.errno, error.strerror]}).encode())
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        out, err, pipe = descriptors
        if pid == 0:
            connection.close()
            for descriptor in [pipe, *forks, *(pipe for _, pipe in forks.values())]:
                os.close(descriptor)
            set_streams(out, err)
            return dict(json.loads(message))
        connection.send(json.dumps({"pid": pid}).encode())
        forks[os.pidfd_open(pid)] = (pid, pipe)
        os.close(out)
        os.close(err)


def fork_leader() -> int:
    """Forks; returns the process's number in the server, after it has become the leader of a session, and 0 in the process."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # threads of C libraries: numpy's OpenBLAS ends them before a fork, pyarrow's allocator prepares for it
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.setsid()
    os.close(writing)
    if pid:
        os.read(reading, 1)  # returns when the process has closed its end
        os.close(reading)
    return pid


def set_streams(out: int, err: int) -> None:
    """Redirects standard output and error to these descriptors."""
    for target, source in ((1, out), (2, err)):
        os.dup2(source, target)
    for source in {out, err}:
        os.close(source)
    # new ones, because a stream remembers whether its file can seek
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors, closefd=False)


def run(arguments: list[str], cwd: str, changed: dict[str, str], removed: list[str]) -> None:
    """Runs `python ARGUMENTS` in this process. changed, removed: variables of the environment."""
    os.chdir(cwd)
    for name in removed:
        os.environ.pop(name, None)
    os.environ.update(changed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # as after an import; Python's random does so by itself
    first = cwd if arguments[0] in ("-m", "-c") else str(Path(arguments[0]).resolve().parent)
    sys.path[:0] = [first, *filter(None, changed.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


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
        with contextlib.suppress(OSError):
            sys.stdout.flush()  # first, as the interpreter does
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
