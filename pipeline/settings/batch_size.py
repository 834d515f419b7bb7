"""The global batch size of an epoch, and how many steps an epoch has."""

import math

from pipeline.settings.config import Config

USUAL_BATCH_SIZE, SMALLEST_FITTING_BATCH_SIZE, FEWEST_STEPS_PER_EPOCH = 128, 16, 32


def fitting_batch_size(num_samples: int) -> int:
    """The batch size for a training split when none is set: USUAL_BATCH_SIZE, less for a small one."""
    size = USUAL_BATCH_SIZE
    while size > SMALLEST_FITTING_BATCH_SIZE and num_samples < FEWEST_STEPS_PER_EPOCH * size:
        size //= 2
    return size


def first_batch_size(config: Config) -> int:
    return config.batch_size or USUAL_BATCH_SIZE


def batch_size_at(epoch: int, config: Config) -> int:
    """The global batch size of an epoch: the newest entry of batch_size_schedule that has begun, else batch_size."""
    begun = [start for start in config.batch_size_schedule if start <= epoch]
    return config.batch_size_schedule[max(begun)] if begun else first_batch_size(config)


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in an epoch; a set smaller than one batch is one step."""
    return max(num_samples // batch_size, 1) if drop_last else math.ceil(num_samples / batch_size)
