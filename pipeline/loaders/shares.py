"""Shares: the samples of a global batch that belong to a rank."""

IGNORED = -100  # the label of a padding sample; the default ignore_index of torch's cross_entropy


def share_of(num_samples: int, rank: int, num_processes: int) -> tuple[int, int]:
    """The positions [start, stop) of a rank in a global batch. Starts are even, so that no pair of mixup is split."""
    start, stop = (2 * (num_samples * r // (2 * num_processes)) for r in (rank, rank + 1))
    return start, num_samples if rank == num_processes - 1 else stop


def largest_share(num_samples: int, num_processes: int) -> int:
    """The largest number of samples of a global batch over all ranks."""
    shares = [share_of(num_samples, rank, num_processes) for rank in range(num_processes)]
    return max(stop - start for start, stop in shares)
