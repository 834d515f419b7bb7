"""The global batch: its size in each epoch, the steps of an epoch, and the share of each rank."""

import math

from pipeline.settings.config import Config

IGNORED = -100  # the label of a padding sample; the default ignore_index of torch's cross_entropy
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


def share_of(num_samples: int, rank: int, num_processes: int) -> tuple[int, int]:
    """The positions [start, stop) of a rank in a global batch. Starts are even, so that no pair of mixup is split."""
    start, stop = (2 * (num_samples * r // (2 * num_processes)) for r in (rank, rank + 1))
    return start, num_samples if rank == num_processes - 1 else stop


def largest_share(num_samples: int, num_processes: int) -> int:
    """The largest number of samples of a global batch over all ranks."""
    shares = [share_of(num_samples, rank, num_processes) for rank in range(num_processes)]
    return max(stop - start for start, stop in shares)


def num_micro_batches(num_images: int, config: Config) -> int:
    """The number of passes of a process over so many images of a global batch."""
    return math.ceil(num_images / (config.images_at_once or num_images))
