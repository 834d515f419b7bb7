"""The tables of a report, and the CSV of all runs."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.common.console import duration, percent
from pipeline.pages.blocks import Cell, Row, Table, count, fraction, words
from pipeline.report.comparison import repeated, score, setting_text, strategy, varied_settings
from pipeline.report.read_runs import RunRecord, Sweep, number

ALWAYS_RANKED_BY = ("model_name", "optimizer", "lr", "batch_size")  # columns of the ranked table in any case
MOST_CONFUSIONS = 10

# the test figures beside accuracy and loss, by their names in a report
BALANCE = {"Balanced accuracy": "balanced_accuracy", "macro F1": "macro_f1", "area under the ROC curve": "roc_auc"}


def measured(figures: dict[str, Any] | None) -> Cell:
    """An accuracy with the half-width of its 95 % confidence interval, 1.96 sqrt(p (1 - p) / n)."""
    accuracy, n = number(figures, "accuracy"), number(figures, "num_samples")
    if accuracy is None or not n:
        return fraction(accuracy)
    margin = 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / n)
    return Cell(f"{percent(accuracy)} ± {100 * margin:.2f}", accuracy)


def time_cell(seconds: float | None) -> Cell:
    return Cell("-") if seconds is None else Cell(duration(seconds), seconds)


def memory_cell(run: RunRecord) -> Cell:
    value = number(run.facts, "peak_memory_bytes")
    return count(None if value is None else value / 2**20, ",.0f", " MiB")


def setting_cell(value: Any) -> Cell:
    is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(setting_text(value), value) if is_figure else words(setting_text(value))


def run_seconds(run: RunRecord) -> float | None:
    """The total seconds of the run so far, or None."""
    seconds = [line["seconds"] for line in (*run.epochs[-1:], *run.log[-1:])]
    return number(run.facts, "seconds") or max(seconds, default=None)


def run_rate(run: RunRecord) -> float | None:
    """Images per second of training over the whole run, or None."""
    return number(run.facts, "images_per_second") or number(run.log[-1] if run.log else None, "images_per_second")


def is_over(run: RunRecord, target: float | None) -> bool:
    return target is not None and run.test_accuracy is not None and run.test_accuracy >= target


def comparison_table(runs: Sequence[RunRecord], target: float | None) -> Table:
    """A row per run: origin of the weights, model, epochs, accuracies, time, throughput and memory."""
    rows = []
    for run in runs:
        planned = number(run.settings, "epochs")
        done = number(run.facts, "epochs") or len(run.epochs)
        epochs = f"{done:.0f}" if planned in (None, done) else f"{done:.0f} of {planned:.0f}"
        cells = (
            words(run.name),
            words(run.status),
            words(strategy(run)),
            words(str(run.settings.get("model_name", "-"))),
            fraction(run.val_accuracy),
            measured(run.test),
            count(number(run.best, "epoch")),
            Cell(epochs, done),
            time_cell(run_seconds(run)),
            count(run_rate(run)),
            memory_cell(run),
            count(number(run.facts, "image_size")),
            count(number(run.facts, "num_parameters")),
        )
        rows.append(Row(cells, run.name, is_over(run, target)))
    columns = (
        "run", "status", "strategy", "model", "best validation accuracy", "test accuracy", "best epoch", "epochs", "time",
        "images/s", "peak memory", "image size (pixels)", "parameters",
    )  # fmt: skip
    note = (
        "Test accuracy is that of the best epoch by validation, with the half-width of its 95 % confidence interval. "
        "Images per second are those of training. Peak memory is that of tensors on a GPU, or of the process on a CPU."
    )
    return Table("comparison", "Comparison of runs", note, columns, tuple(rows))


def ranked_table(best_first: Sequence[RunRecord], sweep: Sweep | None, target: float | None) -> Table:
    """The runs from best to worst, with the settings in which they differ. A run without a score has no rank.

    Runs of several sweeps, or of a sweep and from elsewhere, have a column with the name of their sweep.
    """
    names = list(ALWAYS_RANKED_BY) + [name for name in varied_settings(best_first) if name not in ALWAYS_RANKED_BY]
    sweep_column = len({run.sweep for run in best_first}) > 1
    metric = sweep.metric if sweep is not None else "validation accuracy"
    own_column = sweep is not None and metric != "val/accuracy"
    rows = []
    for rank, run in enumerate(best_first, 1):
        value = score(run, sweep)
        cells = [
            count(rank if value is not None and run.ended else None),
            words(run.name),
            *((words("-" if run.sweep is None else run.sweep.name),) if sweep_column else ()),
            words(run.status),
            *(setting_cell(run.settings.get(name)) for name in names),
            *((count(None if run.trial is None else run.trial.value, ".4g"),) if own_column else ()),
            fraction(run.val_accuracy),
            measured(run.test),
            time_cell(run_seconds(run)),
        ]
        cells += [words("yes" if is_over(run, target) else "no")] if target is not None else []
        rows.append(Row(tuple(cells), run.name, is_over(run, target)))
    columns = ["rank", "run", *(["sweep"] if sweep_column else []), "status", *(name.replace("_", " ") for name in names)]
    columns += [metric] if own_column else []
    columns += ["validation accuracy", "test accuracy", "time"]
    columns += [f"test accuracy at least {percent(target)}"] if target is not None else []
    over = sum(is_over(run, target) for run in best_first)
    lowest = sweep is not None and not sweep.maximize
    note = (
        f"Ranked by {metric}{', lowest first' if lowest else ''}. A ranking by validation does not use the test split, so the "
        "test accuracy of the first run is an unbiased estimate. Runs that failed, were interrupted or are running have no rank."
    )
    if target is not None:
        note += f" Marked: test accuracy of at least {percent(target)}, {over} of {len(best_first)} runs."
    return Table("ranking", "Ranking", note, tuple(columns), tuple(rows))


def group_name(group: Sequence[RunRecord], runs: Sequence[RunRecord]) -> str:
    """The name of a group of repeated runs: its values of the settings in which the groups differ."""
    bare = ("model_name", "optimizer", "dataset")  # settings whose values need no name
    several = [run for members in repeated(runs) if len(members) > 1 for run in members]
    names = sorted(varied_settings(several), key=lambda name: name not in bare)
    values = [(name, setting_text(group[0].settings.get(name))) for name in names]
    parts = [value if name in bare else f"{name} {value}" for name, value in values if value not in ("-", "{}")]
    return ", ".join(parts) or str(group[0].settings.get("model_name", group[0].name))


def seeds_table(runs: Sequence[RunRecord]) -> Table | None:
    """Mean and sample standard deviation over runs that differ by seed only; None without such runs."""
    rows = []
    for group in repeated(runs):
        ended = [run for run in group if run.ended]
        if len(ended) > 1:
            seeds = ", ".join(sorted(setting_text(run.settings.get("seed")) for run in ended))
            spreads = [
                spread([run.val_accuracy for run in ended], 100, " %"),
                spread([run.test_accuracy for run in ended], 100, " %"),
                spread([number(run.test, "loss") for run in ended], 1, ""),
            ]
            times = [seconds for run in ended if (seconds := run_seconds(run)) is not None]
            mean_time = statistics.mean(times) if times else None
            name = group_name(group, runs)
            rows.append(Row((words(name), count(len(ended)), words(seeds), *spreads, time_cell(mean_time))))
    columns = ("runs", "n", "seeds", "best validation accuracy", "test accuracy", "test loss", "mean time")
    note = "Runs that have ended and differ by seed only: mean ± sample standard deviation."
    return Table("seeds", "Repeated seeds", note, columns, tuple(rows)) if rows else None


def spread(values: Iterable[float | None], factor: float, unit: str) -> Cell:
    known = [factor * value for value in values if value is not None]
    if len(known) < 2:
        return Cell("-")
    mean = statistics.mean(known)
    digits = 2 if unit else 4
    return Cell(f"{mean:.{digits}f} ± {statistics.stdev(known):.{digits}f}{unit}", mean)


def efficiency_table(runs: Sequence[RunRecord]) -> Table:
    """A row per run: images per second, the share of time in training steps, memory, device."""
    rows = []
    for run in runs:
        seconds, rate, samples = run_seconds(run), run_rate(run), number(run.facts, "samples")
        share = samples / rate / seconds if seconds and rate and samples else None
        cells = (
            words(run.name),
            count(rate),
            time_cell(seconds),
            Cell("-") if share is None else Cell(f"{100 * share:.0f} %", share),
            memory_cell(run),
            count(number(run.facts, "skipped_steps")),
            words(str(run.facts.get("device", "-"))),
            count(number(run.facts, "num_processes")),
            words(str(run.facts.get("mixed_precision", "-"))),
        )
        rows.append(Row(cells, run.name))
    columns = (
        "run", "images/s in training", "time", "share in training steps", "peak memory", "skipped steps", "device",
        "processes", "precision",
    )  # fmt: skip
    note = "The rest of the time is evaluation, checkpoints and the test. Training steps include waiting for data."
    return Table("efficiency", "Throughput and efficiency", note, columns, tuple(rows))


def class_table(run: RunRecord, class_names: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    """A row per class: its test images, the correct ones, recall, precision, F1, and the most frequent wrong prediction."""
    rows = []
    predictions = [sum(column) for column in zip(*counts)]
    for place, name in enumerate(class_names):
        row = counts[place]
        total = sum(row)
        others = [(n, other) for other, n in enumerate(row) if other != place and n]
        most = max(others, key=lambda item: (item[0], -item[1]), default=None)
        wrong = "-" if most is None else f"{class_names[most[1]]} ({most[0]})"
        correct, predicted = row[place], predictions[place]
        shares = [
            fraction(part / whole if whole else None)
            for part, whole in ((correct, total), (correct, predicted), (2 * correct, total + predicted))
        ]
        rows.append(Row((words(name), count(total), count(correct), *shares, words(wrong))))
    columns = ("class", "test images", "correct", "recall", "precision", "F1", "most frequent wrong prediction")
    figures = {label: number(run.test, key) for label, key in BALANCE.items()}
    note = ", ".join(f"{label} {percent(value)}" for label, value in figures.items() if value is not None)
    return Table("classes", f"Recall, precision and F1 by class of {run.name}", note, columns, tuple(rows))


def confusions_table(class_names: Sequence[str], counts: Sequence[Sequence[int]]) -> Table | None:
    """The most frequent mistakes as pairs of classes; None without mistakes."""
    pairs = [
        (n, true, predicted)
        for true, row in enumerate(counts)
        for predicted, n in enumerate(row)
        if true != predicted and n
    ]
    wrong = sum(n for n, _, _ in pairs)
    rows = [
        Row((words(class_names[true]), words(class_names[predicted]), count(n), fraction(n / wrong)))
        for n, true, predicted in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))[:MOST_CONFUSIONS]
    ]
    columns = ("true class", "predicted class", "test images", "share of all mistakes")
    return Table("confusions", "Most frequent mistakes", "", columns, tuple(rows)) if rows else None


def unfinished_table(runs: Sequence[RunRecord]) -> Table | None:
    """Runs that have not ended or whose files are damaged, with their reasons; None without such runs."""
    rows = []
    for run in runs:
        reason = "; ".join((*([" ".join(run.reason.split())] if run.reason else []), *run.notes))
        if not run.ended or run.notes or run.status == "stopped":
            steps = max((line["step"] for line in (*run.epochs, *run.log)), default=0)
            cells = (words(run.name), words(run.status), count(len(run.epochs)), count(steps), words(reason or "-"))
            rows.append(Row(cells, run.name))
    note = (
        "running: its process is alive. unfinished: it has no summary, and no live process is known."
    )
    columns = ("run", "status", "finished epochs", "steps", "reason")
    return Table("unfinished", "Unfinished or damaged runs", note, columns, tuple(rows)) if rows else None


def results_csv(runs: Sequence[RunRecord], best_first: Sequence[RunRecord], sweep: Sweep | None) -> str:
    """A CSV line per run: figures (fractions, seconds, bytes), then every setting of any run."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rank = {run.name: place for place, run in enumerate(best_first, 1) if run.ended and score(run, sweep) is not None}
    figures = (
        "seconds", "images_per_second", "peak_memory_bytes", "num_parameters", "steps", "samples", "skipped_steps", "device",
        "num_processes",
    )  # fmt: skip
    own = ("run", "folder", "sweep", "status", "reason", "rank", "strategy", "finished_epochs", "image_size_used", "best_epoch")
    tested = ("accuracy", "top5_accuracy", "loss", *BALANCE.values())
    accuracies = ("best_val_accuracy", "best_val_loss", *(f"test_{key}" for key in tested))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, *accuracies, *figures, *(f"setting_{name}" for name in names)])
    for run in runs:
        sweep_name = run.sweep.name if run.sweep is not None else None
        values = [run.name, run.path, sweep_name, run.status, run.reason, rank.get(run.name), strategy(run), len(run.epochs)]
        values += [run.facts.get("image_size"), number(run.best, "epoch")]
        values += [run.val_accuracy, number(run.best, "loss")]
        values += [number(run.test, key) for key in tested]
        values += [run.facts.get(key) for key in figures]
        values += [csv_value(run.settings.get(name)) for name in names]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def csv_value(value: Any) -> Any:
    """A number, text or None unchanged, any other value as JSON."""
    return value if value is None or isinstance(value, (int, float, str)) else setting_text(value)
