"""Figures of an inspection: images per class, sizes, aspect ratios, brightness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.inspect.examine import ImageFacts
from pipeline.pages.confusion import MOST_CLASS_NAMES
from pipeline.pages.figure_style import COLOURS, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 40


def class_counts(counts: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Images per class and split, stacked; of many classes a curve of the sorted training counts. counts: int [C] by split."""
    train = counts["train"]
    order = np.argsort(-train, kind="stable")
    if len(class_names) > MOST_CLASS_NAMES:
        figure, axes = new_figure(f"Training images of each of {len(class_names):,} classes, most frequent first")
        axes.fill_between(np.arange(len(order)) + 1, train[order], color=COLOURS[0], linewidth=0, step="mid")
        axes.set_xlabel("class, by number of images")
        axes.set_ylabel("training images")
        axes.set_ylim(bottom=0)
        return figure
    figure, axes = new_figure("Images by class", height=1.7 + 0.23 * len(class_names))
    left = np.zeros(len(class_names))
    for colour, (name, values) in zip(COLOURS, counts.items()):
        axes.barh(range(len(order)), values[order], left=left, height=0.7, color=colour, label=name)
        left += values[order]
    axes.set_yticks(range(len(order)), [short(class_names[number]) for number in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("images")
    figure.legend(loc="outside lower center", ncols=len(counts))
    return figure


def sizes(images: Sequence[ImageFacts]) -> Figure | str:
    """Width and height of each image; a sentence if all have one size."""
    found = {(image.width, image.height) for image in images}
    if len(found) == 1:
        ((width, height),) = found
        return f"All images have {width} x {height} pixels."
    figure, axes = new_figure("Sizes of the images", height=4.6)
    axes.plot(
        [image.width for image in images],
        [image.height for image in images],
        "o",
        markersize=3,
        alpha=0.3,
        color=COLOURS[0],
        markeredgewidth=0,
        rasterized=True,
    )
    axes.set_xlabel("width (pixels)")
    axes.set_ylabel("height (pixels)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure


def distribution(values: Sequence[float], title: str, label: str) -> Figure | str | None:
    """A histogram; None if all values are equal."""
    if len(set(values)) < 2:
        return None
    figure, axes = new_figure(title, height=2.9)
    axes.hist(values, bins=BINS, color=COLOURS[0])
    axes.set_xlabel(label)
    axes.set_ylabel("images")
    return figure
