"""Sources of uint8 images: device memory, or worker processes that decode each batch."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.common.randomness import uniforms
from pipeline.common.system import to_device, usable_cores
from pipeline.data.bad_images import bad_image_message
from pipeline.data.splits import Split
from pipeline.images.augment import cropped_on_cpu
from pipeline.images.crop import FIT, NUM_FIT_DRAWS, fit_for_eval, fit_for_training, shrink_of_part
from pipeline.images.decode import GREY_MAX, BadImage, decode_pixels
from pipeline.images.preprocessing import Preprocessing, resized_side
from pipeline.loaders.decoded_cache import resident_images
from pipeline.loaders.workers import CopyAhead, WorkerLoader, results


class FittedImages(torch.utils.data.Dataset):
    """Decodes images and fits them to one size, in worker processes or once for each image in the device loader.

    shape: of an image, (C, S, S). shown: whether this process shows a progress bar and warnings while it decodes a split.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: str, seed: int, shown: bool = True):
        self.split, self.preprocessing, self.augment, self.seed, self.shown = split, preprocessing, augment, seed, shown
        self.shape = (preprocessing.channels, preprocessing.fitted_size, preprocessing.fitted_size)
        self.is_cropped = cropped_on_cpu(preprocessing, augment)

    def __getitem__(self, address: tuple[int, int]) -> Tensor:
        epoch, row = address
        return self.__getitems__((epoch, np.array([row])))[0]

    def __getitems__(self, addresses: tuple[int, np.ndarray]) -> Tensor:
        """The images of these rows in an epoch; uint8 [B, C, S, S]. Raises BadImage.

        rows: those of the split, with its length added for each repetition, as in balanced_order.
        """
        epoch, rows = addresses
        batch = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        draws = uniforms(rows, NUM_FIT_DRAWS, self.seed, epoch, FIT)
        for place, row in enumerate((rows % len(self.split)).tolist()):
            batch[place] = self.fit(row, draws[place])
        return batch

    def fit(self, row: int, draws: np.ndarray) -> Tensor:
        """One image; uint8 [C, S, S]. draws: [NUM_FIT_DRAWS], they determine the random crop of a photo in training.

        Raises BadImage.
        """

        def shrink(width: int, height: int) -> int:
            return shrink_of_part(width, height, self.preprocessing, draws)

        try:
            encoded = self.split.encoded(row)
            channels, grey_max = self.preprocessing.channels, self.preprocessing.grey_max
            pixels = decode_pixels(encoded, channels, shrink if self.is_cropped else None, grey_max)
        except BadImage as error:
            raise BadImage(
                f"{bad_image_message(self.split, row, error)} Repair or remove it, or skip such images in a new run with "
                "--on_bad_image skip."
            ) from error
        if self.is_cropped:
            return fit_for_training(pixels, self.preprocessing, draws)
        return fit_for_eval(pixels, self.preprocessing)


class WorkerImages:
    """Decodes and fits the images of each batch in worker processes, or in this process if num_workers is 0."""

    def __init__(self, images: FittedImages, num_workers: int, device: torch.device):
        self.addresses: list[Any] = []  # epoch and rows of each batch
        self.copied_ahead = CopyAhead(device)
        # The batch sampler is a list that each epoch refills, so that the workers persist between epochs.
        self.loader = WorkerLoader(images, num_workers, device, batch_sampler=self.addresses)
        self.batches_ahead = num_workers * (self.loader.prefetch_factor or 0)

    def load(self) -> None:
        """Does nothing: images are read per batch."""

    def batches(self, epoch: int, rows_of_batches: list[np.ndarray]) -> Iterator[Tensor]:
        self.addresses[:] = [(epoch, rows) for rows in rows_of_batches]
        yield from self.copied_ahead(results(self.loader))


class DeviceImages:
    """Decodes the whole split once and keeps it in device memory as uint8. A batch is an index_select.

    load() decodes it, or else the first batch. On a CPU, the images stay in the memory-mapped cache file, if there is one.
    """

    batches_ahead = 0

    def __init__(self, images: FittedImages, device: torch.device, num_threads: int):
        assert not images.is_cropped, "photos that are cropped in each epoch need a kept_size to stay on the device"
        self.fitted, self.device, self.num_threads = images, device, num_threads
        self.images: Tensor | None = None  # uint8 [M, C, S, S]
        self.places = np.arange(len(images.split))  # the index of each row's image

    @property
    def num_bytes(self) -> int:
        """The memory of the images on the device, in bytes."""
        return len(self.places) * math.prod(self.fitted.shape)

    def load(self) -> None:
        """Decodes the images or maps the cache file. Raises BadImage."""
        if self.images is None:
            with torch.inference_mode(False):  # an evaluation may load images that training uses later
                self.images, self.places = self._resident()

    def _resident(self) -> tuple[Tensor, np.ndarray]:
        fitted, no_draws = self.fitted, np.zeros(NUM_FIT_DRAWS)
        whole = FittedImages(fitted.split.whole_table(), fitted.preprocessing, fitted.augment, fitted.seed)
        images, places = resident_images(
            fitted.split,
            fitted.shape,
            edition(fitted.preprocessing),
            lambda row: whole.fit(row, no_draws),
            self.num_threads,
            fitted.shown,
        )
        if self.device.type == "cpu":
            return images, places
        if len(places) < len(images):
            images = images.index_select(0, torch.from_numpy(places))
        return images.to(self.device), np.arange(len(places))

    def batches(self, epoch: int, rows_of_batches: list[np.ndarray]) -> Iterator[Tensor]:
        self.load()
        assert self.images is not None
        for rows in rows_of_batches:
            places = to_device(torch.from_numpy(self.places[rows % len(self.places)]), self.device)
            yield self.images.index_select(0, places)


def edition(preprocessing: Preprocessing) -> str:
    """Everything besides the encoded image and the shape on which the result of fit_for_eval depends."""
    import PIL

    versions = f"Pillow {PIL.__version__}, torch {torch.__version__}"
    if preprocessing.grey_max != GREY_MAX:
        versions += f", grey up to {preprocessing.grey_max}"
    if preprocessing.source_size:
        return versions
    side = preprocessing.kept_size or resized_side(preprocessing)
    return f"short side {side}, {preprocessing.interpolation}, {versions}"


def make_source(images: FittedImages, kind: str, num_workers: int, device: torch.device) -> WorkerImages | DeviceImages:
    if kind == "device":
        return DeviceImages(images, device, usable_cores())
    return WorkerImages(images, num_workers, device)
