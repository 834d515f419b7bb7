"""The figure of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.pages.figure_style import COLOURS, FAINT, INK, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_MATRIX = 200  # classes
MOST_NUMBERED = 20  # classes up to which the confusion matrix shows its counts
MOST_CLASS_NAMES = 40  # classes up to which an axis shows their names
FAINTEST_CELL = 0.15  # makes a single mistake among many images visible
WHITE = "#ffffff"  # text on dark cells of the matrix, also in dark mode


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], run_name: str) -> Figure | str:
    """The confusion matrix, true classes as rows; a cell's shade is its share of the row. Small matrices show their counts.

    counts: int [C, C]. Returns a sentence for a single class or without counts.
    """
    size = len(class_names)
    if size < 2 or not counts.any():
        return f"There is no confusion matrix of {run_name}: it was tested on {counts.sum()} images of {size} classes."
    side = min(max(3.6 + 0.32 * size, 4.8), 10.0)
    figure, axes = new_figure(f"Confusion matrix of {short(run_name)}, test images", side + 0.8, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, column in zip(*np.nonzero(counts)):
        cell = {"facecolor": COLOURS[0], "alpha": max(float(shares[row, column]), FAINTEST_CELL), "linewidth": 0}
        axes.add_patch(rectangle(column - 0.5, row - 0.5, cell))
        if size <= MOST_NUMBERED:
            dark = shares[row, column] > 0.5
            style = {"color": WHITE if dark else INK, "fontsize": 8.5 if counts.max() < 1000 else 7}
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", **style)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    for line in np.arange(0.5, size - 1) if size <= MOST_CLASS_NAMES else ():
        axes.axhline(line, color=FAINT, linewidth=0.4)
        axes.axvline(line, color=FAINT, linewidth=0.4)
    name_classes(axes, class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def rectangle(x: float, y: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, **style)


def name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    """Ticks along both axes of a matrix: names, or for many classes every tenth number."""
    size = len(class_names)
    if size <= MOST_CLASS_NAMES:
        names = [short(name, 18) for name in class_names]
        turned = max(map(len, names)) > 3
        axes.set_xticks(range(size), names, rotation=90 if turned else 0, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    else:
        places = range(0, size, 10)
        axes.set_xticks(places, [str(place) for place in places], fontsize=8)
        axes.set_yticks(places, [str(place) for place in places], fontsize=8)
