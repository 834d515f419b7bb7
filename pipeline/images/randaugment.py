"""RandAugment and TrivialAugment of a whole batch on its device. Every image has its own operation and magnitude."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.common.system import to_device

NUM_BINS = 31
DRAWS_PER_OPERATION = 3  # which operation, which magnitude, which sign
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Operation:
    """An operation of a policy. Its magnitudes are NUM_BINS equal steps from low to high; half are negated if signed.

    Units: shears are slopes; translations are pixels (fractions of the side if of_side); rotations are degrees
    counterclockwise. Colour operations extrapolate the image by that fraction away from its colourless, flat or blurred version
    (towards it if negated). Posterize is the number of bits that are kept. Solarize inverts values from that fraction of white.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    of_side: bool = False


@dataclass(frozen=True)
class Policy:
    """The operations to choose from, their number per image, and the bin of their magnitudes (None: drawn per image)."""

    operations: tuple[Operation, ...]
    operations_per_image: int
    magnitude_bin: int | None

    @property
    def num_draws(self) -> int:
        """The number of draws per image."""
        return DRAWS_PER_OPERATION * self.operations_per_image


RANDAUGMENT = Policy(  # https://arxiv.org/abs/1909.13719
    operations=(
        Operation("identity"),
        Operation("shear_x", 0.0, 0.3, signed=True),
        Operation("shear_y", 0.0, 0.3, signed=True),
        Operation("translate_x", 0.0, 150 / 331, signed=True, of_side=True),
        Operation("translate_y", 0.0, 150 / 331, signed=True, of_side=True),
        Operation("rotate", 0.0, 30.0, signed=True),
        Operation("brightness", 0.0, 0.9, signed=True),
        Operation("color", 0.0, 0.9, signed=True),
        Operation("contrast", 0.0, 0.9, signed=True),
        Operation("sharpness", 0.0, 0.9, signed=True),
        Operation("posterize", 8.0, 4.0),
        Operation("solarize", 1.0, 0.0),
        Operation("autocontrast"),
        Operation("equalize"),
    ),
    operations_per_image=2,
    magnitude_bin=9,
)

TRIVIALAUGMENT = Policy(  # the wide search space of https://arxiv.org/abs/2103.10158
    operations=(
        Operation("identity"),
        Operation("shear_x", 0.0, 0.99, signed=True),
        Operation("shear_y", 0.0, 0.99, signed=True),
        Operation("translate_x", 0.0, 32.0, signed=True),
        Operation("translate_y", 0.0, 32.0, signed=True),
        Operation("rotate", 0.0, 135.0, signed=True),
        Operation("brightness", 0.0, 0.99, signed=True),
        Operation("color", 0.0, 0.99, signed=True),
        Operation("contrast", 0.0, 0.99, signed=True),
        Operation("sharpness", 0.0, 0.99, signed=True),
        Operation("posterize", 8.0, 2.0),
        Operation("solarize", 1.0, 0.0),
        Operation("autocontrast"),
        Operation("equalize"),
    ),
    operations_per_image=1,
    magnitude_bin=None,
)


def augment(images: torch.Tensor, draws: np.ndarray, policy: Policy) -> torch.Tensor:
    """Applies the drawn operations of each image in sequence; uint8 [B, C, S, S], a new tensor.

    images: uint8 [B, C, S, S], C 1 or 3; draws: [B, policy.num_draws] from [0, 1).
    """
    for first in range(0, policy.num_draws, DRAWS_PER_OPERATION):
        names, magnitudes = choose(draws[:, first : first + DRAWS_PER_OPERATION], policy, images.shape[-1])
        images = operate(images, names, magnitudes)
    return images


def choose(draws: np.ndarray, policy: Policy, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The operation and signed magnitude of each image; names str [B] and magnitudes float32 [B]. draws: [B, 3]."""
    choices = (draws[:, 0] * len(policy.operations)).astype(np.int64)
    bins = (draws[:, 1] * NUM_BINS).astype(np.int64) if policy.magnitude_bin is None else policy.magnitude_bin
    magnitudes = magnitude_bins(policy, side)[choices, bins]
    negated = np.array([operation.signed for operation in policy.operations])[choices] & (draws[:, 2] < 0.5)
    names = np.array([operation.name for operation in policy.operations])[choices]
    return names, np.where(negated, -magnitudes, magnitudes)


@cache
def magnitude_bins(policy: Policy, side: int) -> np.ndarray:
    """The possible magnitudes for an image of this side; float32 [operations, NUM_BINS]."""
    rows = []
    for operation in policy.operations:
        scale = side if operation.of_side else 1
        rows.append(torch.linspace(operation.low * scale, operation.high * scale, NUM_BINS))
    return torch.stack(rows).numpy()


def operate(images: torch.Tensor, names: np.ndarray, magnitudes: np.ndarray) -> torch.Tensor:
    """Applies to each image its operation; uint8 [B, C, S, S]. names: str [B]; magnitudes: float32 [B].

    Sorts the images by operation, so that each operation runs once for all of its images, and restores their order.
    """
    parameters = np.zeros((len(names), 6), np.float32)
    parameters[:, 0] = magnitudes
    kernel_names = names.copy()
    for name, matrix in MATRICES.items():
        rows = names == name
        parameters[rows] = matrix(magnitudes[rows], images.shape[-1])
        kernel_names[rows] = "affine"
    present, group_sizes = np.unique(kernel_names, return_counts=True)
    order = np.argsort(kernel_names, kind="stable")
    places = to_device(torch.from_numpy(np.stack([order, np.argsort(order)])), images.device)
    values = to_device(torch.from_numpy(parameters[order]), images.device)
    sizes = group_sizes.tolist()
    groups = zip(present.tolist(), images.index_select(0, places[0]).split(sizes), values.split(sizes), strict=True)
    return torch.cat([KERNELS[name](group, value) for name, group, value in groups]).index_select(0, places[1])


def _rows(count: int, *columns: float | np.ndarray) -> np.ndarray:
    return np.stack([np.broadcast_to(column, count) for column in columns], axis=1)


def _rotation(degrees: np.ndarray, side: int) -> np.ndarray:
    radians = np.deg2rad(degrees.astype(np.float64))
    cos, sin = np.cos(radians), np.sin(radians)
    return _rows(len(degrees), cos, -sin, 0, sin, cos, 0)


# The source of an output pixel: x_in = a x + b y + c, y_in = d x + e y + f, in pixels from the centre of the image.
# Shears keep the top left corner fixed, rotations the centre.
MATRICES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "shear_x": lambda slopes, side: _rows(len(slopes), 1, slopes, slopes * (side / 2), 0, 1, 0),
    "shear_y": lambda slopes, side: _rows(len(slopes), 1, 0, 0, slopes, 1, slopes * (side / 2)),
    "translate_x": lambda pixels, side: _rows(len(pixels), 1, 0, -np.trunc(pixels), 0, 1, 0),
    "translate_y": lambda pixels, side: _rows(len(pixels), 1, 0, 0, 0, 1, -np.trunc(pixels)),
    "rotate": _rotation,
}


def _affine(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Bilinear sampling with affine matrices, black outside the image; matrices: float32 [N, 6]."""
    side = images.shape[-1]
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    x = torch.arange(side, dtype=torch.float32, device=images.device) - (side - 1) / 2
    y = x[:, None]
    # elementwise, no matmul: a matmul may round differently in another batch
    grid = torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1) / (side / 2)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.round_().to(torch.uint8)


def _magnitude(parameters: torch.Tensor) -> torch.Tensor:
    return parameters[:, 0, None, None, None]


def _blend(images: torch.Tensor, dull: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """images + magnitude * (images - dull), clipped to 0..255; uint8. dull: float32, broadcastable to the images."""
    magnitude = _magnitude(parameters)
    return torch.addcmul(images * (1 + magnitude), dull, -magnitude).clamp_(0, 255).to(torch.uint8)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """The grey version in integer levels; float32 [N, 1, S, S]."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).floor_()


def _brightness(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return (images * (1 + _magnitude(parameters))).clamp_(0, 255).to(torch.uint8)


def _color(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return images if images.shape[1] == 1 else _blend(images, _luma(images), parameters)


def _contrast(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    # an integer sum, because a float sum may round differently in another batch
    total = _luma(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(images, total.float() / (images.shape[-1] * images.shape[-2]), parameters)


def _sharpness(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Blends with a 3x3 blur (centre weight 5, others 1, divided by 13); border pixels are unchanged."""
    if images.shape[-1] < 3:
        return images
    pixels = images.float()
    centre = pixels[:, :, 1:-1, 1:-1]
    columns = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    box = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    blurred = (box + 4 * centre).div_(13).round_()
    pixels[:, :, 1:-1, 1:-1] = torch.addcmul(centre, blurred - centre, -_magnitude(parameters))
    return pixels.clamp_(0, 255).to(torch.uint8)


def _posterize(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    dropped_bits = (8 - _magnitude(parameters).round()).to(torch.uint8)
    return images >> dropped_bits << dropped_bits


def _solarize(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 255 * _magnitude(parameters), 255 - images, images)


def _autocontrast(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Stretches each channel of each image to 0..255; a constant channel is unchanged."""
    darkest, brightest = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - darkest) / ((brightest - darkest).float() * (1 / 255))
    return torch.where(brightest > darkest, stretched.clamp_(0, 255).to(torch.uint8), images)


def _equalize(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Equalizes the histogram of each channel, with the rule of Pillow's ImageOps.equalize.

    Level k becomes (step // 2 + pixels below k) // step, step = (pixels - pixels of the brightest level) // 255;
    a channel with step 0 is unchanged.
    """
    levels = images.flatten(2).long()
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(2, levels).view_as(images)


# images: uint8 [N, C, S, S]; parameters: float32 [N, 6], the magnitude in column 0 or an affine matrix.
KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda images, parameters: images,
    "affine": _affine,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
