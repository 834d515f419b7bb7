"""Images become model input: each is fitted to size on the CPU, batches are augmented and normalised on the device."""

import difflib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline import randaugment
from pipeline.metrics import IGNORED
from pipeline.randomness import address, uniforms

# What a draw is for: the last part of its address.
CROP_AND_FLIP, OPERATIONS, ERASE, MIX, MIXUP, CUTMIX = range(2001, 2007)

INTERPOLATIONS = {  # Pillow's filter on the CPU, torch's mode on the device
    "nearest": (Image.Resampling.NEAREST, "nearest-exact"),
    "bilinear": (Image.Resampling.BILINEAR, "bilinear"),
    "bicubic": (Image.Resampling.BICUBIC, "bicubic"),
}

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # shares of the image; width / height
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
SMALLEST_MOVED = 16
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
    they keep that size until they are on the device; None means photos, each fitted to image_size on the CPU.
    Raises ValueError for values that do not belong together.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    source_size: int | None = None

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
        return self.source_size or self.image_size


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


def fit_for_eval(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """The image's centre at the size that travels to the device; uint8 [C, S, S], S = preprocessing.fitted_size.

    A photo has the model's channels, since photos of one set may be grey or in colour; a grey image of a small set
    keeps one channel until it is on the device. The centre is cut and resized in one go: within one level of 255 of a
    resize of the short side and a crop after it, in half the time. The centre of small images is cut later, by
    BatchTransform.eval.
    """
    size = preprocessing.fitted_size
    short = size if preprocessing.source_size else resized_side(preprocessing)
    width, height = image.size
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    x_scale, y_scale = width / wide, height / high
    right, bottom = min((left + size) * x_scale, width), min((top + size) * y_scale, height)
    return _to_tensor(image, (left * x_scale, top * y_scale, right, bottom), None, preprocessing)


def fit_for_training(image: Image.Image, preprocessing: Preprocessing, augment: str, draws: np.ndarray) -> torch.Tensor:
    """A random part of a photo, resized; uint8 [C, S, S]. As fit_for_eval for small images or augment 'none'.

    draws: float64 [NUM_FIT_DRAWS] from [0, 1). The part covers 8 to 100 % of the area with a side ratio of 3:4 to 4:3
    (https://arxiv.org/abs/1409.4842).
    """
    if preprocessing.source_size or not AUGMENTS[augment].crop_and_flip:
        return fit_for_eval(image, preprocessing)
    # far larger parts are first averaged down by whole factors: much faster and no worse to look at
    return _to_tensor(image, random_part(*image.size, draws), 2.0, preprocessing)


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


def _to_tensor(
    image: Image.Image, box: tuple[float, float, float, float], gap: float | None, preprocessing: Preprocessing
) -> torch.Tensor:
    size = (preprocessing.fitted_size, preprocessing.fitted_size)
    if image.size != size or box != (0, 0, *size):
        image = image.resize(size, INTERPOLATIONS[preprocessing.interpolation][0], box, gap)
    if preprocessing.channels == 1 and image.mode != "L":
        image = image.convert("L")
    elif preprocessing.channels == 3 and image.mode == "L" and not preprocessing.source_size:
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return torch.from_numpy(pixels[None].copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


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
        rows = np.arange(len(samples))
        if self.flip:
            images = torch.cat([images, images.flip(3)])
            rows += len(samples) * (draws[:, 0] < 0.5)
        size = self.preprocessing.source_size
        if size is None or size < SMALLEST_MOVED:
            return images.index_select(0, self._on_device(rows)) if self.flip else images
        padding = size // 8
        offsets = (draws[:, 1:] * (2 * padding + 1)).astype(np.int64)
        row, top, left = self._on_device(np.stack([rows, *offsets.T]))[:, :, None, None]
        channels, side = images.shape[1], size + 2 * padding
        channel, line = (torch.arange(count, device=self.device) for count in (channels, size))
        starts = ((row * channels + channel[:, None]) * side + top + line) * side + left  # int64 [B, C, S]
        # a line is `size` neighbours in memory, from anywhere: copied at once, five times faster than by pixel
        lines = F.pad(images, (padding,) * 4).flatten().unfold(0, size, 1)
        return lines.index_select(0, starts.flatten()).view(-1, channels, size, size)

    def _resize(self, images: torch.Tensor, side: int) -> torch.Tensor:
        if images.shape[-1] == side:
            return images
        mode = INTERPOLATIONS[self.preprocessing.interpolation][1]
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
        return images.masked_fill_(_inside(self._on_device(boxes), images.shape[-1]), 0.0)


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


def _inside(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixels lie in each image's box; bool [B, 1, size, size]. boxes: int64 [B, 4], left, top, right, bottom."""
    left, top, right, bottom = boxes[:, :, None, None, None].unbind(1)
    x = torch.arange(size, device=boxes.device)
    y = x[:, None]
    return ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    mixup: float,
    cutmix: float,
    num_classes: int,
    place: tuple[int, ...],
    first_position: int,
    global_batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours of the global batch mixed in pairs; images [B, C, S, S] and soft labels float32 [B, num_classes].

    images: float [B, C, S, S]; labels: int [B]. mixup (https://arxiv.org/abs/1710.09412) and cutmix
    (https://arxiv.org/abs/1905.04899) are the alphas of Beta(alpha, alpha), 0 for never; with both, each pair takes one
    or the other. Positions 2k and 2k + 1 of the global batch are a pair and share one draw, which depends on the place
    ((seed, step) or whatever names the global batch) alone: a part of the batch that begins at first_position gets
    exactly its slice of the whole. A sample whose partner is elsewhere, or that is or meets an IGNORED one, stays as it
    is; an ignored sample's soft labels are all zero. Raises ValueError for an alpha below 0.
    """
    if min(mixup, cutmix) < 0:
        raise ValueError(f"mixup is {mixup} and cutmix {cutmix}; both are alphas of a Beta distribution, 0 or more.")
    targets = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    if mixup == cutmix == 0:
        return images, targets
    here = np.arange(len(labels))
    positions = first_position + here
    partner_at = (positions ^ 1) - first_position
    partner_at = np.where((partner_at < 0) | (partner_at >= len(labels)), here, partner_at)
    draws = pair_draws((global_batch + 1) // 2, place, mixup=mixup, cutmix=cutmix, size=images.shape[-1])
    pixel_share, label_share, boxes = (values[positions // 2] for values in draws)
    own = np.where(partner_at == here, np.float32(1), np.stack([pixel_share, label_share]))
    arrays = (partner_at, boxes, own)
    partner, box, shares = (torch.from_numpy(array).to(images.device, non_blocking=True) for array in arrays)
    ignored = labels == IGNORED
    alone = ignored | ignored[partner]
    own_pixels, own_label = shares.masked_fill(alone, 1.0)[..., None]
    weights = own_pixels[..., None, None]
    if cutmix:
        weights = weights.masked_fill(_inside(box, images.shape[-1]) & ~alone[:, None, None, None], 0.0)
    weights = weights.to(images.dtype)
    mixed = (images * weights).add_(images.index_select(0, partner).mul_(1 - weights))
    return mixed, targets * own_label + targets[partner] * (1 - own_label)


def pair_draws(
    num_pairs: int, place: tuple[int, ...], *, mixup: float, cutmix: float, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair a sample's share of its own pixels outside the box, its share of its own label, and the box.

    Shares are float32 [num_pairs]; boxes int64 [num_pairs, 4], left, top, right, bottom, empty for mixup.
    """

    def shares(alpha: float, purpose: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(address(*place, purpose))).beta(alpha, alpha, num_pairs)

    choice, *centre = uniforms(np.arange(num_pairs), 3, *place, MIX).T
    cut = choice < (0.0 if not cutmix else 0.5 if mixup else 1.0)
    share = shares(mixup, MIXUP) if mixup else np.ones(num_pairs)
    boxes = np.zeros((num_pairs, 4), np.int64)
    if cutmix:
        half = (size * np.sqrt(1 - shares(cutmix, CUTMIX))).astype(np.int64) // 2
        x, y = (np.array(centre) * size).astype(np.int64)
        boxes = np.stack([x - half, y - half, x + half, y + half], axis=1).clip(0, size) * cut[:, None]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pixel_share = np.where(cut, 1.0, share)
    label_share = np.where(cut, 1 - area / size**2, share)  # the box may be cut off by the border: its true area counts
    return pixel_share.astype(np.float32), label_share.astype(np.float32), boxes
