"""Runs side by side: in which settings they differ, which are repetitions, which is best."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.read_runs import RunRecord
from pipeline.report.read_sweeps import Sweep
from pipeline.settings.config import FIELDS

OWN_TO_A_RUN = {
    "checkpoint_every_steps", "dry_run", "keep_checkpoints", "log_every", "log_with", "output_dir", "project", "resume",
    "run_name", "seed",
}  # fmt: skip
FROM_THE_MODEL = {"channels_last"}  # filled in by the kind of model where nobody sets them


def varied_settings(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which the runs differ, in the order of Config; names and folders of runs and seeds aside.

    A setting of FROM_THE_MODEL counts where runs of one model differ in it.
    """
    known = [run for run in runs if run.settings]
    names = [*FIELDS, *sorted({name for run in known for name in run.settings} - FIELDS.keys())]
    return [name for name in names if name not in OWN_TO_A_RUN and is_varied(name, known)]


def is_varied(name: str, runs: Sequence[RunRecord]) -> bool:
    found: dict[str, set[str]] = {}
    for run in runs:
        model = setting_text(run.settings.get("model_name")) if name in FROM_THE_MODEL else ""
        found.setdefault(model, set()).add(setting_text(run.settings.get(name)))
    return any(len(values) > 1 for values in found.values())


def setting_text(value: Any) -> str:
    """A setting's value as text: equal values, equal texts. Numbers as people write them, null as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def repeated(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs grouped by all settings but those of OWN_TO_A_RUN, so that a group's differ by seed; in order of appearance."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        compared = {name: setting_text(value) for name, value in run.settings.items() if name not in OWN_TO_A_RUN}
        groups.setdefault(json.dumps(compared, sort_keys=True) if compared else run.name, []).append(run)
    return list(groups.values())


def strategy(run: RunRecord) -> str:
    """Where the weights came from: from scratch, pretrained, or the run or file that init_from names."""
    if run.settings.get("pretrained"):
        return "pretrained"
    start = run.settings.get("init_from")
    if start:
        return f"from {Path(str(start)).name}"
    return "from scratch" if run.settings else "-"


def score(run: RunRecord, sweep: Sweep | None) -> float | None:
    """What runs are ranked by, larger being better: the sweep's metric, else the best validation accuracy."""
    if sweep is not None and run.trial is not None:
        return None if run.trial.value is None else run.trial.value if sweep.maximize else -run.trial.value
    return run.val_accuracy


def ranked(runs: Sequence[RunRecord], sweep: Sweep | None) -> list[RunRecord]:
    """The best first; runs that have not ended after those that have, and last those without a figure."""

    def key(run: RunRecord) -> tuple[bool, bool, float]:
        value = score(run, sweep)
        return value is None, not run.ended, 0.0 if value is None else -value

    return sorted(runs, key=key)
