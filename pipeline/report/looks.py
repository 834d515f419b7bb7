"""The looks of runs in the figures of a report, and their legend entries."""

from collections.abc import Sequence
from typing import Any

from pipeline.pages.figure_style import COLOURS, DASHES, MARKERS, MOST_NAMED, OTHERS, PAPER, Look, short
from pipeline.report.read_runs import RunRecord


def looks(groups: Sequence[Sequence[RunRecord]], best_first: Sequence[RunRecord]) -> dict[str, Look]:
    """A Look for each run, by name: the best MOST_NAMED runs have colours and legend entries, the others are grey.

    groups: the runs grouped by repetition; runs of a group share a colour and differ in dashes and markers.
    best_first: all runs in the order of the ranking; the index of a Look is the run's place in it.
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


def run_entries(runs: Sequence[RunRecord], look_of: dict[str, Look], both_splits: bool = False) -> list[Any]:
    """Legend entries of the named runs, for training and validation separately if both_splits."""
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
