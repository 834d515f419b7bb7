"""Shares: which samples of a global batch belong to a rank."""

IGNORED = -100  # the label of a sample that only fills a place; torch's cross_entropy leaves it out as well


def share_of(num_samples: int, rank: int, num_processes: int) -> tuple[int, int]:
    """The positions [start, stop) of a global batch that belong to a rank; starts are even, so that pairs stay together."""
    start, stop = (2 * (num_samples * r // (2 * num_processes)) for r in (rank, rank + 1))
    return start, num_samples if rank == num_processes - 1 else stop


def largest_share(num_samples: int, num_processes: int) -> int:
    """The samples of a global batch that fall to the rank that has most of them."""
    shares = [share_of(num_samples, rank, num_processes) for rank in range(num_processes)]
    return max(stop - start for start, stop in shares)
