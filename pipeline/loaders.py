"""Loaders: an epoch of (images, labels) batches, each process its share of every global batch.

A loader is two things: where the uint8 images come from (device memory or worker processes) and which of them, in which
order, with which augmentation: pure functions of (seed, epoch, sample), the same for both sources, any number of processes,
workers and any place to start from.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.images import BadImage, decode_image
from pipeline.metrics import IGNORED
from pipeline.randomness import permutation, uniforms
from pipeline.splits import Split
from pipeline.transforms import NUM_FIT_DRAWS, BatchTransform, Preprocessing, fit_for_training, mix

DATA_ORDER, FIT = 1, 2  # purposes in the addresses of randomness; pipeline.transforms has its own
DEVICE_MEMORY_SHARE = 0.25  # of the device's memory, for a decoded set that stays there

Batch = tuple[Tensor, Tensor]


def share_of(num_samples: int, rank: int, num_processes: int) -> tuple[int, int]:
    """The positions [start, stop) of a global batch that belong to a rank; starts are even, so that pairs stay together."""
    start, stop = (2 * (num_samples * r // (2 * num_processes)) for r in (rank, rank + 1))
    return start, num_samples if rank == num_processes - 1 else stop


class FittedImages(torch.utils.data.Dataset):
    """What a worker process runs: (epoch, row) pairs to images of one size; uint8 [C, S, S] each."""

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: str, seed: int):
        self.split, self.preprocessing, self.augment, self.seed = split, preprocessing, augment, seed

    def __getitem__(self, address: tuple[int, int]) -> Tensor:
        epoch, row = address
        try:
            image = decode_image(self.split.encoded(row), self.preprocessing.channels)
        except BadImage as error:
            raise BadImage(f"{self.split.where(row)}: {error} Mend or remove it.") from error
        draws = uniforms(np.array([row]), NUM_FIT_DRAWS, self.seed, epoch, FIT)[0]
        return fit_for_training(image, self.preprocessing, self.augment, draws)

    def __getitems__(self, addresses: list[tuple[int, int]]) -> Tensor:
        return torch.stack([self[address] for address in addresses])


class WorkerImages:
    """Images decoded and fitted by worker processes as they are asked for, or in this one when num_workers is 0."""

    def __init__(self, images: FittedImages, num_workers: int, device: torch.device):
        self.device = device
        self.addresses: list[list[tuple[int, int]]] = []
        # The batch sampler is a list that is filled anew for each epoch: the workers live on.
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=self.addresses,
            num_workers=num_workers,
            collate_fn=as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
        )

    def batches(self, epoch: int, rows_of_batches: list[np.ndarray]) -> Iterator[Tensor]:
        self.addresses[:] = [[(epoch, int(row)) for row in rows] for rows in rows_of_batches]
        try:
            for images in self.loader:
                yield images.to(self.device, non_blocking=True)
        except BadImage as error:
            # torch puts a worker's traceback before what it said
            raise BadImage(str(error).strip().splitlines()[-1].partition("BadImage: ")[2] or str(error)) from None


def as_it_is(batch: Any) -> Any:
    return batch


class DeviceImages:
    """The whole split decoded once and kept in device memory as uint8; a batch is an index."""

    def __init__(self, images: FittedImages, device: torch.device, num_threads: int):
        resident = torch.empty(len(images.split), *images[0, 0].shape, dtype=torch.uint8)

        def decode(row: int) -> None:
            resident[row] = images[0, row]

        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(decode, range(len(resident))):  # the loop raises what a thread raised
                pass
        self.images = resident.to(device)

    def batches(self, epoch: int, rows_of_batches: list[np.ndarray]) -> Iterator[Tensor]:
        for rows in rows_of_batches:
            yield self.images[torch.from_numpy(rows).to(self.images.device, non_blocking=True)]


class Loader:
    """Batches of one split for one rank.

    mixup, cutmix: alphas of their Beta distributions; training labels are int64 [B] without and float [B, num_classes]
    with them. eval_batch_size: images of a rank at once in evaluation.
    """

    def __init__(
        self,
        split: Split,
        source: WorkerImages | DeviceImages,
        transform: BatchTransform,
        *,
        device: torch.device,
        rank: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int,
        eval_batch_size: int,
    ):
        self.source, self.transform, self.device = source, transform, device
        self.rank, self.num_processes, self.seed = rank, num_processes, seed
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes
        self.eval_batch_size = eval_batch_size
        self.labels = torch.from_numpy(np.asarray(split.labels)).to(device)

    @property
    def kind(self) -> str:
        return "device" if isinstance(self.source, DeviceImages) else "workers"

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self.labels)

    def train_epoch(self, epoch: int, batch_size: int, num_batches: int, first_batch: int = 0) -> Iterator[Batch]:
        """The epoch's shuffled, augmented batches from first_batch on; a share without samples holds one IGNORED one."""
        order = permutation(len(self), self.seed, epoch, DATA_ORDER)
        batches = [order[batch * batch_size : (batch + 1) * batch_size] for batch in range(num_batches)]
        shares = [share_of(len(rows), self.rank, self.num_processes) for rows in batches]
        rows_of_batches = [
            rows[start:stop] if stop > start else rows[:1] for rows, (start, stop) in zip(batches, shares)
        ]
        images_of_batches = self.source.batches(epoch, rows_of_batches[first_batch:])
        for batch, images in enumerate(images_of_batches, first_batch):
            rows, (start, stop) = rows_of_batches[batch], shares[batch]
            labels = self.labels[torch.from_numpy(rows).to(self.device, non_blocking=True)]
            if stop == start:
                labels = torch.full_like(labels, IGNORED)
            images = self.transform.train(images, rows, epoch)
            if self.mixup or self.cutmix:
                images, labels = mix(
                    images,
                    labels,
                    num_classes=self.num_classes,
                    mixup=self.mixup,
                    cutmix=self.cutmix,
                    place=(self.seed, epoch, batch),
                    first_position=start,
                    global_batch=len(batches[batch]),
                )
            yield images, labels

    def eval_epoch(self) -> Iterator[Batch]:
        """Every sample of the split once over all ranks, in order and without augmentation."""
        start, stop = share_of(len(self), self.rank, self.num_processes)
        rows = np.arange(start, stop)
        size = self.eval_batch_size
        rows_of_batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        for batch, images in enumerate(self.source.batches(0, rows_of_batches)):
            yield self.transform.eval(images), self.labels[torch.from_numpy(rows_of_batches[batch]).to(self.device)]


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has: a GPU's own, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def decoded_bytes(split: Split, preprocessing: Preprocessing) -> int:
    side = preprocessing.source_size or preprocessing.image_size
    return len(split) * preprocessing.channels * side**2


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_loader(split: Split, preprocessing: Preprocessing, wanted: str, device: torch.device) -> str:
    """device or workers. Raises ValueError when the device loader is asked for and the set cannot stay on the device."""
    resident = preprocessing.source_size is not None
    needed, limit = decoded_bytes(split, preprocessing), int(DEVICE_MEMORY_SHARE * device_memory(device))
    if wanted == "device" and not resident:
        raise ValueError(
            "loader device keeps images of one small size; these are photos that are cropped anew each epoch. "
            "Use loader workers or auto."
        )
    if wanted == "device" and needed > limit:
        raise ValueError(
            f"loader device needs {needed / 2**20:,.0f} MiB for the decoded set, above {DEVICE_MEMORY_SHARE:.0%} of the "
            f"device's memory ({limit / 2**20:,.0f} MiB). Use loader workers or auto."
        )
    return "device" if wanted != "workers" and resident and needed <= limit else "workers"


def choose_num_workers(wanted: int | None, num_processes: int, device: torch.device) -> int:
    """Worker processes for one training process: as wanted, else this process's share of the cores, at most 8.

    On a CPU one core's share is left to the training itself.
    """
    if wanted is not None:
        return wanted
    cores = usable_cores() // max(num_processes, 1)
    return min(cores if device.type != "cpu" else cores - 1, 8)


def make_source(images: FittedImages, kind: str, num_workers: int, device: torch.device) -> WorkerImages | DeviceImages:
    if kind == "device":
        return DeviceImages(images, device, usable_cores())
    return WorkerImages(images, num_workers, device)
