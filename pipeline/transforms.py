"""Images become model input: each is fitted to size on the CPU, batches are augmented and normalised on the device."""

import difflib
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline import randaugment
from pipeline.images import pixels_of
from pipeline.randomness import uniforms

# What a draw is for: the last part of its address.
FIT = 2
CROP_AND_FLIP, OPERATIONS, ERASE = 2001, 2002, 2003  # pipeline.mixing has 2004 to 2006

INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}  # timm's names to torch's

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # shares of the image; width / height
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
SMALLEST_MOVED = 16
LARGEST_RATIO = 16  # of an image's sides, in evaluation
KEPT_SHARE = 0.875  # of the side of a photo that is kept on the device is its model's image_size
NUM_TRIES = 10  # a drawn rectangle that does not fit the image is drawn again
NUM_BOX_DRAWS = NUM_FIT_DRAWS = 2 + 2 * NUM_TRIES  # place, then the areas and the ratios of the tries


def _check_known(what: str, name: str, known: dict) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}.")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    mean and std are in units of 0..1, one value for each channel that the model sees. Evaluation resizes the short side
    to image_size / crop_pct and takes the centre. source_size is set for sets of small images of one size and kind:
    they keep that size until they are on the device; None means photos, each fitted to image_size on the CPU, or to
    the square of side kept_size from which the device cuts its random parts.
    Raises ValueError for values that do not belong together.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    source_size: int | None = None
    kept_size: int | None = None

    def __post_init__(self) -> None:
        _check_known("interpolation", self.interpolation, INTERPOLATIONS)
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; a model sees 1 (grey) or 3 (colour).")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must each have {self.channels} values, as channels.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every value must be above 0.")
        if min(self.image_size, self.source_size or 1) < 1:
            raise ValueError(f"image_size {self.image_size} and source_size {self.source_size} must be 1 or more.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1.")

    @property
    def fitted_size(self) -> int:
        """The side of an image as it travels to the device."""
        return self.source_size or self.kept_size or self.image_size


def kept_side(preprocessing: Preprocessing) -> int:
    """The side of the square at which a photo is kept for training on the device, in pixels: 256 for 224."""
    return math.ceil(preprocessing.image_size / KEPT_SHARE)


@dataclass(frozen=True)
class Augment:
    """A row of AUGMENTS: whether images are cropped and flipped, and which operations follow."""

    crop_and_flip: bool = True
    policy: randaugment.Policy | None = None


AUGMENTS = {
    "none": Augment(crop_and_flip=False),
    "light": Augment(),
    "randaugment": Augment(policy=randaugment.RANDAUGMENT),
    "trivialaugment": Augment(policy=randaugment.TRIVIALAUGMENT),
}


def resized_side(preprocessing: Preprocessing) -> int:
    """The short side of an image before evaluation takes its centre, in pixels."""
    return int(preprocessing.image_size / preprocessing.crop_pct)


def fit_for_eval(image: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """The image's centre at the size that travels to the device; uint8 [C, S, S], S = preprocessing.fitted_size.

    image: mode "L" or "RGB", or uint8 [C, H, W]. The short side is resized and the centre cut out; of small images and
    of photos that are kept larger, BatchTransform does that later. A photo has the model's channels, since photos of
    one set may be grey or in colour; a grey image of a small set keeps one channel until it is on the device.
    """
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    is_final = size == preprocessing.image_size and not preprocessing.source_size
    short = resized_side(preprocessing) if is_final else size
    height, width = pixels.shape[1:]
    if height == width == short == size:
        return pixels.contiguous()
    if max(height, width) > LARGEST_RATIO * min(height, width):  # else a strip would grow huge to be cut at its centre
        height, width = (min(side, LARGEST_RATIO * min(height, width)) for side in (height, width))
        pixels = _centre(pixels, height, width)
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    return _centre(_resize_pixels(pixels, high, wide, preprocessing), size, size).contiguous()


def fit_for_training(
    image: Image.Image | torch.Tensor, preprocessing: Preprocessing, augment: str, draws: np.ndarray
) -> torch.Tensor:
    """A random part of a photo, resized; uint8 [C, S, S]. As fit_for_eval where the device crops, or augment is 'none'.

    draws: float64 [NUM_FIT_DRAWS] from [0, 1). The part covers 8 to 100 % of the area with a side ratio of 3:4 to 4:3
    (https://arxiv.org/abs/1409.4842).
    """
    if not cropped_on_cpu(preprocessing, augment):
        return fit_for_eval(image, preprocessing)
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    left, top, right, bottom = random_part(pixels.shape[2], pixels.shape[1], draws)
    return _resize_pixels(pixels[:, top:bottom, left:right], size, size, preprocessing).contiguous()


def cropped_on_cpu(preprocessing: Preprocessing, augment: str) -> bool:
    """Whether fit_for_training takes random parts: of photos, unless they are kept larger and cropped on the device."""
    return preprocessing.fitted_size == preprocessing.image_size and (
        preprocessing.source_size is None and AUGMENTS[augment].crop_and_flip
    )


def shrink_of_part(width: int, height: int, preprocessing: Preprocessing, draws: np.ndarray) -> int:
    """1, 2, 4 or 8: how much smaller a JPEG may be decoded so that its random part still has the fitted size."""
    left, top, right, bottom = random_part(width, height, draws)
    ratio = min(right - left, bottom - top) / preprocessing.fitted_size
    return next(factor for factor in (8, 4, 2, 1) if ratio >= factor or factor == 1)


def random_part(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image, in pixels. draws: [NUM_BOX_DRAWS] from [0, 1).

    If no try fits, the largest centre with an allowed side ratio.
    """
    x_draw, y_draw, *tries = draws.tolist()
    for area_draw, ratio_draw in zip(tries[:NUM_TRIES], tries[NUM_TRIES:], strict=True):
        area = width * height * (CROP_AREA[0] + area_draw * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio_draw
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x_draw * (width - wide + 1)), int(y_draw * (height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _pixels(image: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image
    if preprocessing.channels == 1 and image.mode != "L":
        image = image.convert("L")
    elif preprocessing.channels == 3 and image.mode == "L" and not preprocessing.source_size:
        image = image.convert("RGB")
    return pixels_of(image)


def _centre(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
    return pixels[:, top : top + height, left : left + width]


def _resize_pixels(pixels: torch.Tensor, height: int, width: int, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 [C, height, width], antialiased; within one level of 255 of Pillow's resize, in a third of the time.

    The odd image of another size in a set of small ones does not depend on the model: it gets its filter on the device.
    """
    if pixels.shape[1:] == (height, width):
        return pixels
    mode = INTERPOLATIONS["bicubic" if preprocessing.source_size else preprocessing.interpolation]
    return F.interpolate(pixels[None], (height, width), mode=mode, antialias=mode != "nearest-exact")[0]


class BatchTransform:
    """Turns batches of uint8 images on a device into model input: augmented for training, or as they are.

    What happens to an image depends on the seed, the epoch and its sample number alone: not on its batch or loader.
    flip says whether a mirrored image keeps its label (a digit does not); random_erasing is the probability of a
    blanked rectangle (https://arxiv.org/abs/1708.04896), on top of any augment. Raises ValueError for an
    unknown augment or a wrong probability.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        device: torch.device | str,
        augment: str = "light",
        flip: bool,
        random_erasing: float = 0.0,
        seed: int,
        channels_last: bool = False,
    ) -> None:
        _check_known("augment", augment, AUGMENTS)
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
        """Augmented and normalised; float32 [B, channels, image_size, image_size].

        images: uint8 [B, C, S, S] on the device, C 1 or the model's; samples: int64 [B], their numbers in the set.
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
        """Normalised, small images resized and cut to their centre first; float32 as from train, images as for it."""
        if self.preprocessing.source_size:
            size, side = self.preprocessing.image_size, resized_side(self.preprocessing)
            first = round((side - size) / 2)
            images = self._resize(images, side)[:, :, first : first + size, first : first + size]
        return self._normalise(images)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _crop_and_flip(self, images: torch.Tensor, samples: np.ndarray, epoch: int) -> torch.Tensor:
        """Small images moved by up to an eighth of their side, black coming in; half of all mirrored if allowed.

        The smallest are not moved: a pixel of an 8x8 digit is the width of a stroke.
        """
        draws = uniforms(samples, 3, self.seed, epoch, CROP_AND_FLIP)
        mirrored = (draws[:, 0] < 0.5) & self.flip
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

    def _windows(self, images: torch.Tensor, padding: int, top: np.ndarray, left: np.ndarray) -> torch.Tensor:
        """Of each padded image the part of the image's own size that begins at top and left; uint8, as images."""
        channels, size = images.shape[1], images.shape[-1]
        side = size + 2 * padding
        first = np.arange(len(images)) * (channels * side**2) + top * side + left
        starts = self._on_device(first)[:, None] + line_starts(channels, size, side, self.device)
        # a line is `size` neighbours in memory, from anywhere: copied at once, five times faster than by pixel
        lines = F.pad(images, (padding,) * 4).flatten().unfold(0, size, 1)
        return lines.index_select(0, starts.flatten()).view(-1, channels, size, size)

    def _resize(self, images: torch.Tensor, side: int) -> torch.Tensor:
        if images.shape[-1] == side:
            return images
        mode = INTERPOLATIONS[self.preprocessing.interpolation]
        return F.interpolate(images.float(), side, mode=mode, antialias=mode != "nearest-exact").clamp_(0, 255)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(image / 255 - mean) / std; a grey image gets the model's channels on the way."""
        # one pass to float and two in place are faster than an addcmul of uint8; channels_last is cheapest after them
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
    """Where the lines of an image's first window begin in a padded image of that side; int64 [channels * size]."""
    channel, line = (torch.arange(count, device=device) for count in (channels, size))
    return (channel[:, None] * side**2 + line * side).flatten()


def random_parts(draws: np.ndarray, side: int) -> np.ndarray:
    """What random_part finds in squares of that side; int64 [B, 4]. draws: [B, NUM_BOX_DRAWS] from [0, 1)."""
    return np.array([random_part(side, side, row) for row in draws], np.int64).reshape(-1, 4)


def resized_parts(images: torch.Tensor, parts: np.ndarray, size: int) -> torch.Tensor:
    """Of each image its part, resized to size x size; uint8 [B, C, size, size]. images: uint8 [B, C, S, S].

    parts: int64 [B, 4], left, top, right, bottom. Bilinear, without antialiasing: a part is at most S / size larger.
    """
    corners = torch.from_numpy(parts.astype(np.float32)).to(images.device, non_blocking=True)
    left, top, right, bottom = corners[:, :, None].unbind(1)
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    scale = 2 / images.shape[-1]
    x, y = (left + (right - left) * centres) * scale - 1, (top + (bottom - top) * centres) * scale - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().to(torch.uint8)


def erased_boxes(draws: np.ndarray, size: int) -> np.ndarray:
    """Left, top, right and bottom of each image's rectangle to erase, all 0 if no try fits; int64 [B, 4].

    draws: [B, NUM_BOX_DRAWS] from [0, 1); 2 to 33 % of the area, side ratio 0.3 to 3.3.
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
    """Which pixels lie in each image's box; bool [B, 1, size, size]. boxes: int64 [B, 4], left, top, right, bottom."""
    left, top, right, bottom = boxes[:, :, None, None, None].unbind(1)
    x = torch.arange(size, device=boxes.device)
    y = x[:, None]
    return ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))
