"""Turns batches of uint8 images on the device into model input: augments, resizes and normalises."""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.common.randomness import uniforms
from pipeline.common.suggestions import check_known
from pipeline.common.system import to_device
from pipeline.images import randaugment
from pipeline.images.crop import FIT, NUM_BOX_DRAWS, NUM_FIT_DRAWS, NUM_TRIES, random_part
from pipeline.images.preprocessing import INTERPOLATIONS, Preprocessing, resized_side

# The purpose in the address of a draw. pipeline.loaders.mixing uses 2004 to 2006.
CROP_AND_FLIP, OPERATIONS, ERASE, FIRST_FLIP = 2001, 2002, 2003, 2007

ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # shares of the image; width / height
SMALLEST_MOVED = 16


@dataclass(frozen=True)
class Augment:
    """A row of AUGMENTS: whether images are cropped and flipped, and the policy of the operations that follow."""

    crop_and_flip: bool = True
    policy: randaugment.Policy | None = None


AUGMENTS = {
    "none": Augment(crop_and_flip=False),
    "light": Augment(),
    "randaugment": Augment(policy=randaugment.RANDAUGMENT),
    "trivialaugment": Augment(policy=randaugment.TRIVIALAUGMENT),
}


def cropped_on_cpu(preprocessing: Preprocessing, augment: str) -> bool:
    """Whether training crops images on the CPU: photos, unless they are kept larger and cropped on the device."""
    return AUGMENTS[augment].crop_and_flip and not (preprocessing.source_size or preprocessing.kept_size)


class BatchTransform:
    """Turns batches of uint8 images on a device into model input, with augmentation for training.

    The augmentation of an image depends only on the seed, the epoch and its sample number, not on its batch or loader.
    flip: whether a mirrored image keeps its label (a digit does not); alternate mirrors each image in every second epoch.
    random_erasing: the probability of erasing a rectangle (https://arxiv.org/abs/1708.04896), in addition to any augment.
    Raises ValueError for an unknown augment or an invalid probability.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        device: torch.device | str,
        augment: str = "light",
        flip: bool | Literal["alternate"],
        random_erasing: float = 0.0,
        seed: int,
        channels_last: bool = False,
    ) -> None:
        check_known("augment", augment, AUGMENTS)
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"random_erasing is {random_erasing}; it is a probability, from 0 to 1.")
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.augment = AUGMENTS[augment]
        self.flip = flip
        self.random_erasing = random_erasing
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        self.scale = self._on_device((1 / (255 * std)).astype(np.float32))[:, None, None]
        self.shift = self._on_device((-mean / std).astype(np.float32))[:, None, None]

    def train(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Augments and normalises; float32 [B, channels, image_size, image_size].

        images: uint8 [B, C, S, S] on the device, C is 1 or that of the model; samples: int64 [B], their numbers in the split.
        """
        if self.preprocessing.kept_size:
            draws = uniforms(samples, NUM_FIT_DRAWS, self.seed, epoch, FIT)
            images = resized_parts(images, random_parts(draws, images.shape[-1]), self.preprocessing.image_size)
        if self.augment.crop_and_flip:
            images = self._crop_and_flip(images, samples, epoch)
        if self.augment.policy is not None:
            draws = uniforms(samples, self.augment.policy.num_draws, self.seed, epoch, OPERATIONS)
            images = randaugment.augment(images, draws, self.augment.policy)
        images = self._normalise(self._resize(images, self.preprocessing.image_size))
        return self._erase(images, samples, epoch) if self.random_erasing else images

    def eval(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises, after a resize and centre crop of small images. Shapes and types as in train."""
        if self.preprocessing.source_size:
            size, side = self.preprocessing.image_size, resized_side(self.preprocessing)
            first = round((side - size) / 2)
            images = self._resize(images, side)[:, :, first : first + size, first : first + size]
        return self._normalise(images)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self.device)

    def _crop_and_flip(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Shifts small images by up to an eighth of their side, padded with black; mirrors half of all images if allowed.

        Images below SMALLEST_MOVED are not shifted: a pixel of an 8x8 digit is the width of a stroke.
        """
        draws = uniforms(samples, 3, self.seed, epoch, CROP_AND_FLIP)
        mirrored = self._mirrored(samples, epoch, draws[:, 0])
        size = self.preprocessing.source_size
        if size is not None and size >= SMALLEST_MOVED:
            padding = size // 8
            top, left = (draws[:, 1:] * (2 * padding + 1)).astype(np.int64).T
            # the mirror image of a window is a window of the mirror image
            images = self._windows(images, padding, top, np.where(mirrored, 2 * padding - left, left))
        if not self.flip:
            return images
        rows = self._on_device(np.arange(len(samples)) + len(samples) * mirrored)
        return torch.cat([images, images.flip(3)]).index_select(0, rows)

    def _mirrored(self, samples: np.ndarray, epoch: int, draws: np.ndarray) -> np.ndarray:
        """Which images to mirror in this epoch; bool [B]. draws: float64 [B] from [0, 1), used by random mirroring.

        alternate mirrors half of the images in epoch 0 and the other half in epoch 1, and so on in turn. Two epochs then show
        both forms of each image; random mirroring repeats a form half of the time (https://arxiv.org/abs/2404.00498).
        """
        if self.flip == "alternate":
            first = uniforms(samples, 1, self.seed, FIRST_FLIP)[:, 0] < 0.5
            return first ^ (epoch % 2 == 1)
        return (draws < 0.5) & self.flip

    def _windows(self, images: torch.Tensor, padding: int, top: np.ndarray, left: np.ndarray) -> torch.Tensor:
        """Pads each image and crops it at (top, left) to its original size; uint8, in the shape of images."""
        channels, size = images.shape[1], images.shape[-1]
        side = size + 2 * padding
        first = np.arange(len(images)) * (channels * side**2) + top * side + left
        starts = self._on_device(first)[:, None] + line_starts(channels, size, side, self.device)
        # a line is `size` contiguous values: copying lines is five times faster than copying pixels
        lines = F.pad(images, (padding,) * 4).flatten().unfold(0, size, 1)
        return lines.index_select(0, starts.flatten()).view(-1, channels, size, size)

    def _resize(self, images: torch.Tensor, side: int) -> torch.Tensor:
        if images.shape[-1] == side:
            return images
        mode = INTERPOLATIONS[self.preprocessing.interpolation]
        return F.interpolate(images.float(), side, mode=mode, antialias=mode != "nearest-exact").clamp_(0, 255)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(image / 255 - mean) / std; expands grey images to the channels of the model."""
        # a conversion to float and two in-place operations are faster than addcmul of uint8; channels_last is cheapest last
        pixels = images.float().expand(-1, self.preprocessing.channels, -1, -1)
        pixels = pixels.mul_(self.scale) if images.shape[1] == pixels.shape[1] else pixels * self.scale
        return pixels.add_(self.shift).contiguous(memory_format=self.memory_format)

    def _erase(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        draws = uniforms(samples, 1 + NUM_BOX_DRAWS, self.seed, epoch, ERASE)
        boxes = erased_boxes(draws[:, 1:], images.shape[-1])
        boxes[draws[:, 0] >= self.random_erasing] = 0
        return images.masked_fill_(inside(self._on_device(boxes), images.shape[-1]), 0.0)


@functools.lru_cache
def line_starts(channels: int, size: int, side: int, device: torch.device) -> torch.Tensor:
    """The offsets of the lines of the first window in a padded image of that side; int64 [channels * size]."""
    channel, line = (torch.arange(count, device=device) for count in (channels, size))
    return (channel[:, None] * side**2 + line * side).flatten()


def random_parts(draws: np.ndarray, side: int) -> np.ndarray:
    """random_part of squares of that side; int64 [B, 4]. draws: [B, NUM_BOX_DRAWS] from [0, 1)."""
    return np.array([random_part(side, side, row) for row in draws], np.int64).reshape(-1, 4)


def resized_parts(images: torch.Tensor, parts: np.ndarray, size: int) -> torch.Tensor:
    """Crops each image to its part and resizes it; uint8 [B, C, size, size]. images: uint8 [B, C, S, S].

    parts: int64 [B, 4], left, top, right, bottom. Bilinear without antialiasing, because the scale is at most S / size.
    """
    corners = to_device(torch.from_numpy(parts.astype(np.float32)), images.device)
    left, top, right, bottom = corners[:, :, None].unbind(1)
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    scale = 2 / images.shape[-1]
    x, y = (left + (right - left) * centres) * scale - 1, (top + (bottom - top) * centres) * scale - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().to(torch.uint8)


def erased_boxes(draws: np.ndarray, size: int) -> np.ndarray:
    """The rectangle to erase in each image (left, top, right, bottom), all 0 if no try fits; int64 [B, 4].

    draws: [B, NUM_BOX_DRAWS] from [0, 1). A rectangle has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3.
    """
    area = size * size * (ERASED_AREA[0] + draws[:, 2 : 2 + NUM_TRIES] * (ERASED_AREA[1] - ERASED_AREA[0]))
    ratio = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** draws[:, 2 + NUM_TRIES :]
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths < size) & (heights < size)
    first = fits.argmax(axis=1)[:, None]
    width, height = (np.take_along_axis(sides, first, axis=1)[:, 0] for sides in (widths, heights))
    left, top = np.floor(draws[:, 0] * (size - width + 1)), np.floor(draws[:, 1] * (size - height + 1))
    boxes = np.stack([left, top, left + width, top + height], axis=1).astype(np.int64)
    return boxes * fits.any(axis=1, keepdims=True)


def inside(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The mask of the pixels in each image's box; bool [B, 1, size, size]. boxes: int64 [B, 4], left, top, right, bottom."""
    left, top, right, bottom = boxes[:, :, None, None, None].unbind(1)
    x = torch.arange(size, device=boxes.device)
    y = x[:, None]
    return ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))
