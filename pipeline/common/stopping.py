"""Stopping a run before its end: after a failure, or after a signal."""

import os
import signal
from types import FrameType

# Ctrl-C; the signal of batch systems and `kill`; SLURM's warning before the time limit (sbatch --signal=USR1@90)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
