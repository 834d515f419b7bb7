"""Figures: repeated seeds, importance, throughput, and one run's accuracy by class."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.common.console import percent
from pipeline.pages.confusion import MOST_CLASS_NAMES
from pipeline.pages.figure_style import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MOST_NAMED,
    Look,
    legend_below,
    new_figure,
    short,
    use_log_scale,
)
from pipeline.report.curves import in_unit, prepare_axis, time_unit
from pipeline.report.looks import num_others, run_entries
from pipeline.report.read_runs import RunRecord, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_GROUP_NAME = 80


def seed_bands(groups: Sequence[tuple[str, Sequence[RunRecord]]]) -> Figure | str | None:
    """Validation accuracy by epoch in percent: the mean over each group's seeds, with a band of one standard deviation.

    groups: name and runs; groups of a single run are omitted. An epoch is shown if at least two runs of the group have it.
    Returns a sentence if no group has two such epochs, None without groups.
    """
    repeats = [(name, runs, accuracies_by_epoch(runs)) for name, runs in groups if len(runs) > 1]
    if not repeats:
        return None
    shown = [group for group in repeats if len(group[2]) > 1][:MOST_NAMED]
    if not shown:
        return "There is no curve over repeated seeds: no two of them have two epochs in common."
    figure, axes = new_figure("Validation accuracy over repeated seeds: mean and standard deviation")
    for place, (name, runs, by_epoch) in enumerate(shown):
        epochs = list(by_epoch)
        means = np.array([statistics.mean(by_epoch[epoch]) for epoch in epochs])
        spreads = np.array([statistics.stdev(by_epoch[epoch]) for epoch in epochs])
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axes.fill_between(epochs, means - spreads, means + spreads, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            epochs, means, color=colour, marker=marker, label=f"{short(name, LONGEST_GROUP_NAME)} (n = {len(runs)})"
        )
    prepare_axis(axes, "epoch", "")
    axes.set_ylabel("validation accuracy (%)")
    legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


def accuracies_by_epoch(runs: Sequence[RunRecord]) -> dict[int, list[float]]:
    """The validation accuracies in percent of each epoch that at least two of the runs have, in the order of the epochs."""
    by_epoch: dict[int, list[float]] = {}
    for entry in (entry for run in runs for entry in run.epochs):
        value = in_unit(entry["val"], "accuracy")
        if value is not None:
            by_epoch.setdefault(entry["epoch"], []).append(value)
    return {epoch: by_epoch[epoch] for epoch in sorted(by_epoch) if len(by_epoch[epoch]) > 1}


def throughput(runs: Sequence[RunRecord], look_of: dict[str, Look]) -> Figure | str:
    """Images per second of training in each epoch; a sentence if no run has logged it for two epochs."""
    shown = [run for run in runs if epoch_rates(run)]
    if all(len(epoch_rates(run)) < 2 for run in shown):
        return "There is no curve of the throughput: no run has logged it for two epochs."
    figure, axes = new_figure("Throughput in training by epoch")
    for run in shown:
        look, rates = look_of[run.name], epoch_rates(run)
        axes.plot(list(rates), list(rates.values()), marker=look.marker, **look.line("throughput"))
    prepare_axis(axes, "epoch", "")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_below(figure, run_entries(shown, look_of), num_others(shown, look_of))
    return figure


def epoch_rates(run: RunRecord) -> dict[int, float]:
    """Images per second of training in each finished epoch, by epoch.

    A training line has the rate since the start, so the seconds of training so far are its samples divided by its rate.
    """
    ends = {line["epoch"]: line for line in run.log if number(line, "images_per_second") and number(line, "samples")}
    rates, samples, seconds = {}, 0.0, 0.0
    for epoch in sorted(ends.keys() & {entry["epoch"] for entry in run.epochs}):
        line = ends[epoch]
        until = line["samples"] / line["images_per_second"]
        if until > seconds and line["samples"] > samples:
            rates[epoch] = (line["samples"] - samples) / (until - seconds)
        samples, seconds = line["samples"], until
    return rates


def accuracy_against_time(runs: Sequence[RunRecord], look_of: dict[str, Look]) -> Figure | str | None:
    """Test accuracy by time, a marker per tested run; a sentence if there are no two, or all are equal; None for one run."""
    shown = [run for run in runs if run.test_accuracy is not None and number(run.facts, "seconds")]
    if len(runs) < 2:
        return None
    seconds = [run.facts["seconds"] for run in shown]
    if len({(run.test_accuracy, run.facts["seconds"]) for run in shown}) < 2:
        return "Test accuracy is not drawn against time: there are no two tested runs that differ in either."
    unit, unit_name = time_unit(max(seconds))
    figure, axes = new_figure("Test accuracy against time")
    for run in shown:
        look = look_of[run.name]
        mark = {"marker": look.marker or ".", "markersize": 8 if look.named else 6, "linestyle": ""}
        axes.plot([run.facts["seconds"] / unit], [in_unit(run.test or {}, "accuracy")], **{**look.line("time"), **mark})
    if max(seconds) > 10 * min(seconds):
        use_log_scale(axes, "x")
    axes.set_xlabel(f"total time ({unit_name})")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(0.08)
    legend_below(figure, run_entries(shown, look_of), num_others(shown, look_of))
    return figure


def importance_bars(shares: dict[str, float]) -> Figure | None:
    """A bar per setting: the share of the variance of the results that it explains, in percent; None if all are 0."""
    if not any(shares.values()):
        return None
    figure, axes = new_figure("Importance of each setting", height=1.5 + 0.34 * len(shares))
    names = [name.replace("_", " ") for name in shares]
    bars = axes.barh(names, [100 * share for share in shares.values()], color=COLOURS[0], height=0.62)
    axes.bar_label(bars, fmt="%.0f", padding=3, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the variance of the results (omega squared, %)")
    return figure


def class_accuracies(
    accuracies: dict[str, float], run_name: str, label_of: Mapping[str, str]
) -> Figure | str | None:
    """A dot per class, lowest accuracy first, at most MOST_CLASS_NAMES of them; in percent.

    label_of: what the axis shows for each class. Returns a sentence if all accuracies are equal, None without any.
    """
    if not accuracies:
        return None
    if len(set(accuracies.values())) == 1:
        name, value = next(iter(accuracies.items()))
        which = f"of all {len(accuracies)} classes" if len(accuracies) > 1 else f"of {name}, the only class with test images,"
        return f"The test accuracy {which} is {percent(value)}."
    hardest = sorted(accuracies.items(), key=lambda item: item[1])[:MOST_CLASS_NAMES]
    which = (
        "by class" if len(hardest) == len(accuracies) else f"of the {len(hardest)} lowest of {len(accuracies)} classes"
    )
    figure, axes = new_figure(f"Test accuracy {which}, {short(run_name)}", height=1.4 + 0.23 * len(hardest))
    names = [short(label_of[name]) for name, _ in hardest]
    values = [100 * value for _, value in hardest]
    left = max(min(values) - 5, 0)
    axes.hlines(range(len(names)), left, values, color=FAINT, linewidth=1)
    axes.plot(values, range(len(names)), "o", color=COLOURS[0], markersize=6, linestyle="", clip_on=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy (%)")
    return figure
