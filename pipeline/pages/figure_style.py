"""The common style of matplotlib figures, legends, and conversion to PNG and SVG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.pages.fonts import DEFAULT, escape_undrawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for colour-blind readers (https://jfly.uni-koeln.de/color/), without yellow, which is hard to see on
# white. The page replaces INK, FAINT and PAPER by its own colours in dark mode.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT, PAPER = "#1b1b1a", "#d4d4d1", "#fffffe"
OTHERS = "#a3a3a0"  # runs that no legend names
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MOST_NAMED = 12  # runs per legend
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
    "font.family": [DEFAULT],
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


@dataclass(frozen=True)
class Look:
    """The style of a run's lines in all figures. index: its place in the ranking, by which the page highlights it."""

    index: int
    label: str
    colour: str
    marker: str
    dashes: Any
    named: bool

    def line(self, part: str, faint: bool = False) -> dict[str, Any]:
        """The properties of a line. part: distinguishes the lines of one run in one figure."""
        return {
            "color": self.colour,
            "gid": f"run-{self.index}-{part}",
            "linestyle": self.dashes,
            "linewidth": 1.0 if faint or not self.named else 1.7,
            "alpha": 1.0 if self.named else 0.5,
            "zorder": 3 if self.named else 2,
        }


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """The name, with the middle of a long one replaced by an ellipsis."""
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[len(name) - (longest - 1) // 2 :]}"


def new_figure(title: str, width: float = 8.2, height: float = 3.9, **grid: Any) -> tuple[Figure, Any]:
    """A figure with a title, and its axes; width and height in inches. Use and save it in matplotlib.rc_context(STYLE)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.suptitle(title)
    return figure, figure.subplots(**grid)


def png_and_svg(figure: Figure) -> dict[str, bytes]:
    """The figure's files by extension: the same bytes for the same figure, without dates."""
    contents = {}
    escape_undrawable(figure)
    for ending, metadata in (("png", {}), ("svg", dict.fromkeys(("Date", "Creator", "Format", "Type")))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=144, metadata=metadata)
        contents[ending] = buffer.getvalue()
        figure.set_layout_engine("none")  # the layout is done, and repeating it takes as long as drawing
    return contents


def use_log_scale(axes: Axes, which: str) -> None:
    """Sets a logarithmic scale with plain numbers as ticks; which: x or y."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, entries: Iterable[Any], others: int = 0) -> None:
    """Adds one legend below the figure. others: number of grey runs without an entry."""
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
    # a legend draws copies without the ids of the originals
    for place, (handle, line, name) in enumerate(zip(handles, legend.legend_handles, legend.get_texts())):
        if line is not None and handle.get_gid():
            line.set_gid(f"{handle.get_gid()}-line{place}")
            name.set_gid(f"{handle.get_gid()}-name{place}")
