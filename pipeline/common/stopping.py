"""How a run stops before its end: it failed, or a signal asked it to stop."""

import os
import signal
from types import FrameType

# Ctrl-C, what a batch system or `kill` sends, and SLURM's warning before the time limit (sbatch --signal=USR1@90)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TrainingFailed(RuntimeError):
    """Training cannot go on; what was saved is whole."""


class Interrupted(Exception):
    """Somebody asked the run to stop; every rank raises it after the same step."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Signals:
    """Remembers a stopping signal until the loop asks; a second one ends the process at once."""

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
