"""How a run ends that does not finish: it failed, or somebody stopped it."""

import signal


class TrainingFailed(RuntimeError):
    """Training cannot go on; what was saved is whole."""


class Interrupted(Exception):
    """Somebody asked the run to stop; every rank raises it after the same step."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
