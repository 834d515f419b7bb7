"""How many CPU cores this process may use."""

import os


def usable_cores() -> int:
    """The machine's cores, or those that an affinity mask leaves of them (taskset, a SLURM job); a quota is not seen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
