"""Pictures of dataset images for the page of an inspection."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from pipeline.data.image_dataset import ImageDataset
from pipeline.data.splits import Split
from pipeline.images.decode import BadImage, decode_image
from pipeline.inspect.examine import ImageFacts, reduction
from pipeline.pages.blocks import Gallery, Picture
from pipeline.pages.sheet import LARGEST_TILE, contact_sheet, jpeg_bytes, png_bytes

PER_CLASS = 8
MOST_CLASSES = 60  # whose samples are shown


def sheet_of(dataset: ImageDataset, places: Sequence[tuple[Split, int]]) -> bytes | None:
    """The images side by side, photos as JPEG; None if none of them can be read."""
    shrink, images = partial(reduction, least=LARGEST_TILE), []
    for split, row in places:
        try:
            image = decode_image(split.encoded(row), dataset.channels, shrink, dataset.grey_max)
        except BadImage:
            continue
        images.append(np.atleast_3d(np.asarray(image)))
    if not images:
        return None
    sheet = contact_sheet(images, [[]] * len(images), len(images))
    return jpeg_bytes(sheet) if dataset.image_size is None else png_bytes(sheet)


def class_samples(dataset: ImageDataset) -> Gallery:
    """A picture of PER_CLASS training images for each class; of many classes, MOST_CLASSES at equal distances."""
    number = len(dataset.class_names)
    shown = np.unique(np.linspace(0, number - 1, min(number, MOST_CLASSES)).astype(int)).tolist()
    pictures = []
    for label in shown:
        rows = np.flatnonzero(dataset.train.labels == label)
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, PER_CLASS).astype(int))] if len(rows) else rows
        content = sheet_of(dataset, [(dataset.train, row) for row in chosen.tolist()])
        if content is not None:
            name = dataset.class_names[label]
            lines = (f"{name}: {len(rows):,} training images",)
            pictures.append(Picture(f"class_{label}", f"Training images of class {name}", lines, content))
    return Gallery(tuple(pictures), wide=True)


def picture_of(dataset: ImageDataset, splits: dict[str, Split], images: Sequence[ImageFacts], *lines: str) -> Picture | None:
    """One or more images side by side with a caption; None if they cannot be read."""
    content = sheet_of(dataset, [(splits[image.split], image.row) for image in images])
    names = " and ".join(dict.fromkeys(dataset.class_names[image.label] for image in images))
    return None if content is None else Picture("", f"Images of class {names}", lines, content)


def name_of(splits: dict[str, Split], image: ImageFacts) -> str:
    """The split of the image and its file, or its row in the table."""
    where = splits[image.split].where(image.row)
    return where if where.startswith("row ") else f"{image.split}: {where}"
