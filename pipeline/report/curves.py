"""Curves of training: accuracy, loss, learning rate and batch size by epoch, step or time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.pages.figure_style import DASHES, PAPER, Look, legend_below, new_figure, use_log_scale
from pipeline.report.looks import num_others, run_entries
from pipeline.report.read_runs import RunRecord, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TOGETHER = 3  # runs up to which training and validation share a panel
MOST_MARKERS = 12  # per line
MOST_POINTS = 400  # per line
SPLITS = {"train": "training (augmented images)", "val": "validation"}
AXES = {"epoch": "epoch", "step": "optimizer step", "time": "time since the start"}


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit for a duration: its length in seconds, and its name."""
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


def positions(lines: Sequence[dict[str, Any]], axis: str, unit: float) -> list[float | None]:
    """The positions of lines of metrics.jsonl on an axis of AXES; training lines use their progress in epochs."""
    if axis == "time":
        return [line["seconds"] / unit for line in lines]
    key = "step" if axis == "step" else "progress" if lines and "progress" in lines[0] else "epoch"
    return [line[key] for line in lines]


def points(xs: Sequence[float | None], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The points where both values are known, thinned to about MOST_POINTS, with the last one."""
    known = [(x, y) for x, y in zip(xs, ys) if x is not None and y is not None]
    every = max(len(known) // MOST_POINTS, 1)
    kept = known[::-1][::every][::-1]
    return [x for x, _ in kept], [y for _, y in kept]


def prepare_axis(axes: Axes, axis: str, unit_name: str) -> None:
    """Sets label and ticks of the horizontal axis: whole epochs, steps with thousands separators, time with its unit."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"{AXES[axis]} ({unit_name})" if axis == "time" else AXES[axis])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=axis != "time", min_n_ticks=1))
    if axis == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")


def curves(runs: Sequence[RunRecord], look_of: dict[str, Look], quantity: str, axis: str) -> Figure | str:
    """Training and validation accuracy or loss of each epoch; a sentence if no run has two epochs with it.

    Up to MOST_TOGETHER runs share one panel, with training as thin dashed lines; more runs get two panels of one scale.
    """
    shown = [run for run in runs if any(has_figure(entry, quantity) for entry in run.epochs)]
    if not shown:
        return f"There is no curve of the {quantity}: no run has an epoch with one."
    if max(sum(has_figure(entry, quantity) for entry in run.epochs) for run in shown) < 2:
        return f"There is no curve of the {quantity}: no run has two epochs with one."
    unit, unit_name = time_unit(max(run.epochs[-1]["seconds"] for run in shown))
    together = len(shown) <= MOST_TOGETHER
    columns = 1 if together else 2
    title = f"{quantity.capitalize()} in training and validation by {axis}"
    figure, grid = new_figure(title, 8.2 if together else 9.4, 3.9, ncols=columns, sharey=True, squeeze=False)
    panels = dict(zip(SPLITS, [grid[0][0]] * 2 if together else grid[0]))
    values = []
    for split, panel in panels.items():
        panel.set_title("" if together else SPLITS[split])
        prepare_axis(panel, axis, unit_name)
        for run in shown:
            look = look_of[run.name]
            xs, ys = points(
                positions(run.epochs, axis, unit), [in_unit(entry[split], quantity) for entry in run.epochs]
            )
            values += ys
            style = {"markevery": max(len(ys) // MOST_MARKERS, 1), "marker": look.marker, **look.line(split)}
            if together:
                style["linestyle"] = "-"
            if together and split == "train":
                style |= {"linestyle": DASHES[1], "linewidth": 1.1, "markerfacecolor": PAPER}
            panel.plot(xs, ys, **style)
    first = panels["train"]
    if quantity == "loss" and min(values) > 0 and max(values) > 50 * min(values):
        use_log_scale(first, "y")
    first.set_ylabel("accuracy (%)" if quantity == "accuracy" else "cross-entropy loss (nats)")
    legend_below(figure, run_entries(shown, look_of, together), num_others(shown, look_of))
    return figure


def has_figure(entry: dict[str, Any], quantity: str) -> bool:
    """Whether an epoch has the quantity in training or validation."""
    return any(number(entry[split], quantity) is not None for split in SPLITS)


def in_unit(figures: dict[str, Any], quantity: str) -> float | None:
    """A figure, in percent if it is an accuracy; None if it is missing."""
    value = number(figures, quantity)
    return 100 * value if value is not None and quantity.endswith("accuracy") else value


def schedules(runs: Sequence[RunRecord], look_of: dict[str, Look], axis: str) -> Figure | str:
    """Learning rate and batch size of the training lines, in two panels; a sentence if there are no two or all are equal."""
    shown = [run for run in runs if len([place for place in positions(run.log, axis, 1) if place is not None]) > 1]
    if not shown:
        return "There is no curve of the learning rate: no run has logged it twice."
    lines = [line for run in shown for line in run.log]
    if len({(number(line, "lr"), number(line, "batch_size")) for line in lines}) == 1:
        return f"Learning rate ({lines[0].get('lr')}) and batch size ({lines[0].get('batch_size')}) are constant and equal."
    unit, unit_name = time_unit(max(run.log[-1]["seconds"] for run in shown))
    figure, (upper, lower) = new_figure(f"Learning rate and batch size by {axis}", 8.6, 5.0, nrows=2, sharex=True)
    rates: list[float] = []
    for run in shown:
        look, places = look_of[run.name], positions(run.log, axis, unit)
        for panel, key in ((upper, "lr"), (lower, "batch_size")):
            xs, ys = points(places, [number(line, key) for line in run.log])
            rates += ys if key == "lr" else []
            every = max(len(xs) // MOST_MARKERS, 1)
            steps = {"drawstyle": "steps-pre"} if key == "batch_size" else {}
            panel.plot(xs, ys, marker=look.marker, markevery=every, **steps, **look.line(key))
    peaks = [max((number(line, "lr") or 0 for line in run.log), default=0) for run in shown]
    if min(peaks) > 0 and max(peaks) > 20 * min(peaks):
        use_log_scale(upper, "y")
        upper.set_ylim(bottom=min(peaks) / 100)
    upper.set_ylabel("learning rate")
    lower.set_ylabel("batch size (images)")
    lower.set_ylim(bottom=0)
    prepare_axis(lower, axis, unit_name)
    legend_below(figure, run_entries(shown, look_of), num_others(shown, look_of))
    return figure
