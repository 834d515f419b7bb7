"""The stream loader: reads a split from its shards during the epoch; each process and worker reads its own part."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.common.system import to_device
from pipeline.data.shards import StreamedSplit
from pipeline.images.augment import BatchTransform
from pipeline.loaders.loader import Batch, Loader
from pipeline.loaders.mixing import mix
from pipeline.loaders.sources import FittedImages
from pipeline.loaders.stream_order import BatchPlan, Task, epoch_order, lanes_of, num_lanes, plan_batches
from pipeline.loaders.workers import WorkerLoader, results
from pipeline.settings.batch_size import IGNORED

AHEAD_BATCHES = 8  # a chunk is fetched so many batches before its first sample is needed


class StreamedImages(torch.utils.data.Dataset):
    """The dataset in a worker process: maps a Task to its images, uint8 [B, C, S, S]. The worker holds the chunks it reads."""

    def __init__(self, images: FittedImages, split: StreamedSplit):
        self.images, self.split = images, split

    def __getitem__(self, task: Task) -> torch.Tensor:
        if task.begins:
            self.split.release_all()
        self.split.expect(task.fetch)
        images = (
            self.images.__getitems__((task.epoch, task.rows)) if len(task.rows) else torch.zeros(0, dtype=torch.uint8)
        )
        self.split.release(task.drop)
        return images


class TaskQueue:
    """The sampler of the data loader: yields the tasks of the current epoch as they are planned."""

    def __init__(self) -> None:
        self.tasks: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.tasks


class StreamLoader:
    """Batches of one streamed split for one rank, with the interface of loader.Loader.

    shuffle_buffer: the number of samples, over all processes, within which the order of an epoch is shuffled.
    """

    kind = "stream"
    resident_bytes = 0

    def __init__(
        self,
        split: StreamedSplit,
        images: FittedImages,
        transform: BatchTransform,
        *,
        num_workers: int,
        shuffle_buffer: int,
        device: torch.device,
        rank: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int,
        eval_batch_size: int,
    ):
        split.release_all()
        self.transform, self.device, self.shuffle_buffer = transform, device, shuffle_buffer
        self.rank, self.num_processes, self.seed = rank, num_processes, seed
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes
        self.eval_batch_size = eval_batch_size
        self.labels = split.labels
        self.preprocessing = images.preprocessing
        self.chunks, self.starts = split.chunk_starts()
        self.lanes = num_lanes(len(self.chunks), len(split), shuffle_buffer, num_processes)
        self.own = lanes_of(rank, num_processes, self.lanes)
        workers = min(num_workers, len(self.own))
        parts = [lanes_of(worker, max(workers, 1), len(self.own)) for worker in range(max(workers, 1))]
        self.lanes_of_workers = [self.own[part.start : part.stop] for part in parts]
        self.tasks = TaskQueue()
        # DataLoader assigns tasks to workers in turn and keeps their order, so each worker gets the tasks of its own lanes.
        self.loader = WorkerLoader(StreamedImages(images, split), workers, device, sampler=self.tasks, batch_size=None)
        self.batches_ahead = self.loader.prefetch_factor or 0  # a batch has a task for each worker

    def __len__(self) -> int:
        """The number of samples in the split."""
        return len(self.labels)

    def load(self) -> None:
        """Does nothing: images are read per batch."""

    def train_epoch(self, epoch: int, batch_size: int, num_batches: int, first_batch: int = 0) -> Iterator[Batch]:
        """The shuffled, augmented batches of the epoch from first_batch on. An empty share is replaced by one IGNORED sample."""
        batches = range(first_batch, num_batches)
        for batch, (plan, images) in zip(batches, self._batches(epoch, (self.seed, epoch), batch_size, batches)):
            rows, labels = plan.rows, self._labels(plan.rows)
            if not len(rows):
                rows, labels = np.zeros(1, np.int64), torch.full([1], IGNORED, device=self.device)
                side, channels = self.preprocessing.fitted_size, self.preprocessing.channels
                images = torch.zeros(1, channels, side, side, dtype=torch.uint8, device=self.device)
            images = self.transform.train(images, rows, epoch)
            if self.mixup or self.cutmix:
                images, labels = self._mixed(images, labels, plan.counts, (self.seed, epoch, batch))
            yield images, labels

    def eval_epoch(self) -> Iterator[Batch]:
        """Every sample of the split once over all ranks, without augmentation."""
        batch_size = self.eval_batch_size * self.num_processes
        for plan, images in self._batches(0, None, batch_size, range(-(-len(self) // batch_size))):
            if len(plan.rows):
                yield self.transform.eval(images), self._labels(plan.rows)

    def _labels(self, rows: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(self.labels[rows]), self.device)

    def _batches(
        self, epoch: int, place: tuple[int, int] | None, batch_size: int, batches: range
    ) -> Iterator[tuple[BatchPlan, torch.Tensor]]:
        """The share of this rank in each batch: its plan, and its images on the device. Raises BadImage and LostShard."""
        order = epoch_order(self.starts, self.lanes, self.shuffle_buffer, place)
        order = replace(order, chunks=self.chunks[order.chunks])
        plans: deque[BatchPlan] = deque()

        def tasks() -> Iterator[Task]:
            for plan in plan_batches(order, epoch, batch_size, batches, self.lanes_of_workers, AHEAD_BATCHES):
                plans.append(plan)
                yield from plan.tasks

        self.tasks.tasks = tasks()
        arrived = results(self.loader)
        for _ in batches:
            parts = [next(arrived) for _ in self.lanes_of_workers]
            # copied one by one: together they would leave pinned memory
            copied = [to_device(part, self.device) for part in parts if len(part)]
            yield plans.popleft(), torch.cat(copied) if len(copied) > 1 else copied[0] if copied else parts[0]

    def _mixed(
        self, images: torch.Tensor, labels: torch.Tensor, counts: np.ndarray, place: tuple[int, int, int]
    ) -> Batch:
        """Mixes pairs of neighbours of a lane. The unpaired last sample of an odd lane stays unmixed and moves to the end."""
        own = counts[self.own.start : self.own.stop]
        numbers = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        is_paired = numbers < np.repeat(own - own % 2, own)
        if not own.any():
            is_paired = np.zeros(1, bool)
        even = counts - counts % 2
        parts = []
        for chosen, mixup, cutmix in ((is_paired, self.mixup, self.cutmix), (~is_paired, 0.0, 0.0)):
            where = to_device(torch.from_numpy(np.flatnonzero(chosen)), self.device)
            if len(where):
                parts.append(
                    mix(
                        images[where],
                        labels[where],
                        num_classes=self.num_classes,
                        mixup=mixup,
                        cutmix=cutmix,
                        place=place,
                        first_position=int(even[: self.own.start].sum()),
                        global_batch=int(even.sum()),
                    )
                )
        mixed, soft_labels = zip(*parts)
        return torch.cat(mixed), torch.cat(soft_labels)


AnyLoader = Loader | StreamLoader
