"""Where a split's images live while training, and how many processes decode them: choices from the machine."""

import os

import torch

from pipeline.common.system import usable_cores
from pipeline.data.splits import Split
from pipeline.images.preprocessing import Preprocessing, kept_side

DEVICE_MEMORY_SHARE = 0.25  # of the device's memory, for a decoded set that stays there


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has: a GPU's own, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def decoded_bytes(split: Split, preprocessing: Preprocessing) -> int:
    """What the split takes on the device; of photos, as they are kept for training."""
    side = preprocessing.source_size or kept_side(preprocessing)
    return len(split) * preprocessing.channels * side**2


def choose_loader(split: Split, preprocessing: Preprocessing, wanted: str, device: torch.device) -> str:
    """device or workers. Raises ValueError when the device loader is asked for and the set cannot stay on the device.

    Photos stay on the device only when that is asked for: their random parts are then cut from a smaller picture.
    """
    is_small = preprocessing.source_size is not None
    needed, limit = decoded_bytes(split, preprocessing), int(DEVICE_MEMORY_SHARE * device_memory(device))
    if wanted == "device" and needed > limit:
        raise ValueError(
            f"loader device needs {needed / 2**20:,.0f} MiB for the decoded set, above {DEVICE_MEMORY_SHARE:.0%} of the "
            f"device's memory ({limit / 2**20:,.0f} MiB). Use loader workers or auto."
        )
    return "device" if wanted == "device" or wanted == "auto" and is_small and needed <= limit else "workers"


def choose_num_workers(wanted: int | None, num_processes: int, device: torch.device) -> int:
    """Worker processes for one training process: as wanted, else this process's share of the cores, at most 8.

    On a CPU one core's share is left to the training itself.
    """
    if wanted is not None:
        return wanted
    cores = usable_cores() // max(num_processes, 1)
    return min(cores if device.type != "cpu" else cores - 1, 8)
