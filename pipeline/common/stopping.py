"""Stopping a run before its end: after a failure, or after a signal."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# Ctrl-C; the signal of batch systems and `kill`; SLURM's warning before the time limit (sbatch --signal=USR1@90)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SIGNAL_AGAIN_SECONDS = 0.05


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 40" for a number without a name."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class TrainingFailed(RuntimeError):
    """Training cannot continue. Saved checkpoints are intact."""


class Interrupted(Exception):
    """A signal requested the run to stop. Every rank raises it after the same step."""

    def __init__(self, signal_number: int):
        super().__init__(signal_name(signal_number))
        self.signal_number = signal_number


class Signals:
    """Records a stopping signal, which the training loop checks. A second signal ends the process immediately."""

    def __init__(self) -> None:
        self.received = 0
        self.earlier = {number: signal.signal(number, self.receive) for number in STOPPING}

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def release(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


def end_program(number: int, frame: FrameType | None) -> None:
    """A signal handler. Raises KeyboardInterrupt after SIGINT, else SystemExit; temporary files and processes are removed then.

    During an import it ends the process at once: torch ignores exceptions while it imports numpy, which then is incomplete. In a
    __del__, where Python ignores exceptions, it sends the signal again a little later.
    """
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            again = threading.Timer(SIGNAL_AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # no Exception: a library might catch it


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside the context, SIGINT and SIGTERM call end_program, unless they are ignored or have another handler.

    A process of a launcher keeps the system's SIGTERM: Python would call a handler only when a wait for other processes ends.
    """
    ending = (signal.SIGINT, signal.SIGTERM) if os.environ.get("WORLD_SIZE", "1") == "1" else (signal.SIGINT,)
    plain = (signal.SIG_DFL, signal.default_int_handler)
    earlier = {number: handler for number in ending if (handler := signal.getsignal(number)) in plain}
    try:
        for number in earlier:
            signal.signal(number, end_program)
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
