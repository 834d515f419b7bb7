"""Figures of runs with matplotlib: one look for all of them, the curves over training, and figures to PNG and SVG bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.run_records import RunRecord, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours that can be told apart by colour-blind people (https://jfly.uni-koeln.de/color/), without the yellow
# that white paper swallows. The last three stand for what the page replaces by its own in dark mode.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT, PAPER = "#1b1b1a", "#d4d4d1", "#fffffe"
OTHERS = "#a3a3a0"  # runs that are not named in a legend
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MOST_TOGETHER = 3  # runs whose training and validation share a panel
MOST_NAMED = 12  # runs in one legend
MOST_MARKERS = 12  # on one line
MOST_POINTS = 400  # of one line
LONGEST_NAME = 34
LEGEND_ROW = 0.2  # height in inches

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.formatter.use_mathtext": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "pipeline.report",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

SPLITS = {"train": "training (augmented images)", "val": "validation"}
AXES = {"epoch": "epoch", "step": "optimizer step", "time": "time since the start"}


@dataclass(frozen=True)
class Look:
    """How a run's lines are drawn wherever it appears. index: its place in the report, which the page highlights by."""

    index: int
    label: str
    colour: str
    marker: str
    dashes: Any
    named: bool

    def line(self, part: str, faint: bool = False) -> dict[str, Any]:
        """The properties of a line; part tells two lines of one run in one figure apart."""
        return {
            "color": self.colour,
            "gid": f"run-{self.index}-{part}",
            "linestyle": self.dashes,
            "linewidth": 1.0 if faint or not self.named else 1.7,
            "alpha": 1.0 if self.named else 0.5,
            "zorder": 3 if self.named else 2,
        }


def looks(groups: Sequence[Sequence[RunRecord]], best_first: Sequence[RunRecord]) -> dict[str, Look]:
    """A Look for each run by name: the best MOST_NAMED get colours and a place in legends, the rest are grey.

    groups: the repetitions with other seeds together; a group shares a colour, its runs differ in dashes and markers.
    best_first: all runs; the place of a run in it is the index of its Look.
    """
    named = {run.name for run in best_first[:MOST_NAMED]}
    index = {run.name: place for place, run in enumerate(best_first)}
    found: dict[str, Look] = {}
    coloured = [members for group in groups if (members := [run for run in group if run.name in named])]
    for place, members in enumerate(coloured):
        colour, cycle = COLOURS[place % len(COLOURS)], place // len(COLOURS)
        for member, run in enumerate(members):
            marker, dashes = MARKERS[(place + member) % len(MARKERS)], DASHES[(cycle + member) % len(DASHES)]
            found[run.name] = Look(index[run.name], short(run.name), colour, marker, dashes, named=True)
    for run in best_first[MOST_NAMED:]:
        found[run.name] = Look(index[run.name], short(run.name), OTHERS, "", "-", named=False)
    return found


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits its place: the middle of a long one is left out."""
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[len(name) - (longest - 1) // 2 :]}"


def new_figure(title: str, width: float = 8.2, height: float = 3.9, **grid: Any) -> tuple[Figure, Any]:
    """A figure with its title and axes, in inches. To be called, drawn on and saved within matplotlib.rc_context(STYLE)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.suptitle(title)
    return figure, figure.subplots(**grid)


def png_and_svg(figure: Figure) -> dict[str, bytes]:
    """The figure's files by ending; the same bytes for the same figure, without dates."""
    contents = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # a name in a script that the font lacks shows boxes
        for ending, metadata in (("png", {}), ("svg", dict.fromkeys(("Date", "Creator", "Format", "Type")))):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=144, metadata=metadata)
            contents[ending] = buffer.getvalue()
            figure.set_layout_engine("none")  # it is laid out now, and that takes as long as drawing
    return contents


def time_unit(seconds: float) -> tuple[float, str]:
    """How many seconds the unit has that suits a length of time, and its name."""
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


def positions(lines: Sequence[dict[str, Any]], axis: str, unit: float) -> list[float | None]:
    """Where lines of metrics.jsonl stand on an axis of AXES; training lines have their progress in epochs."""
    if axis == "time":
        return [line["seconds"] / unit for line in lines]
    key = "step" if axis == "step" else "progress" if lines and "progress" in lines[0] else "epoch"
    return [line[key] for line in lines]


def points(xs: Sequence[float | None], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The places where both are known, at most some MOST_POINTS of them, the last one included."""
    known = [(x, y) for x, y in zip(xs, ys) if x is not None and y is not None]
    every = max(len(known) // MOST_POINTS, 1)
    kept = known[::-1][::every][::-1]
    return [x for x, _ in kept], [y for _, y in kept]


def prepare_axis(axes: Axes, axis: str, unit_name: str) -> None:
    """Label and ticks of the horizontal axis: whole epochs, steps with thousands separators, time with its unit."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"{AXES[axis]} ({unit_name})" if axis == "time" else AXES[axis])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=axis != "time", min_n_ticks=1))
    if axis == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")


def use_log_scale(axes: Axes, which: str) -> None:
    """A logarithmic scale with plain numbers at its ticks, on the axis x or y."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, entries: Iterable[Any], others: int = 0) -> None:
    """One legend for the whole figure, under it."""
    from matplotlib.lines import Line2D

    handles = list(entries)
    if others:
        grey: dict[str, Any] = {"color": OTHERS, "linewidth": 1.0, "alpha": 0.5}
        handles.append(Line2D([], [], label=f"{others} more, ranked lower", **grey))
    longest = max((len(handle.get_label()) for handle in handles), default=1)
    columns = max(min(len(handles), 110 // (longest + 8)), 1)
    rows = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.8)
    # what a legend draws are copies, without the originals' ids
    for place, (handle, line, name) in enumerate(zip(handles, legend.legend_handles, legend.get_texts())):
        if line is not None and handle.get_gid():
            line.set_gid(f"{handle.get_gid()}-line{place}")
            name.set_gid(f"{handle.get_gid()}-name{place}")


def run_entries(runs: Sequence[RunRecord], look_of: dict[str, Look], both_splits: bool = False) -> list[Any]:
    """Legend entries of the runs that are named; of their training and their validation where they share a panel."""
    from matplotlib.lines import Line2D

    entries = []
    for look in (look_of[run.name] for run in runs):
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "gid": f"run-{look.index}-legend"}
        if look.named and both_splits:
            dashed = {"linestyle": DASHES[1], "linewidth": 1.1, "markerfacecolor": PAPER}
            entries.append(Line2D([], [], label=f"{look.label}, training", **style | dashed))
        if look.named:
            ending = ", validation" if both_splits else ""
            dashes = "-" if both_splits else look.dashes
            entries.append(Line2D([], [], label=look.label + ending, linestyle=dashes, **style))
    return entries


def num_others(runs: Sequence[RunRecord], look_of: dict[str, Look]) -> int:
    return sum(not look_of[run.name].named for run in runs)


def curves(runs: Sequence[RunRecord], look_of: dict[str, Look], quantity: str, axis: str) -> Figure | None:
    """Training against validation accuracy or loss of each epoch; None where there is nothing.

    A few runs have both in one panel, training dashed and thin; more have two panels on one scale.
    """
    shown = [
        run
        for run in runs
        if any(number(entry[split], quantity) is not None for entry in run.epochs for split in SPLITS)
    ]
    if not shown:
        return None
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


def in_unit(figures: dict[str, Any], quantity: str) -> float | None:
    """An accuracy in percent, anything else as it is."""
    value = number(figures, quantity)
    return 100 * value if value is not None and quantity.endswith("accuracy") else value


def schedules(runs: Sequence[RunRecord], look_of: dict[str, Look], axis: str) -> Figure | None:
    """Learning rate over batch size as they were used, by the training lines; None where there are none."""
    shown = [run for run in runs if run.log]
    if not shown:
        return None
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
