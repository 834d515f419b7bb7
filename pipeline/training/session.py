"""Training from Python: in a script, in a notebook, or in the processes of accelerate.notebook_launcher."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState

from pipeline.distributed.shared_failure import end_process_group
from pipeline.settings.config import Config
from pipeline.settings.parser import checked
from pipeline.training import loop


def train(config: Config) -> dict[str, Any]:
    """Trains a model and returns the run's summary, as summary.json has it. May be called any number of times.

    Raises ValueError for an error before the first step, invalid settings included, TrainingFailed for one after it, and
    Interrupted when a signal stopped the run, such as that of a notebook's stop button. Saved checkpoints are complete in all
    three cases. In the processes of a launcher, every process must call it, once.
    """
    config = checked(config)
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state()  # an earlier run's: Accelerate refuses another precision than the first one
    try:
        return loop.train(config)
    finally:
        end_process_group()
