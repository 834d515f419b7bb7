"""Comparison of runs: settings in which they differ, repetitions, ranking."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.read_runs import RunRecord, Sweep
from pipeline.settings.config import FIELDS

OWN_TO_A_RUN = {
    "checkpoint_every_steps", "dry_run", "keep_checkpoints", "log_every", "log_model", "log_with", "output_dir", "project",
    "resume", "run_name", "seed",
}  # fmt: skip
FROM_THE_MODEL = {"channels_last"}  # null is filled in according to the model


def varied_settings(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which the runs that have them differ, in the order of Config, without those of OWN_TO_A_RUN.

    A trial that never became a run has the sweep's parameters alone. A setting of FROM_THE_MODEL is included only if runs of the
    same model differ in it.
    """
    names = [*FIELDS, *sorted({name for run in runs for name in run.settings} - FIELDS.keys())]
    return [name for name in names if name not in OWN_TO_A_RUN and is_varied(name, runs)]


def is_varied(name: str, runs: Sequence[RunRecord]) -> bool:
    found: dict[str, set[str]] = {}
    for run in runs:
        if name in run.settings:
            model = setting_text(run.settings.get("model_name")) if name in FROM_THE_MODEL else ""
            found.setdefault(model, set()).add(setting_text(run.settings[name]))
    return any(len(values) > 1 for values in found.values())


def setting_text(value: Any) -> str:
    """A setting's value as text, equal for equal values: numbers with four digits, null as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def repeated(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs grouped by all settings except OWN_TO_A_RUN (which includes the seed), in order of appearance."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        compared = {name: setting_text(value) for name, value in run.settings.items() if name not in OWN_TO_A_RUN}
        groups.setdefault(json.dumps(compared, sort_keys=True) if compared else run.name, []).append(run)
    return list(groups.values())


def strategy(run: RunRecord) -> str:
    """The origin of the weights: from scratch, pretrained, or the run or file of init_from."""
    if run.settings.get("pretrained"):
        return "pretrained"
    start = run.settings.get("init_from")
    if start:
        return f"from {Path(str(start)).name}"
    return "from scratch" if run.settings else "-"


def score(run: RunRecord, sweep: Sweep | None) -> float | None:
    """The value to rank by, larger is better: the best validation accuracy, or the metric of the sweep of all runs."""
    if sweep is None:
        return run.val_accuracy
    own = run.val_accuracy if sweep.metric == "val/accuracy" else None  # of a run in the sweep's folder that is no trial
    value = own if run.trial is None else run.trial.value
    return None if value is None else value if sweep.maximize else -value


def ranked(runs: Sequence[RunRecord], sweep: Sweep | None) -> list[RunRecord]:
    """The runs sorted: ended runs, best first, then runs that have not ended, then runs without a score."""

    def key(run: RunRecord) -> tuple[bool, bool, float]:
        value = score(run, sweep)
        return value is None, not run.ended, 0.0 if value is None else -value

    return sorted(runs, key=key)
