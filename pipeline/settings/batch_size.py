"""The global batch size and the number of steps of an epoch."""

import math

from pipeline.settings.config import Config

USUAL_BATCH_SIZE, SMALLEST_FITTING_BATCH_SIZE, FEWEST_STEPS_PER_EPOCH = 128, 16, 32


def fitting_batch_size(num_samples: int) -> int:
    """The default batch size for a training split of this size: USUAL_BATCH_SIZE, smaller for a small split."""
    size = USUAL_BATCH_SIZE
    while size > SMALLEST_FITTING_BATCH_SIZE and num_samples < FEWEST_STEPS_PER_EPOCH * size:
        size //= 2
    return size


def first_batch_size(config: Config) -> int:
    return config.batch_size or USUAL_BATCH_SIZE


def batch_size_at(epoch: int, config: Config) -> int:
    """The global batch size of an epoch: the last entry of batch_size_schedule up to it, else batch_size."""
    starts = [start for start in config.batch_size_schedule if start <= epoch]
    return config.batch_size_schedule[max(starts)] if starts else first_batch_size(config)


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in an epoch; one step for a split smaller than one batch."""
    return max(num_samples // batch_size, 1) if drop_last else math.ceil(num_samples / batch_size)
