"""Loaders: an epoch of (images, labels) batches, each process its share of every global batch.

A loader is two things: where the uint8 images come from (device memory or worker processes) and which of them, in which
order, with which augmentation: pure functions of (seed, epoch, sample), the same for both sources, any number of processes,
workers and any place to start from.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.common.randomness import permutation
from pipeline.data.splits import Split
from pipeline.images.augment import BatchTransform
from pipeline.loaders.mixing import mix
from pipeline.loaders.shares import IGNORED, largest_share, share_of
from pipeline.loaders.sources import DeviceImages, WorkerImages

DATA_ORDER = 1  # purpose in the addresses of randomness; pipeline.images.crop and pipeline.images.augment have others

Batch = tuple[Tensor, Tensor]


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

    @property
    def resident_bytes(self) -> int:
        """The device memory that the decoded split takes; 0 for other loaders."""
        return self.source.num_bytes if isinstance(self.source, DeviceImages) else 0

    def load(self) -> None:
        """Decodes the split if it stays on the device; else the first batch does. Raises BadImage."""
        self.source.load()

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

    def most_eval_batches(self) -> int:
        """Batches in eval_epoch of the rank that has most of them."""
        return -(-largest_share(len(self), self.num_processes) // self.eval_batch_size)

    def blank_image(self) -> Tensor:
        """A batch of one image of zeros, as the model takes them."""
        preprocessing = self.transform.preprocessing
        shape = (1, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
        return torch.zeros(shape, device=self.device)
