"""Reads run folders, sweeps and folders of runs into a list of runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.report.read_runs import RunRecord, Trial, is_run, number, read_mapping, read_run


@dataclass(frozen=True)
class Sweep:
    """A sweep's file. metric: as in W&B, for example "val/accuracy"; maximize: whether a larger value is better."""

    path: Path
    method: str
    metric: str
    maximize: bool
    parameters: tuple[str, ...]


def read_records(paths: Sequence[Path]) -> tuple[list[RunRecord], Sweep | None]:
    """The runs of run folders, sweep folders and folders of runs, each once, and the sweep if exactly one was given.

    Raises ValueError, which names the path, if one contains no run.
    """
    found: dict[Path, RunRecord] = {}
    sweeps = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"There is no folder {path}. Pass run folders, a sweep's folder, or a folder of runs.")
        records = list(read_folder(path))
        if not records:
            raise ValueError(
                f"{path} holds no run: neither config.yaml nor metrics.jsonl, here or in the folders directly below. "
                "Pass run folders, a sweep's folder, or a folder of runs."
            )
        for record in records:
            found.setdefault(record.path.resolve(), record)
        if (path / "sweep.yaml").is_file():
            sweeps.append(read_sweep(path))
    return with_unique_names(list(found.values())), sweeps[0] if len(sweeps) == 1 else None


def read_folder(path: Path) -> Iterator[RunRecord]:
    """The run of a run folder, or all runs in a folder; a sweep's in the order of its trials, failed ones included."""
    if is_run(path):
        yield read_run(path)
        return
    trials = read_trials(path)
    runs = {run_dir for run_dir, _ in trials if is_run(run_dir)}
    for run_dir, trial in trials:
        yield with_trial(read_run(run_dir), trial) if run_dir in runs else without_run(run_dir, trial)
    for run_dir in sorted(path.iterdir()):
        if is_run(run_dir) and run_dir not in runs:
            yield read_run(run_dir)


def with_unique_names(records: list[RunRecord]) -> list[RunRecord]:
    """Prefixes runs of equal names with the name of their folder, and adds a number if that is not enough."""
    names = [record.name for record in records]
    longer = [
        f"{record.path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for record, name in zip(records, names)
    ]
    return [
        replace(record, name=f"{name} ({longer[:place].count(name) + 1})" if name in longer[:place] else name)
        for place, (record, name) in enumerate(zip(records, longer))
    ]


def read_sweep(path: Path) -> Sweep:
    """A sweep's sweep.yaml, with W&B's defaults for missing keys. Raises ValueError if it cannot be read."""
    notes: list[str] = []
    content = read_mapping(path / "sweep.yaml", notes)
    if notes:
        raise ValueError(f"{path / 'sweep.yaml'} cannot be read as YAML. Copy the sweep file there again.")
    metric = content.get("metric")
    metric = metric if isinstance(metric, dict) else {}
    parameters = content.get("parameters")
    return Sweep(
        path=path,
        method=str(content.get("method", "")),
        metric=str(metric.get("name", "val/accuracy")),
        maximize=metric.get("goal", "maximize" if "name" not in metric else "minimize") == "maximize",
        parameters=tuple(map(str, parameters)) if isinstance(parameters, dict) else (),
    )


def read_trials(path: Path) -> list[tuple[Path, Trial]]:
    """A sweep's trials with their run folders, by number; a later line of the same trial replaces an earlier one."""
    file = path / "trials.jsonl"
    trials: dict[int, tuple[Path, Trial]] = {}
    for text in file.read_bytes().decode(errors="replace").split("\n") if file.is_file() else []:
        try:
            line = json.loads(text)
            place = int(line["number"])
        except (ValueError, KeyError, TypeError):
            continue
        params = line.get("params")
        trials[place] = (
            path / str(line.get("run_dir") or f"trial-{place}"),
            Trial(
                number=place,
                status=str(line.get("status", "")),
                params=params if isinstance(params, dict) else {},
                value=number(line, "value"),
                error=str(line.get("error") or ""),
            ),
        )
    return [trials[place] for place in sorted(trials)]


def with_trial(record: RunRecord, trial: Trial) -> RunRecord:
    """The run with its trial, and with the trial's status and error if the run has not ended."""
    status = record.status if record.ended or not trial.status else trial.status
    return replace(record, trial=trial, status=status, reason=trial.error or record.reason)


def without_run(run_dir: Path, trial: Trial) -> RunRecord:
    """A record for a trial that ended before its run had a folder."""
    return RunRecord(
        run_dir.name, run_dir, trial.status or "unfinished", trial.error, settings=dict(trial.params), trial=trial
    )
