"""Loaders: an epoch of (images, labels) batches. Each process gets its share of every global batch.

A loader combines a source of uint8 images (device memory or worker processes) with the order and the augmentation of the
samples. Order and augmentation are pure functions of (seed, epoch, sample). They do not depend on the source, the number of
processes or workers, or the batch at which an epoch starts.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.common.randomness import permutation
from pipeline.common.system import to_device
from pipeline.data.splits import Split
from pipeline.images.augment import BatchTransform
from pipeline.loaders.balanced_order import balanced_order
from pipeline.loaders.mixing import mix
from pipeline.loaders.sources import DeviceImages, WorkerImages
from pipeline.settings.batch_size import IGNORED, largest_share, share_of

DATA_ORDER = 1  # the purpose in the address of a draw; pipeline.images.crop and pipeline.images.augment define others

Batch = tuple[Tensor, Tensor]


class Loader:
    """Batches of one split for one rank.

    sampler: shuffle, or balanced for the order of balanced_order. mixup, cutmix: alphas of their Beta distributions. Training
    labels are int64 [B], or float [B, num_classes] with mixup or cutmix. eval_batch_size: images per rank and evaluation batch.
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
        sampler: str = "shuffle",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int,
        eval_batch_size: int,
    ):
        self.source, self.transform, self.device = source, transform, device
        self.rank, self.num_processes, self.seed = rank, num_processes, seed
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes
        self.eval_batch_size = eval_batch_size
        self.balanced_labels = np.asarray(split.labels) if sampler == "balanced" else None
        self.labels = torch.from_numpy(np.asarray(split.labels)).to(device)

    @property
    def kind(self) -> str:
        return "device" if isinstance(self.source, DeviceImages) else "workers"

    @property
    def resident_bytes(self) -> int:
        """The device memory of the decoded split; 0 for other loaders."""
        return self.source.num_bytes if isinstance(self.source, DeviceImages) else 0

    @property
    def batches_ahead(self) -> int:
        """The most batches that worker processes prepare before they are needed."""
        return self.source.batches_ahead

    def load(self) -> None:
        """Decodes the split if it is kept on the device; otherwise images are decoded per batch. Raises BadImage."""
        self.source.load()

    def __len__(self) -> int:
        """The number of samples in the split."""
        return len(self.labels)

    def train_epoch(self, epoch: int, batch_size: int, num_batches: int, first_batch: int = 0) -> Iterator[Batch]:
        """The shuffled, augmented batches of the epoch from first_batch on. An empty share is replaced by one IGNORED sample."""
        if self.balanced_labels is None:
            order = permutation(len(self), self.seed, epoch, DATA_ORDER)
        else:
            order = balanced_order(self.balanced_labels, self.seed, epoch)
        batches = [order[batch * batch_size : (batch + 1) * batch_size] for batch in range(num_batches)]
        shares = [share_of(len(rows), self.rank, self.num_processes) for rows in batches]
        rows_of_batches = [
            rows[start:stop] if stop > start else rows[:1] for rows, (start, stop) in zip(batches, shares)
        ]
        images_of_batches = self.source.batches(epoch, rows_of_batches[first_batch:])
        for batch, images in enumerate(images_of_batches, first_batch):
            rows, (start, stop) = rows_of_batches[batch], shares[batch]
            labels = self.labels[to_device(torch.from_numpy(rows % len(self)), self.device)]
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
            own = to_device(torch.from_numpy(rows_of_batches[batch]), self.device)
            yield self.transform.eval(images), self.labels[own]

    def most_eval_batches(self) -> int:
        """The largest number of batches in eval_epoch over all ranks."""
        return -(-largest_share(len(self), self.num_processes) // self.eval_batch_size)

    def blank_image(self) -> Tensor:
        """A batch with one image of zeros in the input shape of the model."""
        preprocessing = self.transform.preprocessing
        shape = (1, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
        return torch.zeros(shape, device=self.device)
