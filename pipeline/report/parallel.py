"""The parallel coordinates of a report: settings and results, one line per run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.pages.figure_style import COLOURS, INK, PAPER, Look, new_figure, short
from pipeline.report.comparison import setting_text
from pipeline.report.importance import is_number
from pipeline.report.read_runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TICKS = 6  # distinct numbers of an axis up to which each has a tick
MOST_NAMES = 18  # distinct other values up to which each has a tick
TICK_HEIGHT = 0.05  # of a tick's text
OTHER_HEIGHT = 0.12  # height for each value that is no number, below the numbers of the same axis
FAN = 0.07  # height over which lines of the same value are spread
BEST_LINES = 3  # number of thick lines

Tick = tuple[float, str]  # height and text


def parallel_coordinates(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    scores: Sequence[float],
    score_name: str,
    look_of: dict[str, Look],
    higher_is_better: bool = True,
    logarithmic: Collection[str] = (),
) -> Figure | str:
    """A line per run through its settings to its score, bluer for a better score; a sentence if they do not differ.

    names: the settings, one axis each. logarithmic: those with a logarithmic distribution; their axes, and those whose numbers
    span a factor of ten, are logarithmic.
    """
    if len(runs) < 2:
        return "Settings and results are compared over runs that have ended with a result; fewer than two have."
    if not names:
        return f"The {len(runs)} runs that have ended have the same settings."
    if max(scores) == min(scores):
        return f"All {len(runs)} runs that have ended have the same {score_name}: {scores[0]:.4g}."
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("grey to blue", ["#b4b4b1", COLOURS[5], COLOURS[0]])
    width = max(8.2, 1.5 * (len(names) + 1))
    figure, axes = new_figure("Settings and results, one line per run (parallel coordinates)", width, 4.6)
    titles, columns = [], []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        is_log = is_logarithmic(values, name in logarithmic)
        titles.append(f"{name} (log)" if is_log else name)
        columns.append(placed(values, is_log))
    is_log = "accuracy" not in score_name and is_logarithmic(scores)
    titles.append(f"{score_name} (log)" if is_log else score_name)
    columns.append(placed(scores, is_log))
    goodness = np.asarray(scores) if higher_is_better else -np.asarray(scores)
    order = np.argsort(goodness, kind="stable")
    heights = np.array([*(fanned(places, order) for places, _ in columns[:-1]), columns[-1][0]])
    for place, row in enumerate(order):
        share = float((goodness[row] - goodness.min()) / np.ptp(goodness))
        thick = place >= len(order) - BEST_LINES
        line = {"gid": f"run-{look_of[runs[row].name].index}-parallel", "linewidth": 2.6 if thick else 1.2}
        axes.plot(range(len(columns)), heights[:, row], color=ramp(share), alpha=1.0 if thick else 0.75, **line)
    for place, (title, (_, ticks)) in enumerate(zip(titles, columns)):
        axes.plot([place, place], [-FAN / 2, 1 + FAN / 2], color=INK, linewidth=1, zorder=4)
        axes.text(place, 1.09, on_lines(title), ha="center", va="bottom", weight="bold", fontsize=9)
        for height, text in ticks:
            box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
            axes.text(place + 0.05, height, short(text, 18), va="center", fontsize=8, bbox=box, zorder=5)
    axes.set_axis_off()
    axes.set_xlim(-0.3, len(columns) - 0.5)
    axes.set_ylim(-0.06, 1.25)
    return figure


def on_lines(name: str) -> str:
    """The name of a setting, wrapped into short lines."""
    return textwrap.fill(name.replace("_", " "), 13)


def fanned(heights: Sequence[float], order: np.ndarray) -> np.ndarray:
    """The heights with equal ones spread over FAN, so that lines of the same value are distinct; the better run is higher.

    order: int [N], the places of the runs from worst to best.
    """
    spread = np.array(heights)
    for height in set(heights):
        equal = [row for row in order if heights[row] == height]
        if len(equal) > 1:
            spread[equal] += np.linspace(-FAN / 2, FAN / 2, len(equal))
    return spread


def is_logarithmic(values: Sequence[Any], drawn_so: bool = False) -> bool:
    """Whether the numbers among the values have a logarithmic axis: positive, and drawn so or over a factor of ten."""
    numbers = [value for value in values if is_number(value)]
    return bool(numbers) and min(numbers) > 0 and (drawn_so or max(numbers) >= 10 * min(numbers))


def placed(values: Sequence[Any], logarithmic: bool = False) -> tuple[list[float], list[Tick]]:
    """Heights from 0 to 1 of the values on an axis, and its ticks.

    Numbers are placed to scale. Other values are evenly spaced: over the whole axis, or below its numbers.
    """
    numbers = sorted({value for value in values if is_number(value)})
    others = sorted({setting_text(value) for value in values if not is_number(value)})
    floor = min(OTHER_HEIGHT * len(others), 0.5) if numbers else 1.0  # lowest height of a number
    step = floor / max(len(others) - (0 if numbers else 1), 1)
    height_of: dict[str, float] = {text: place * step for place, text in enumerate(others)}
    if len(others) == 1 and not numbers:
        height_of[others[0]] = 0.5
    ticks = [(height_of[text], text) for text in others[:: math.ceil(len(others) / MOST_NAMES) or 1]]
    low, high = (numbers[0], numbers[-1]) if numbers else (0.0, 0.0)

    def height(value: float) -> float:
        if low == high:
            return (1 + floor) / 2
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return floor + (1 - floor) * share

    heights = [height(value) if is_number(value) else height_of[setting_text(value)] for value in values]
    if len(numbers) <= MOST_TICKS:
        return heights, ticks + without_overlap([(height(value), setting_text(value)) for value in numbers])
    spaced = np.geomspace(low, high, 5) if logarithmic else np.linspace(low, high, 5)
    return heights, ticks + [(height(value), setting_text(float(f"{value:.3g}"))) for value in spaced]


def without_overlap(ticks: Sequence[Tick]) -> list[Tick]:
    """The ticks, from low to high, of which the text does not overlap with that of an earlier one or the last one."""
    kept: list[Tick] = []
    for tick in ticks:
        is_clear = tick is ticks[-1] or ticks[-1][0] - tick[0] >= TICK_HEIGHT
        if not kept or (is_clear and tick[0] - kept[-1][0] >= TICK_HEIGHT):
            kept.append(tick)
    return kept
