"""The machine that the process runs on: the cores it may use, and how its memory allocator keeps freed memory."""

import ctypes
import os

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES, OLD_GLIBCS_MOST = 2**30, 2**25


def usable_cores() -> int:
    """The machine's cores, or those that an affinity mask leaves of them (taskset, a SLURM job); a quota is not seen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_alive(process: int) -> bool:
    """Whether a process with this number runs on this machine; one that has ended and waits for its parent does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:  # it is another user's
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def keep_freed_memory() -> None:
    """Has glibc keep up to KEPT_BYTES of freed memory for the next allocations, where it is the allocator.

    Otherwise it returns a step's activations to the system and fetches them again page by page in the next step: of a small
    convnet, 34,000 pages, 7 % of its time. Does nothing where the environment (MALLOC_TRIM_THRESHOLD_ for one) says how
    memory is kept. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl, nor on macOS
    if set_option is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        set_option(M_MMAP_THRESHOLD, KEPT_BYTES) or set_option(M_MMAP_THRESHOLD, OLD_GLIBCS_MOST)
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
