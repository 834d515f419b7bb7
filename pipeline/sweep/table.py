"""The tables of a sweep: trials.jsonl, the ranked results.csv, and tables in the terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from pipeline.common import console
from pipeline.common.files import to_json, write_atomically
from pipeline.sweep.file import Sweep
from pipeline.sweep.study import STATUS, reported
from pipeline.sweep.trials import best_value

FACTS = ("test_accuracy", "best_accuracy", "epochs", "seconds")
RANKED = ("completed", "stopped")


def run_dir_name(place: int) -> str:
    return f"trial-{place + 1:04d}"


def rows_of(places: Mapping[int, FrozenTrial], sweep: Sweep) -> list[dict[str, Any]]:
    """The lines of trials.jsonl, by number: number, status, params, run_dir, value, error, and FACTS of the run's summary.

    status: completed, stopped (by hyperband), failed, interrupted (to be resumed) or running.
    """
    rows = []
    for place, trial in sorted(places.items()):
        facts = trial.user_attrs
        completed = STATUS[trial.state] == "completed"
        value = trial.value if completed else best_value(reported(trial), sweep)
        error = facts.get("error") or ("Its agent died." if STATUS[trial.state] == "failed" else None)
        row = {"number": place + 1, "status": STATUS[trial.state], "params": facts.get("settings", {})}
        row |= {"run_dir": run_dir_name(place), "value": value, "error": error}
        rows.append(row | {key: facts.get(key) for key in FACTS})
    return rows


def ranked(rows: Sequence[dict[str, Any]], sweep: Sweep) -> list[dict[str, Any]]:
    """The rows with a rank, best first; then those without one (failed, interrupted, running) by number."""
    with_value = [row for row in rows if row["status"] in RANKED and row["value"] is not None]
    with_value.sort(key=lambda row: -row["value"] if sweep.maximize else row["value"])
    rest = [row for row in rows if row not in with_value]
    return [{"rank": rank, **row} for rank, row in enumerate(with_value, 1)] + [{"rank": None, **row} for row in rest]


def write_results(folder: Path, rows: Sequence[dict[str, Any]], sweep: Sweep) -> None:
    """Writes trials.jsonl and results.csv atomically; several agents may do so at the same time."""
    text = io.StringIO()
    columns = ["rank", "number", "status", *sweep.space.varied, sweep.metric, *FACTS, "run_dir", "error"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in ranked(rows, sweep):
        writer.writerow({**row, **row["params"], sweep.metric: row["value"]})
    lines = "".join(to_json(row) + "\n" for row in rows)
    write_atomically(folder / "trials.jsonl", lines.encode())
    write_atomically(folder / "results.csv", text.getvalue().encode())


def settings_in_words(params: Mapping[str, Any], sweep: Sweep) -> list[str]:
    return [shown(params.get(name)) for name in sweep.space.varied]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return console.percent(value) if metric.endswith("accuracy") else f"{value:.4f}"


def best_so_far(rows: Sequence[dict[str, Any]], sweep: Sweep) -> str:
    """The best value of the trials that have ended, such as `best val/accuracy 98.61 %`, for the progress bar."""
    best = next((row["value"] for row in ranked(rows, sweep) if row["rank"] == 1), None)
    return f"best {sweep.metric} {figure(best, sweep.metric)}"


def event_line(row: Mapping[str, Any], sweep: Sweep) -> str:
    """The line that is printed when a trial starts or ends."""
    settings = "  ".join(f"{name} {shown(row['params'].get(name))}" for name in sweep.space.varied)
    result = row["error"] if row["status"] == "failed" else f"{sweep.metric} {figure(row['value'], sweep.metric)}"
    after = f"  after {row['epochs']} epochs, {console.duration(row['seconds'])}" if row.get("epochs") else ""
    return f"{row['run_dir']}  {row['status']:<11}  {settings}  {result}{after}"


def result_table(rows: Sequence[dict[str, Any]], sweep: Sweep) -> str:
    """The ranked table for the terminal."""
    lines = [["rank", "trial", *sweep.space.varied, sweep.metric, "test accuracy", "time", "status"]]
    for row in ranked(rows, sweep):
        time = console.duration(row["seconds"]) if row["seconds"] else "-"
        status = row["status"] if row["error"] is None else f"{row['status']}: {row['error']}"
        rank, settings = str(row["rank"] or "-"), settings_in_words(row["params"], sweep)
        accuracy = console.percent(row["test_accuracy"])
        lines.append([rank, row["run_dir"], *settings, figure(row["value"], sweep.metric), accuracy, time, status])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
