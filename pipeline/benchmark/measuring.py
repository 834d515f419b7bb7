"""Measurements in turns, summarised as rows (median, least, most, n, ratio) of a section."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.console import progress_bar

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table and one part of the chart.

    rows: dicts with a row's name under "row"; unit: of their medians; notes: lines below the table;
    curve: the keys of x and y if the rows are points of a curve; mark: an x to mark on it; group: of several sections of one
    title, the rows that were measured together; paths: whether each row has points of test accuracy over seconds, which the
    chart draws as a line; written: whether the rows are from the file of an earlier call.
    """

    title: str
    rows: list[Row]
    unit: str = ""
    notes: list[str] = field(default_factory=list)
    curve: tuple[str, str] | None = None
    mark: float | None = None
    group: str | None = None
    paths: bool = False
    written: bool = False


def with_notes(section: Section) -> list[Row]:
    """The rows of a section; the first one has its notes, if there are any."""
    if not section.notes:
        return section.rows
    return [{**row, "notes": section.notes} if row is section.rows[0] else row for row in section.rows]


def summarise(
    samples: Mapping[str, Sequence[float]], unit: str, reference: str, extras: Mapping[str, Row] | None = None
) -> list[Row]:
    """A row per name: median, least, most, n, the samples, and the ratio of its median to the reference's.

    Names without samples are omitted. extras: further figures of a row, by its name.
    """
    medians = {name: statistics.median(values) for name, values in samples.items() if values}
    return [
        {"row": name, "unit": unit, "median": median, "least": min(samples[name]), "most": max(samples[name])}
        | {"n": len(samples[name]), "ratio": median / medians[reference], "ratio_to": reference}
        | {"samples": list(samples[name]), **(extras or {}).get(name, {})}
        for name, median in medians.items()
    ]


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """The results of the calls, by name, over `rounds` rounds in the order A B C A B C ...

    Other load on the machine then affects all calls alike. Shows a progress bar.
    """
    results: dict[str, list[Any]] = {name: [] for name in calls}
    with progress_bar(rounds * len(calls), 0, "measuring", shown=True) as bar:
        for _ in range(rounds):
            for name, call in calls.items():
                results[name].append(call())
                bar.update()
    return results


def column(results: Mapping[str, Iterable[Row]], key: str) -> dict[str, list[float]]:
    """One figure of all results, by row name."""
    return {name: [result[key] for result in of_name] for name, of_name in results.items()}


def largest(results: Iterable[Row], key: str) -> float | None:
    """The largest value of a figure, None if it was not measured."""
    return max((result[key] for result in results if result.get(key) is not None), default=None)
