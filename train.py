#!/usr/bin/env python
"""Train an image classifier: `python train.py`, `accelerate launch train.py`, `torchrun train.py` or `wandb agent`."""

import sys
from collections.abc import Sequence

from pipeline.common import console
from pipeline.settings.parser import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0 done, 1 failed in training, 2 wrong before it, 128 + n stopped by signal n."""
    config = parse_config(argv)
    # after the settings: a misspelt one costs no import of torch
    from pipeline.common.stopping import Interrupted, TrainingFailed
    from pipeline.distributed.shared_failure import end_process_group
    from pipeline.training.loop import train

    status = 0
    try:
        train(config)
    except ValueError as error:
        console.error(error)
        return 2
    except TrainingFailed as error:
        console.error(error)
        return 1
    except Interrupted as interruption:
        status = 128 + interruption.signal_number
    except KeyboardInterrupt:  # before the first step
        return 130
    end_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
