"""Builds the loader of a split: chooses where images are kept during training and how many processes decode them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.common.system import machine_memory, usable_cores
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.shards import StreamedSplit
from pipeline.data.splits import Split
from pipeline.distributed.accelerator import processes_here
from pipeline.images.augment import BatchTransform, cropped_on_cpu
from pipeline.images.preprocessing import Preprocessing, kept_side
from pipeline.loaders.loader import Loader
from pipeline.loaders.sources import FittedImages, make_source
from pipeline.loaders.stream_loader import AnyLoader, StreamLoader
from pipeline.settings.batch_size import first_batch_size
from pipeline.settings.config import Config

EVAL_BATCH = 2  # times a training batch: evaluation keeps no activations, so it fits if training fits
DEVICE_MEMORY_SHARE = 0.25  # largest fraction of the device memory for a decoded dataset


def device_memory(device: torch.device) -> int:
    """The memory of the GPU, or of the machine for a CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()


def decoded_bytes(split: Split, preprocessing: Preprocessing) -> int:
    """The memory of the decoded split on the device, in bytes; photos at the size kept for training."""
    side = preprocessing.source_size or kept_side(preprocessing)
    return len(split) * preprocessing.channels * side**2


def choose_loader(splits: Iterable[Split], preprocessing: Preprocessing, requested: str, device: torch.device) -> str:
    """Chooses device or workers for all splits. Raises ValueError if device is requested but they are too large together.

    auto never chooses device for photos, because their random crops would then come from a smaller image.
    """
    is_small = preprocessing.source_size is not None
    needed = sum(decoded_bytes(split, preprocessing) for split in set(splits))
    limit = int(DEVICE_MEMORY_SHARE * device_memory(device))
    if requested == "device" and needed > limit:
        raise ValueError(
            f"loader device needs {needed / 2**20:,.0f} MiB for the decoded set, above {DEVICE_MEMORY_SHARE:.0%} of the "
            f"device's memory ({limit / 2**20:,.0f} MiB). Use loader workers or auto."
        )
    return "device" if requested == "device" or requested == "auto" and is_small and needed <= limit else "workers"


def choose_num_workers(requested: int | None, num_processes: int, device: torch.device) -> int:
    """The number of worker processes of one training process: the requested number, else its share of the cores, at most 8.

    On a CPU, one core of the share is reserved for training.
    """
    if requested is not None:
        return requested
    cores = usable_cores() // max(num_processes, 1)
    return min(cores if device.type != "cpu" else cores - 1, 8)


def make_loader(
    config: Config,
    split: Split,
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    training: bool,
) -> AnyLoader:
    """The loader of one split for this rank."""
    device = accelerator.device
    augment = config.augment if training else "none"
    num_workers = choose_num_workers(config.num_workers, processes_here(accelerator), device)
    splits = (dataset.train, dataset.val, dataset.test)
    kind = "stream" if isinstance(split, StreamedSplit) else choose_loader(splits, preprocessing, config.loader, device)
    if kind == "device" and training and cropped_on_cpu(preprocessing, augment):
        preprocessing = dataclasses.replace(preprocessing, kept_size=kept_side(preprocessing))
    transform = BatchTransform(
        preprocessing,
        device=device,
        augment=augment,
        flip=dataset.flip if config.flip is None else config.flip,
        random_erasing=config.random_erasing if training else 0.0,
        seed=config.seed,
        channels_last=bool(config.channels_last),
    )
    common: dict[str, Any] = {
        "device": device,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "seed": config.seed,
        "mixup": config.mixup if training else 0.0,
        "cutmix": config.cutmix if training else 0.0,
        "num_classes": len(dataset.class_names),
        "eval_batch_size": config.images_at_once
        or EVAL_BATCH * math.ceil(first_batch_size(config) / accelerator.num_processes),
    }
    sampler = config.sampler if training else "shuffle"
    images = FittedImages(split, preprocessing, augment, config.seed, shown=accelerator.is_main_process)
    if isinstance(split, StreamedSplit):
        buffer = config.shuffle_buffer
        return StreamLoader(split, images, transform, num_workers=num_workers, shuffle_buffer=buffer, **common)
    return Loader(split, make_source(images, kind, num_workers, device), transform, sampler=sampler, **common)
