"""The section of an inspection on sizes, file kinds and brightness, with the images at the ends of each scale."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.inspect.charts import distribution, sizes
from pipeline.inspect.examine import ImageFacts
from pipeline.inspect.inspection import Inspection
from pipeline.inspect.pictures import name_of, picture_of
from pipeline.pages.blocks import Block, Gallery, Row, Section, Table, count, fraction, words
from pipeline.pages.drawing import Drawing

TITLE = "Sizes, files and brightness"
EXTREMES = 6  # images shown at each end of a scale


def images_section(found: Inspection, drawing: Drawing) -> Section:
    images = found.images
    aspects, brightness = [image.aspect for image in images], [image.brightness for image in images]
    blocks = (
        quantities_table(images),
        kinds_table(images),
        drawing.figure("sizes", "Width and height of each image", lambda: sizes(images)),
        drawing.figure(
            "aspects",
            "Distribution of width over height",
            lambda: distribution(aspects, "Aspect ratios of the images", "width / height"),
        ),
        drawing.figure(
            "brightness",
            "Distribution of brightness",
            lambda: distribution(brightness, "Brightness of the images", "mean grey level (0 to 1)"),
        ),
        *extremes(found),
    )
    return Section("images", TITLE, tuple(block for block in blocks if block is not None))


def quantities_table(images: Sequence[ImageFacts]) -> Table:
    """Quartiles of sizes, aspect ratio, brightness and contrast."""
    values = {
        "width (pixels)": [float(image.width) for image in images],
        "height (pixels)": [float(image.height) for image in images],
        "width / height": [image.aspect for image in images],
        "file size (KiB)": [image.num_bytes / 1024 for image in images],
        "brightness (0 to 1)": [image.brightness for image in images],
        "contrast (0 to 1)": [image.contrast for image in images],
    }
    rows = []
    for name, numbers in values.items():
        form = ",.0f" if "pixels" in name else ",.3g" if "KiB" in name else ".3f"
        quartiles = np.quantile(np.array(numbers), [0, 0.25, 0.5, 0.75, 1]).tolist()
        rows.append(Row((words(name), *(count(value, form) for value in quartiles))))
    columns = ("quantity", "smallest", "lower quartile", "median", "upper quartile", "largest")
    note = "Brightness and contrast are the mean and the standard deviation of an image's grey levels."
    return Table("quantities", TITLE, note, columns, tuple(rows))


def kinds_table(images: Sequence[ImageFacts]) -> Table:
    counts = Counter((image.kind, image.mode) for image in images)
    rows = tuple(
        Row((words(kind), words(mode), count(number), fraction(number / len(images))))
        for (kind, mode), number in counts.most_common()
    )
    note = "Modes are Pillow's: RGB and L (grey) are read as they are, all others are converted."
    return Table("kinds", "File kinds and modes", note, ("file kind", "mode", "images", "share"), rows)


Scale = tuple[Callable[[ImageFacts], float], bool]  # what to sort by, and whether the largest come first


def extremes(found: Inspection) -> list[Block]:
    """Galleries of the images at the ends of brightness and contrast, and of sizes and aspect ratios if these differ."""
    scales: dict[str, Scale] = {
        "darkest": (lambda image: image.brightness, False),
        "brightest": (lambda image: image.brightness, True),
        "lowest contrast": (lambda image: image.contrast, False),
    }
    if len({image.aspect for image in found.images}) > 1:
        scales |= {"tallest": (lambda image: image.aspect, False), "widest": (lambda image: image.aspect, True)}
    if len({(image.width, image.height) for image in found.images}) > 1:
        scales["smallest"] = (lambda image: image.width * image.height, False)
    blocks: list[Block] = []
    for title, (key, is_largest_first) in scales.items():
        chosen = sorted(found.images, key=key, reverse=is_largest_first)[:EXTREMES]
        pictures = []
        for image in chosen:
            facts = f"{image.width} x {image.height}, brightness {image.brightness:.2f}, contrast {image.contrast:.2f}"
            lines = (found.class_name(image.label), facts, name_of(found.splits, image))
            pictures.append(picture_of(found.dataset, found.splits, [image], *lines))
        blocks.append(Gallery(tuple(filter(None, pictures)), f"The {title} images"))
    return blocks
