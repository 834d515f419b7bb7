#!/usr/bin/env python
"""Train an image classifier: `python train.py`, `accelerate launch train.py`, `torchrun train.py` or `wandb agent`."""

import sys
import time
from collections.abc import Sequence

from pipeline.common import console
from pipeline.settings.parser import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status: 0 completed, 1 failed in training, 2 failed before it, 128 + n stopped by signal n."""
    started = time.perf_counter()
    config = parse_config(argv)
    # imported after parsing, so that a misspelt setting is reported without importing torch
    from pipeline.common.stopping import Interrupted, TrainingFailed
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
    except KeyboardInterrupt:  # before a run installs its signal handlers
        return 130
    end_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
