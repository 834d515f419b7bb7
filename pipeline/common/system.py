"""The machine of the process: usable cores, memory, running processes, and the memory allocator."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES, OLD_GLIBCS_MOST = 2**30, 2**25


def usable_cores() -> int:
    """The number of cores, within the affinity mask if there is one (taskset, a SLURM job). Ignores CPU quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """Bytes of main memory."""
    return int(psutil.virtual_memory().total)


def is_alive(process: int) -> bool:
    """Whether a process with this number runs on this machine. A zombie does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:  # it belongs to another user
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def process_tree(process: int) -> list[psutil.Process]:
    """The process and all its descendants on this machine; empty if it has ended."""
    try:
        root = psutil.Process(process)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def tree_memory(process: int) -> int:
    """Bytes of memory of a process and its descendants; memory that processes share is divided among them. 0 if unknown.

    It is the PSS of Linux (https://docs.kernel.org/filesystems/proc.html). Other systems report only the unshared memory.
    """
    total = 0
    for one in process_tree(process):
        with contextlib.suppress(psutil.Error):  # it has ended, or belongs to another user
            memory = one.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    return total


def end_tree(process: subprocess.Popen, seconds: float) -> None:
    """Terminates a process, kills it after `seconds`, and kills all remaining descendants."""
    tree = process_tree(process.pid)
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    finally:  # also after a second Ctrl-C
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil never signals another process of the same number
                one.kill()
        process.wait()


def keep_freed_memory() -> None:
    """Makes glibc keep up to KEPT_BYTES of freed memory for later allocations.

    By default glibc returns the activations of a step to the system, and the next step faults them in again page by page: for
    a small convnet 34,000 pages, 7 % of its time. Does nothing with another allocator, or if the environment configures it
    (for example MALLOC_TRIM_THRESHOLD_). https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl, nor on macOS
    if set_option is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        set_option(M_MMAP_THRESHOLD, KEPT_BYTES) or set_option(M_MMAP_THRESHOLD, OLD_GLIBCS_MOST)
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextlib.contextmanager
def decoding_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that decode images, each with one OpenMP thread; on the way out, calls not yet begun are cancelled.

    Otherwise each of them starts as many OpenMP threads as there are cores to resize an image.
    """
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # later threads use the number that was set last


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """The tensor on the device, without waiting for a CUDA copy.

    CUDA reads pageable memory before the call returns. Other devices may read it later, when a temporary array is gone
    (https://github.com/pytorch/pytorch/issues/189690), so they wait.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
