"""Detects properties of a dataset from a sample of its images: size, channels, range of 16-bit values."""

from __future__ import annotations

import dataclasses

from pipeline.data.shards import LostShard
from pipeline.data.splits import Split
from pipeline.images.decode import DEEP_GREY_MODES, GREY_MAX, GREY_MODES, BadImage, image_header, largest_value

LARGEST_SMALL_IMAGE = 96
NUM_HEADERS, NUM_DECODED = 32, 64  # images of the sample
BIT_DEPTHS = (8, 10, 12, 14, 16)  # the bit depths of cameras and scanners
DARK_COLOR = 63  # of 255: the upper 8 bits of the largest 14-bit value


@dataclasses.dataclass(frozen=True)
class Looks:
    """image_size: the side of small images that are all square and of one size, else None; channels: 1 or 3.

    grey_max: the largest value of 16-bit grey images, which becomes 255.
    """

    image_size: int | None
    channels: int
    grey_max: int = GREY_MAX
    notes: list[str] = dataclasses.field(default_factory=list)


def looks_of(split: Split, skip_bad: bool) -> Looks:
    """Reads the headers of some images, and decodes some if they have 16 bits.

    Raises BadImage for an image without a readable header; with skip_bad only if none of the sample has one.
    """
    headers, bad = [], []
    for row in split.some_rows(NUM_HEADERS):
        try:
            headers.append(image_header(split.encoded(row)))
        except BadImage as error:
            advice = "Repair or remove it, or skip such images with --on_bad_image skip."
            bad.append(BadImage(f"{split.where(row)}: {error} {advice}"))
        except LostShard as error:
            raise ValueError(str(error)) from error
    if bad and not (skip_bad and headers):
        raise bad[0]
    sizes = {(width, height) for width, height, *_ in headers}
    width, height = next(iter(sizes))
    is_small = len(sizes) == 1 and width == height <= LARGEST_SMALL_IMAGE
    image_size, channels = width if is_small else None, 1 if all(mode in GREY_MODES for _, _, mode, _ in headers) else 3
    if not any(is_deep for *_, is_deep in headers):
        return Looks(image_size, channels)
    return Looks(image_size, channels, *range_of_values(split))


def range_of_values(split: Split) -> tuple[int, list[str]]:
    """grey_max of a split with 16-bit images, and notes: the highest value of the smallest bit depth that fits the sample."""
    grey: list[int] = []
    color: list[int] = []
    for row in split.some_rows(NUM_DECODED):
        try:
            encoded = split.encoded(row)
            _, _, mode, is_deep = image_header(encoded)
            if is_deep:
                (grey if mode in DEEP_GREY_MODES else color).append(largest_value(encoded))
        except BadImage:
            continue  # it is reported when it is read for training
    notes = []
    bits = next(depth for depth in BIT_DEPTHS if max(grey, default=GREY_MAX) < 2**depth or depth == BIT_DEPTHS[-1])
    if bits < BIT_DEPTHS[-1]:
        notes.append(
            f"16-bit grey images use {bits} bits (the largest value of {len(grey)} images is {max(grey)}): {2**bits - 1} and "
            "above become white."
        )
    if color:
        dark = f" The largest of them is {max(color)}: convert these images to 8 bits first." if max(color) <= DARK_COLOR else ""
        notes.append(f"Of 16-bit color images only the upper 8 bits of each value are used.{dark}")
    return 2**bits - 1, notes
