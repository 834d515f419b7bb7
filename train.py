#!/usr/bin/env python
"""Train an image classifier: `python train.py`, `accelerate launch train.py`, `torchrun train.py` or `wandb agent`."""

import sys
import time
from collections.abc import Sequence

from pipeline.common.stopping import Interrupted, TrainingFailed, ended_by_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status: 0 completed, 1 failed in training, 2 failed before it, 128 + n stopped by signal n."""
    started = time.perf_counter()
    try:
        with ended_by_signals():  # until a run installs its own handlers
            return run(argv, started)
    except KeyboardInterrupt:
        return 130


def run(argv: Sequence[str] | None, started: float) -> int:
    """main, but Ctrl-C before a run handles signals raises KeyboardInterrupt. started: as in `train`."""
    from pipeline.common import console  # imported here: Ctrl-C prints no traceback
    from pipeline.settings.parser import parse_config

    config = parse_config(argv)
    # imported after parsing, so that a misspelt setting is reported without importing torch
    from pipeline.distributed.shared_failure import end_process_group
    from pipeline.training.loop import train

    status = 0
    try:
        train(config, started)
    except (ValueError, OSError) as error:  # OSError: a path that is too long, or that may not be looked up
        console.error(error)
        return 2
    except TrainingFailed as error:
        console.error(error)
        return 1
    except Interrupted as interruption:
        status = 128 + interruption.signal_number
    end_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
