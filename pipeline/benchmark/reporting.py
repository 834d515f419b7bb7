"""The output of a benchmark: tables for the terminal, JSON lines and a chart, with the facts of the machine."""

import json
import platform
import re
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.benchmark.measuring import Row, Section, with_notes
from pipeline.common.files import finite, to_json, write_atomically, written_aside
from pipeline.common.system import usable_cores

CURVE_ROWS = 16  # rows of a curve in the terminal; the files have all
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "pytorch-accelerated")


def number(value: float) -> str:
    """At least three significant digits: 0.0123, 1.23, 12.3, 123, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """The mean in percent and, of several, the standard deviation: 94.05 ± 0.12 %."""
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.fmean(accuracies):.2f}{spread} %"


def spread_text(value: dict[str, Any]) -> str:
    """Mean and standard deviation, or the mean alone if there is one measurement."""
    return f"{value['mean']:.1f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.1f}")


def points_text(points: list[Row]) -> str:
    """Each epoch with its test accuracy in percent, and after how many seconds it was reached."""
    texts = []
    for point in points:
        accuracy, seconds = point["test_accuracy"]["mean"], point["seconds"]["mean"]
        texts.append(f"{point['epoch']}: {100 * accuracy:.1f} ({seconds:.0f} s)")
    return ", ".join(texts)


# the figures of a row: heading and format
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median": ("median", number),
    "least": ("min", number),
    "most": ("max", number),
    "n": ("n", str),
    "ratio": ("ratio", lambda value: f"{value:#.3g}"),
    "epoch_share": ("share of an epoch", lambda value: f"{value:.2%}"),
    "wait_fraction": ("waiting for data", lambda value: f"{value:.1%}"),
    "step_ms": ("step (ms)", number),
    "gradient_bytes": ("gradient (MB)", lambda value: number(value / 1e6)),
    "sent_bytes": ("sent per process (MB)", lambda value: number(value / 1e6)),
    "all_reduce_ms": ("all-reduce alone (ms)", number),
    "loader_images_per_second": ("loader alone (images/s)", number),
    "efficiency": ("efficiency", lambda value: f"{value:.0%}"),
    "bytes_on_disk": ("on disk (MB)", lambda value: number(value / 1e6)),
    "peak_memory_bytes": ("peak memory (MiB)", lambda value: f"{value / 2**20:,.0f}"),
    "gpu_memory_bytes": ("peak GPU memory (MiB)", lambda value: f"{value / 2**20:,.0f}"),
    "modules": ("modules", str),
    "loss": ("loss", "{:.4f}".format),
    "smoothed_loss": ("smoothed loss", "{:.4f}".format),
    "whole_seconds": ("whole run (s)", number),
    "test_accuracies": ("test accuracy", lambda values: mean_and_spread(values)),
    "run_seconds": ("seconds", spread_text),
    "points": ("epoch: test accuracy (%)", points_text),
    "flip_accuracies": ("with mirror images", lambda values: mean_and_spread(values)),
    "reached": ("reached", str),
    "loss_curve": ("loss by quarter of the run", lambda values: " ".join(f"{value:.3f}" for value in values)),
    "distance": ("largest distance to fp32", lambda value: f"{value:.1%}"),
    "val_accuracy": ("validation accuracy", lambda value: f"{value:.1%}"),
    "skipped_steps": ("skipped steps", str),
    "steps": ("steps", str),
    "passed": ("passed", str),
    "failed": ("failed", str),
    "skipped_tests": ("skipped", str),
}


def machine_facts(arguments: Sequence[str]) -> dict[str, Any]:
    """The conditions of the measurement: command, date, processor, cores, versions. Device and threads are in the rows.

    The command is without --output, which changes nothing that is measured.
    """
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": f"python -m pipeline.benchmark {shlex.join(without_output(arguments))}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "versions": versions,
    }


def without_output(arguments: Sequence[str]) -> list[str]:
    following = zip(["", *arguments], arguments)
    return [word for before, word in following if "--output" not in (before, word) and not word.startswith("--output=")]


def heading(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"{facts['command']}\n{facts['cpu']}, {facts['cores']} cores; {facts['date']}\n{versions}"


def conditions_text(row: Row) -> str:
    """Command, device, machine, date and versions of a row, in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    device = f"{row['device']}, " if row.get("device", "cpu") != "cpu" else ""
    return f"{code(row['command'])}: {device}{row['cpu']}, {row['cores']} cores; {row['date']}; {versions}."


def code(text: str) -> str:
    """The text in one line as Markdown's code span, which may contain single backticks."""
    line = " ".join(text.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def plain(text: str) -> str:
    """The text in one line, without a character that would begin another cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def cell(key: str, value: Any) -> str:
    """A figure of a row as text; "-" if it, or a part of it, was not measured or is not finite."""
    value = finite(value)
    return "-" if value == [] or is_incomplete(value) else plain(COLUMNS[key][1](value))


def is_incomplete(value: Any) -> bool:
    """Whether the value is None or contains None; a standard deviation is None if there is one measurement."""
    if isinstance(value, dict):
        return any(key != "deviation" and is_incomplete(part) for key, part in value.items())
    return any(map(is_incomplete, value)) if isinstance(value, list) else value is None


def cells_of(section: Section) -> list[list[str]]:
    """Headings and rows as text, with a column for every figure that a row has; of a long curve, every so many rows."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in section.rows)]
    headings = [section.unit or key if key == "median" else COLUMNS[key][0] for key in keys]
    references = {row["ratio_to"] for row in section.rows if "ratio_to" in row}
    headings = [f"ratio to {', '.join(sorted(references))}" if name == "ratio" and references else name for name in headings]
    cells = [["row", *map(plain, headings)]]
    every = -(-len(section.rows) // CURVE_ROWS) if section.curve else 1
    for row in section.rows[:: max(every, 1)]:
        name = row["row"] if row.get("warmed_up", True) else f"{row['row']} (cold)"
        cells.append([plain(name), *(cell(key, row.get(key)) for key in keys)])
    return cells


def table(section: Section) -> str:
    """The section as a Markdown table, aligned for the terminal."""
    headings, *rows = cells_of(section)
    cells = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    widths = [max(map(len, of_column)) for of_column in zip(*cells)]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in cells)


def text_of(section: Section) -> str:
    devices = sorted({f"{row['device']}, {row['threads']} threads" for row in section.rows if "device" in row})
    name = f"{section.title}: {section.group}" if section.group else section.title
    title = f"{name} ({'; '.join(devices)})" if devices else name
    return "\n".join([title, table(section), *section.notes])


def write_lines(path: Path, sections: Sequence[Section], facts: dict[str, Any]) -> None:
    """Writes a JSON object per row, with its section and the facts, of which a row may have its own.

    The first row of a section has its notes. Raises OSError.
    """
    rows: list[Row] = []
    for section in sections:
        place = {"section": section.title, **({} if section.group is None else {"group": section.group})}
        rows.extend({**place, **facts, **row} for row in with_notes(section))
    write_atomically(path, "".join(to_json(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[Row]:
    """The rows of write_lines. Raises ValueError, with the number of the line, if there are others, or none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows: list[Row] = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            cells_of(Section(row["section"], [row]))
            conditions_text(row)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            is_cut = place == len(lines) and isinstance(error, json.JSONDecodeError)
            last = " It is the last line, and may be cut off." if is_cut else ""
            raise ValueError(
                f"Line {place} of {path} is not a row of a benchmark ({type(error).__name__}: {error}).{last} Delete it, or pass "
                "a benchmark-*.jsonl of --output."
            ) from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty. Pass a benchmark-*.jsonl of --output.")
    return rows


def draw(path: Path, sections: Sequence[Section], facts: dict[str, Any]) -> None:
    """Draws the chart: a panel per section, with bars of the medians (error bars from min to max) or a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [height_of(section) for section in sections]
    figure, axes = pyplot.subplots(
        len(sections), figsize=(9, sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for section, panel in zip(sections, axes[:, 0]):
        drawn = draw_paths if section.paths else draw_curve if section.curve else draw_bars
        drawn(panel, section)
        panel.set_title(section.title, loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.supxlabel(
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['versions']['torch']}, {facts['date']}", fontsize=7
    )
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    pyplot.close(figure)


def height_of(section: Section) -> float:
    """The height of a section's panel in inches."""
    return 5.0 if section.paths else 3.0 if section.curve else 0.9 + 0.32 * len(section.rows)


def draw_bars(panel: Any, section: Section) -> None:
    rows = [row for row in section.rows if "median" in row]
    medians = [row["median"] for row in rows]
    reaches = [[row["median"] - row["least"] for row in rows], [row["most"] - row["median"] for row in rows]]
    colours = ["#0072b2" if row["row"] != row.get("ratio_to") else "#999999" for row in rows]
    panel.barh([row["row"] for row in rows], medians, xerr=reaches, color=colours, capsize=2)
    for place, row in enumerate(rows):
        panel.text(row["most"], place, f"  {number(row['median'])}", va="center", fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlim(left=0)
    panel.set_xlabel(section.unit)


def draw_curve(panel: Any, section: Section) -> None:
    assert section.curve is not None
    x, y = section.curve
    places = [row[x] for row in section.rows]
    panel.plot(places, [row["loss"] for row in section.rows], color="#999999", linewidth=0.8, label="loss")
    panel.plot(places, [row[y] for row in section.rows], color="#0072b2", label=COLUMNS[y][0])
    if section.mark is not None:
        panel.axvline(section.mark, color="#d55e00", linestyle="--", label=f"suggestion {section.mark:.2g}")
    before_lowest = section.rows[: 1 + min(range(len(places)), key=lambda place: section.rows[place][y])]
    panel.set_ylim(0, 1.5 * max(row["loss"] for row in before_lowest))  # losses after the divergence are cut off
    panel.set_xscale("log")
    panel.set_xlabel(x)
    panel.set_ylabel("loss")
    panel.legend()


def draw_paths(panel: Any, section: Section) -> None:
    """Lines of mean test accuracy over mean seconds with standard deviations: ours solid, peers dashed."""
    for row in section.rows:
        if "points" not in row:
            continue
        means = {key: [point[key]["mean"] for point in row["points"]] for key in ("seconds", "test_accuracy")}
        deviations = [100 * (point["test_accuracy"]["deviation"] or 0.0) for point in row["points"]]
        line = "-" if row["row"].startswith("ours") else "--"
        accuracies = [100 * mean for mean in means["test_accuracy"]]
        panel.errorbar(means["seconds"], accuracies, deviations, label=row["row"], ls=line, marker="o", ms=4, lw=1.2, capsize=2)
    panel.set_xlim(left=0)
    panel.set_xlabel("seconds from the start of the process; the first point of a line is epoch 0")
    panel.set_ylabel("test accuracy (%)")
    panel.legend(fontsize=8)
