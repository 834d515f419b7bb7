"""The content of a report: builds sections of tables, figures and sentences from runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.console import percent
from pipeline.pages.blocks import Block, Figure, Gallery, Page, Picture, Section, Views
from pipeline.pages.confusion import LARGEST_MATRIX, MOST_CLASS_NAMES, confusion_matrix
from pipeline.pages.drawing import Drawing
from pipeline.pages.figure_style import Look
from pipeline.pages.fonts import undrawable
from pipeline.report.charts import accuracy_against_time, class_accuracies, importance_bars, seed_bands, throughput
from pipeline.report.comparison import ranked, repeated, score, setting_text, varied_settings
from pipeline.report.curves import AXES, curves, schedules
from pipeline.report.importance import FEWEST_RUNS, importances
from pipeline.report.looks import looks
from pipeline.report.parallel import parallel_coordinates
from pipeline.report.read_runs import RunRecord, Sweep, number
from pipeline.report.tables import (
    class_table,
    comparison_table,
    confusions_table,
    efficiency_table,
    group_name,
    is_over,
    measured,
    ranked_table,
    seeds_table,
    unfinished_table,
)

if TYPE_CHECKING:
    from pipeline.inference.mistakes import Mistake

MOST_PARALLEL = 8  # axes of settings in the parallel coordinates


@dataclass(frozen=True)
class Report:
    """page, looks: the arguments of pages.html_page; files: the content of figures/ by file name."""

    page: Page
    looks: dict[str, Look]
    files: dict[str, bytes]


def make_report(
    runs: Sequence[RunRecord], sweep: Sweep | None, target: float | None, mistakes: tuple[list[Mistake], int] | None
) -> Report:
    """The report on at least one run. mistakes: of the best tested run, with their total number; None to omit them."""
    best_first = ranked(runs, sweep)
    look_of = looks(repeated(runs), best_first)
    tested = best_tested(runs, sweep)
    drawing = Drawing(shown_texts(runs, tested))
    sections = [section("comparison", "Comparison of runs", comparison_table(runs, target))]
    if len(runs) > 1:
        sections.append(section("ranking", "Ranking", ranked_table(best_first, sweep, target)))
    sections += [
        curves_section(runs, look_of, drawing),
        seeds_section(runs, drawing),
        settings_section(best_first, sweep, look_of, drawing),
        efficiency_section(runs, look_of, drawing),
    ]
    if tested is not None:
        sections.append(test_section(tested, drawing))
        if mistakes is not None:
            sections.append(mistakes_section(tested, *mistakes, drawing))
    sections.append(section("unfinished", "Unfinished or damaged runs", unfinished_table(runs)))
    filled = tuple(part for part in sections if part.blocks)
    title = f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs"
    return Report(Page(title, overview(runs, target, tested), filled), look_of, drawing.files)


def shown_texts(runs: Sequence[RunRecord], tested: RunRecord | None) -> list[str]:
    """The texts of runs that figures show: names, settings, and the classes of the tested run."""
    classes = (tested.test or {}).get("per_class_accuracy") if tested is not None else None
    class_names = [str(name) for name in classes] if isinstance(classes, dict) else []
    settings = [setting_text(value) for run in runs for value in run.settings.values()]
    return [run.name for run in runs] + settings + class_names


def section(id: str, title: str, *blocks: Block | None) -> Section:
    return Section(id, title, tuple(block for block in blocks if block is not None))


def best_tested(runs: Sequence[RunRecord], sweep: Sweep | None) -> RunRecord | None:
    """The highest ranked run that was tested, or None."""
    return next((run for run in ranked(runs, sweep) if run.test is not None), None)


def overview(
    runs: Sequence[RunRecord], target: float | None, tested: RunRecord | None
) -> tuple[tuple[str, str], ...]:
    """The overview at the top of the page, as pairs of term and text."""
    states = Counter(run.status for run in runs)
    terms = [("Runs", ", ".join(f"{count} {status}" for status, count in sorted(states.items())))]
    sweeps = Counter(run.sweep for run in runs if run.sweep is not None)
    goals = [
        f"{sweep.name}: {sweep.method}, {'maximize' if sweep.maximize else 'minimize'} {sweep.metric}, {count} runs"
        for sweep, count in sweeps.items()
    ]
    terms.append(("Sweep" if len(goals) == 1 else "Sweeps", "; ".join(goals)))
    terms.append(("Dataset", joined(run.settings.get("dataset") for run in runs)))
    if tested is not None:
        text = f"{tested.name}, validation accuracy {percent(tested.val_accuracy)}, test {measured(tested.test).text}"
        terms.append(("Best by validation" if len(runs) > 1 else "Result", text))
    if target is not None:
        over = sum(is_over(run, target) for run in runs)
        terms.append(("Target", f"{over} of {len(runs)} runs have a test accuracy of at least {percent(target)}"))
    terms.append(("Device", joined(run.facts.get("device") for run in runs)))
    versions = [run.facts["versions"] for run in runs if isinstance(run.facts.get("versions"), dict)]
    terms.append(
        ("Versions", joined(", ".join(f"{name} {version}" for name, version in each.items()) for each in versions))
    )
    return tuple((term, text) for term, text in terms if text)


def joined(values: Any) -> str:
    """The distinct values in order of appearance, without None."""
    return "; ".join(dict.fromkeys(str(value) for value in values if value is not None))


def views(drawing: Drawing, stem: str, alt: str, draw: Callable[[str], Any]) -> Views | str | None:
    """A figure for each of AXES that has one; if none has, the sentence or None of the last."""
    drawn, other = {}, None
    for axis in AXES:
        figure = drawing.figure(f"{stem}_by_{axis}", f"{alt} by {axis}", lambda: draw(axis))
        if isinstance(figure, Figure):
            drawn[axis] = figure
        else:
            other = figure
    return Views(drawn) if drawn else other


def curves_section(runs: Sequence[RunRecord], look_of: dict[str, Look], drawing: Drawing) -> Section:
    alt = "of each run in training and validation"
    return section(
        "curves",
        "Curves",
        views(drawing, "accuracy", f"Accuracy {alt}", lambda axis: curves(runs, look_of, "accuracy", axis)),
        views(drawing, "loss", f"Loss {alt}", lambda axis: curves(runs, look_of, "loss", axis)),
        views(
            drawing,
            "learning_rate",
            "Learning rate and batch size of each run",
            lambda axis: schedules(runs, look_of, axis),
        ),
    )


def seeds_section(runs: Sequence[RunRecord], drawing: Drawing) -> Section:
    groups = [(group_name(group, runs), group) for group in repeated(runs)]
    bands = drawing.figure(
        "seeds", "Mean and standard deviation of the validation accuracy by epoch", lambda: seed_bands(groups)
    )
    return section("seeds", "Repeated seeds", seeds_table(runs), bands)


def settings_section(
    best_first: Sequence[RunRecord], sweep: Sweep | None, look_of: dict[str, Look], drawing: Drawing
) -> Section:
    """Parallel coordinates and importance of the settings, over the runs that have ended."""
    if len(best_first) < 2:
        return section("settings", "Settings and results")
    compared = [run for run in best_first if run.ended and score(run, sweep) is not None]
    names = varied_settings(compared) if compared else []
    signed = [score(run, sweep) or 0.0 for run in compared]
    sign = 1 if sweep is None or sweep.maximize else -1
    if sweep is not None and sweep.metric != "val/accuracy":
        label, values = sweep.metric, [sign * value for value in signed]
    else:
        label, values = "validation accuracy (%)", [100 * sign * value for value in signed]
    logarithmic = {name for run in compared if run.sweep is not None for name in run.sweep.logarithmic}
    shares = (
        importances([{name: run.settings.get(name) for name in names} for run in compared], values) if names else {}
    )
    shown = [name for name in names if name in list(shares)[:MOST_PARALLEL]] if shares else names[:MOST_PARALLEL]
    lines = drawing.figure(
        "parallel_coordinates",
        f"One line per run through its settings to its {label}",
        lambda: parallel_coordinates(compared, shown, values, label, look_of, sign > 0, logarithmic),
    )
    bars = drawing.figure(
        "importance", "Share of the variance of the results by setting", lambda: importance_bars(shares)
    )
    if not isinstance(lines, Figure):
        return section("settings", "Settings and results", lines)
    note = (
        f"Importance is omega squared: the share of the variance of {label.removesuffix(' (%)')} over {len(compared)} runs "
        "that the values of one setting explain, corrected for chance. It measures the effect of each setting alone; settings "
        "that were varied together share their effect. Other seeds and chance cause the variance that no setting explains."
    )
    if shares and not any(shares.values()):
        note += " No setting has an effect beyond chance here."
    few = f"The importance of settings requires at least {FEWEST_RUNS} runs that have ended, with different results."
    return section("settings", "Settings and results", lines, note if shares else few, bars)


def efficiency_section(runs: Sequence[RunRecord], look_of: dict[str, Look], drawing: Drawing) -> Section:
    return section(
        "efficiency",
        "Throughput and efficiency",
        efficiency_table(runs),
        drawing.figure("throughput", "Images per second by epoch of each run", lambda: throughput(runs, look_of)),
        drawing.figure(
            "accuracy_against_time",
            "Test accuracy of each run by its time",
            lambda: accuracy_against_time(runs, look_of),
        ),
    )


def test_section(run: RunRecord, drawing: Drawing) -> Section:
    """Confusion matrix and classes of one tested run; empty without a valid matrix for its classes in its summary."""
    test = run.test or {}
    accuracies = test.get("per_class_accuracy")
    title = f"Test of {run.name}"
    matrix = counts_of(test.get("confusion_matrix"), len(accuracies)) if isinstance(accuracies, dict) else None
    if not isinstance(accuracies, dict) or matrix is None:
        return section("test", title)
    names = [str(name) for name in accuracies]
    known = {name: value for name in names if (value := number(accuracies, name)) is not None}
    missing = undrawable("".join(names), drawing.families)
    labels = [str(place) for place in range(len(names))] if missing else names
    drawn: Block | None = f"The confusion matrix of {len(names)} classes is not drawn; the most are {LARGEST_MATRIX}."
    if len(names) <= LARGEST_MATRIX:
        alt = "Confusion matrix: true classes by predicted classes"
        drawn = drawing.figure("confusion_matrix", alt, lambda: confusion_matrix(np.array(matrix), labels, run.name))
    dots = drawing.figure(
        "classes", "Test accuracy by class, lowest first", lambda: class_accuracies(known, run.name, dict(zip(names, labels)))
    )
    is_numbered = isinstance(drawn, Figure) and (bool(missing) or len(names) > MOST_CLASS_NAMES)
    legend = numbered_classes(names, missing) if is_numbered else None
    return section("test", title, drawn, legend, confusions_table(names, matrix), class_table(run, names, matrix), dots)


def numbered_classes(names: Sequence[str], missing: set[str]) -> str:
    """The classes by the numbers that the axes show. missing: characters of the names that no installed font has."""
    numbered = f"Classes by number: {', '.join(f'{place} {name}' for place, name in enumerate(names))}."
    if not missing:
        return numbered
    shown = "".join(sorted(missing)[:10])
    return (
        f"{numbered} The figures show numbers because no installed font has the characters {shown}. To see the names, install "
        "a font that has them, for example Noto Sans CJK."
    )


def counts_of(value: Any, size: int) -> list[list[int]] | None:
    """The value if it is a list of `size` lists of `size` counts with size > 0; else None."""
    is_matrix = (
        isinstance(value, list)
        and len(value) == size > 0
        and all(isinstance(row, list) and len(row) == size for row in value)
        and all(isinstance(count, int) and count >= 0 for row in value for count in row)
    )
    return value if is_matrix else None


def mistakes_section(run: RunRecord, mistakes: list[Mistake], total: int, drawing: Drawing) -> Section:
    pictures = []
    for place, mistake in enumerate(mistakes, 1):
        stem = f"mistake_{place:02d}"
        drawing.files[f"{stem}.png"] = mistake.png
        lines = (
            f"{mistake.predicted}: {percent(mistake.confidence)}",
            f"true: {mistake.true}, {percent(mistake.true_probability)}",
            mistake.where,
        )
        alt = f"Test image of class {mistake.true}, predicted as {mistake.predicted}"
        pictures.append(Picture(stem, alt, lines, mistake.png))
    note = f"{run.name} misclassified {total:,} test images."
    if mistakes:
        note += f" These are the {len(mistakes)} with the highest probability of the wrong class."
    return section("mistakes", "Most confident mistakes", note, Gallery(tuple(pictures)) if pictures else None)
