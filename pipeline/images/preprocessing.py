"""How an image becomes the model's input: sizes, channels, statistics and filter."""

import math
from dataclasses import dataclass

from pipeline.common.suggestions import check_known

INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}  # timm's names to torch's

KEPT_SHARE = 0.875  # of the side of a photo that is kept on the device is its model's image_size


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
        check_known("interpolation", self.interpolation, INTERPOLATIONS)
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


def resized_side(preprocessing: Preprocessing) -> int:
    """The short side of an image before evaluation takes its centre, in pixels."""
    return int(preprocessing.image_size / preprocessing.crop_pct)
