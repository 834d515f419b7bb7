"""Examines the images of a dataset: sizes, modes, file kinds, brightness, and what finds duplicates. On large sets, a sample."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.common.console import progress_bar
from pipeline.common.system import decoding_threads, usable_cores
from pipeline.data.bad_images import bad_image_message
from pipeline.data.image_dataset import BEFORE_TRAINING, ImageDataset
from pipeline.data.splits import Split, stratified_rows
from pipeline.images.decode import BadImage, decode_image, file_kind, image_header

INSPECTED = 3  # the purpose in the address of the draw of the sample; pipeline.data.image_dataset uses 0 to 2
CHUNK = 64  # images per task of a thread
SMALLEST_DECODED = 64  # pixels of the shorter side to which a JPEG is decoded
THUMBNAIL = 32  # side in pixels


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image.

    split, row: its place; width, height: in pixels, as stored; mode: Pillow's; kind: the file format; num_bytes: of the file;
    brightness, contrast: mean and standard deviation of its grey levels, 0..1; digest: SHA-256 of the file; phash: the
    perceptual hash of the imagehash package as 64 bits; thumbnail: uint8 [THUMBNAIL, THUMBNAIL], grey.
    """

    split: str
    row: int
    label: int
    width: int
    height: int
    mode: str
    kind: str
    num_bytes: int
    brightness: float
    contrast: float
    digest: bytes
    phash: int
    thumbnail: np.ndarray

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True)
class Examined:
    """The examined images, in the order train, val, test. bad: a message for each image that cannot be read."""

    images: list[ImageFacts]
    bad: list[str]
    num_images: int  # of the whole dataset, with those that on_bad_image skip has left out


def splits_of(dataset: ImageDataset) -> dict[str, Split]:
    """train, val and test; without val if it is the test split."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: split for name, split in splits.items() if name != "val" or split is not dataset.test}


def sampled_rows(splits: Mapping[str, Split], most: int) -> dict[str, np.ndarray]:
    """The rows to examine, at most about `most` in total: each split and class in proportion, the same in each call."""
    total = sum(map(len, splits.values()))
    if total <= most:
        return {name: np.arange(len(split)) for name, split in splits.items()}
    sizes = {name: max(1, len(split) * most // total) for name, split in splits.items()}
    return {name: stratified_rows(split.labels, sizes[name], 0, BEFORE_TRAINING, INSPECTED) for name, split in splits.items()}


def examine(dataset: ImageDataset, most: int) -> Examined:
    """Examines up to `most` images of the dataset in threads."""
    splits = splits_of(dataset)
    rows = sampled_rows(splits, most)
    tasks = [
        (name, rows[name][start : start + CHUNK]) for name in splits for start in range(0, len(rows[name]), CHUNK)
    ]
    images: list[ImageFacts] = []
    bad = list(dataset.bad_images)
    with (
        decoding_threads(usable_cores()) as pool,
        progress_bar(sum(map(len, rows.values())), 0, "examining", True, unit="image") as bar,
    ):
        for found, problems in pool.map(partial(examine_rows, splits, dataset.grey_max), tasks):
            images += found
            bad += problems
            bar.update(len(found) + len(problems))
    return Examined(images, bad, sum(map(len, splits.values())) + len(dataset.bad_images))


def examine_rows(
    splits: Mapping[str, Split], grey_max: int, task: tuple[str, Sequence[int]]
) -> tuple[list[ImageFacts], list[str]]:
    """The facts of these rows of a split, and a message for each image that cannot be read."""
    name, rows = task
    split = splits[name]
    found, problems = [], []
    for row in map(int, rows):
        try:
            found.append(examine_image(name, row, int(split.labels[row]), split.encoded(row), grey_max))
        except BadImage as error:
            problems.append(bad_image_message(split, row, error))
    return found, problems


def examine_image(split: str, row: int, label: int, encoded: bytes, grey_max: int) -> ImageFacts:
    """The facts of one image. Raises BadImage."""
    import imagehash
    from PIL import Image

    width, height, mode, _ = image_header(encoded)
    grey = decode_image(encoded, 1, reduction, grey_max)
    levels = np.asarray(grey)
    return ImageFacts(
        split=split,
        row=row,
        label=label,
        width=width,
        height=height,
        mode=mode,
        kind=file_kind(encoded),
        num_bytes=len(encoded),
        brightness=float(levels.mean()) / 255,
        contrast=float(levels.std()) / 255,
        digest=hashlib.sha256(encoded).digest(),
        phash=int(str(imagehash.phash(grey)), 16),
        thumbnail=np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)),
    )


def reduction(width: int, height: int, least: int = SMALLEST_DECODED) -> int:
    """The factor by which a JPEG is decoded smaller. least: pixels that its shorter side keeps."""
    return next((factor for factor in (8, 4, 2) if min(width, height) >= factor * least), 1)
