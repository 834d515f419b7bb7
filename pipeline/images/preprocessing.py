"""The preprocessing of images: sizes, channels, statistics and filter."""

import math
from dataclasses import dataclass

from pipeline.common.suggestions import check_known
from pipeline.images.decode import GREY_MAX

INTERPOLATIONS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}  # timm's names to torch's

KEPT_SHARE = 0.875  # image_size as a fraction of the side of a photo that is kept on the device


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input.

    mean and std are in units of 0..1, one value per channel of the model. Evaluation resizes the short side to
    image_size / crop_pct and crops the centre. source_size is set for datasets of small images of one size, which keep that
    size until they are on the device. None means photos: each is fitted on the CPU to image_size, or to a square of side
    kept_size, from which the device takes its random crops. Raises ValueError for inconsistent values.
    grey_max: the largest value of 16-bit grey images, which becomes 255.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    source_size: int | None = None
    kept_size: int | None = None
    grey_max: int = GREY_MAX

    def __post_init__(self) -> None:
        check_known("interpolation", self.interpolation, INTERPOLATIONS)
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grey) or 3 (colour).")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must each have {self.channels} values, one per channel.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every value must be above 0.")
        if min(self.image_size, self.source_size or 1) < 1:
            raise ValueError(f"image_size {self.image_size} and source_size {self.source_size} must be 1 or more.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1.")

    @property
    def fitted_size(self) -> int:
        """The side of an image when it is copied to the device, in pixels."""
        return self.source_size or self.kept_size or self.image_size


def kept_side(preprocessing: Preprocessing) -> int:
    """The side of the square that is kept of a photo for training on the device, in pixels: 256 for image_size 224."""
    return math.ceil(preprocessing.image_size / KEPT_SHARE)


def resized_side(preprocessing: Preprocessing) -> int:
    """The short side of an image before the centre crop of evaluation, in pixels."""
    return int(preprocessing.image_size / preprocessing.crop_pct)
