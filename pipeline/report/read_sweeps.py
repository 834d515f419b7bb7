"""Reads run folders, sweeps and folders of runs into a list of runs."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.common.console import warn
from pipeline.report.read_runs import RunRecord, Sweep, Trial, is_run, number, read_mapping, read_run

MOST_LEVELS = 4  # levels of folders below a given folder that are searched for runs
NO_RUNS_INSIDE = ("wandb",)  # W&B's own files include one named config.yaml
LOGARITHMIC = ("log_uniform", "inv_log_uniform", "log_normal", "q_log_")  # beginnings of W&B's names of distributions


def read_records(paths: Sequence[Path]) -> tuple[list[RunRecord], Sweep | None]:
    """The runs of run folders, sweep folders and folders of runs, each once, and their sweep.

    The sweep is None unless all runs belong to the same one and it has trials. Raises ValueError, which names the path, if one
    contains no run.
    """
    found: dict[Path, RunRecord] = {}
    nested = set()
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"There is no folder {path}. Pass run folders, a sweep's folder, or a folder of runs.")
        records = list(read_folder(path))
        if not records:
            raise ValueError(
                f"{path} holds no run: neither config.yaml nor metrics.jsonl, here or in the folders up to {MOST_LEVELS} levels "
                "below. Pass run folders, a sweep's folder, or a folder of runs."
            )
        nested |= {record.sweep.path for record in records if record.sweep is not None and record.sweep.path != path}
        for record in records:
            place = record.path.resolve()
            if place not in found or found[place].sweep is None:  # its folder may be given as well as its sweep's
                found[place] = record
    sweeps = {record.sweep for record in found.values()}
    records = with_unique_names(found, always_prefixed=bool(nested) or len(sweeps) > 1)
    sweep = records[0].sweep
    is_only = len(sweeps) == 1 and any(record.trial is not None for record in records)
    return records, sweep if is_only else None


def read_folder(path: Path, levels: int = MOST_LEVELS) -> Iterator[RunRecord]:
    """The run of a run folder, or all runs in a folder, followed by those in its other folders up to `levels` levels below.

    The runs of a sweep have the order of its trials, failed ones included. Hidden folders and links to folders of runs are
    skipped; a folder that cannot be read is skipped with a warning.
    """
    if is_run(path):
        yield read_run(path)
        return
    sweep = read_sweep(path) if (path / "sweep.yaml").is_file() else None
    trials = read_trials(path)
    runs = {run_dir for run_dir, _ in trials if is_run(run_dir)}
    for run_dir, trial in trials:
        record = with_trial(read_run(run_dir), trial) if run_dir in runs else without_run(run_dir, trial)
        yield replace(record, sweep=sweep)
    others = [folder for folder in folders_in(path) if folder not in runs]
    for run_dir in others:
        if is_run(run_dir):
            yield replace(read_run(run_dir), sweep=sweep)
    for folder in others:
        if levels > 0 and not folder.is_symlink() and not is_run(folder):
            yield from read_folder(folder, levels - 1)


def folders_in(path: Path) -> list[Path]:
    """The folders in a folder that may be or contain runs, sorted; empty, with a warning, if the folder cannot be read."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:
        warn(f"{path} cannot be read and is skipped: permission denied.")
        return []
    visible = [name for name in names if not name.startswith(".") and name not in NO_RUNS_INSIDE]
    return [path / name for name in sorted(visible) if os.access(path / name, os.X_OK)]


def with_unique_names(found: dict[Path, RunRecord], always_prefixed: bool) -> list[RunRecord]:
    """The runs and their sweeps with unique names: the ends of their paths, as short as they are unique.

    found: the runs by their resolved paths. always_prefixed: whether runs of sweeps have the sweep's folder in their names in
    any case.
    """
    paths = list(dict.fromkeys(run.sweep.path.resolve() for run in found.values() if run.sweep is not None))
    sweep_names = {path: unique_end(path, paths) for path in paths}
    records = []
    for path, run in found.items():
        name = unique_end(path, list(found), 2 if run.sweep is not None and always_prefixed else 1)
        sweep = None if run.sweep is None else replace(run.sweep, name=sweep_names[run.sweep.path.resolve()])
        records.append(replace(run, name=name, sweep=sweep))
    return records


def unique_end(path: Path, paths: Sequence[Path], fewest: int = 1) -> str:
    """The last parts of the path, at least `fewest`, as few as distinguish it from the other paths."""
    others = [other.parts for other in paths if other != path]
    num_parts = fewest
    while any(other[-num_parts:] == path.parts[-num_parts:] for other in others):
        num_parts += 1
    return "/".join(path.parts[-num_parts:])


def read_sweep(path: Path) -> Sweep:
    """A sweep's sweep.yaml, with W&B's defaults for missing keys. Raises ValueError if it cannot be read."""
    notes: list[str] = []
    content = read_mapping(path / "sweep.yaml", notes)
    if notes:
        raise ValueError(f"{path / 'sweep.yaml'} cannot be read as YAML. Copy the sweep file there again.")
    metric = content.get("metric")
    metric = metric if isinstance(metric, dict) else {}
    parameters = content.get("parameters")
    specs = parameters.items() if isinstance(parameters, dict) else ()
    distributions = {str(name): str(spec.get("distribution")) for name, spec in specs if isinstance(spec, dict)}
    return Sweep(
        name=path.resolve().name,
        path=path,
        method=str(content.get("method", "")),
        metric=str(metric.get("name", "val/accuracy")),
        maximize=metric.get("goal", "maximize" if "name" not in metric else "minimize") == "maximize",
        logarithmic=frozenset(name for name, kind in distributions.items() if kind.startswith(LOGARITHMIC)),
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
