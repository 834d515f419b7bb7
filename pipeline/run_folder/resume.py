"""Resuming a run: compares its settings, checks whether it has ended, finds the checkpoints to resume from."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoints, read_facts, recover
from pipeline.run_folder.paths import metrics_path
from pipeline.settings.config import DEFAULTS, FIELDS, Config
from pipeline.settings.parser import from_yaml

# Settings that may change on resume: they change results by rounding only.
FREE_SETTINGS = {
    "channels_last", "checkpoint_every_steps", "dry_run", "keep_checkpoints", "loader", "log_every", "log_model",
    "log_with", "micro_batch_size", "num_workers", "output_dir", "project", "resume", "run_name",
}  # fmt: skip


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that are fixed for a run, as values of JSON."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}
    settings["time_limit"] = config.time_limit_seconds
    # the stream loader has its own data order; the other loaders share one
    settings["loader"] = config.loader if config.loader == "stream" else DEFAULTS.loader
    fixed: dict[str, Any] = json.loads(json.dumps(settings))
    return fixed


def with_epochs(config: Config) -> Config:
    """The settings with the number of epochs filled in; null remains for a new run with time_limit, which chooses it.

    A run that has begun has written its choice to config.yaml. It is kept unless the settings allow fewer epochs.
    """
    if config.time_limit is None:
        return dataclasses.replace(config, epochs=config.num_epochs)
    if not has_begun(config):
        return config
    chosen = from_yaml(config.run_dir / "config.yaml").num_epochs
    return config if config.epochs is not None and config.epochs < chosen else dataclasses.replace(config, epochs=chosen)


def has_begun(config: Config) -> bool:
    """Whether the run has taken steps, or is about to: metrics.jsonl is created after its settings are final."""
    return metrics_path(config.run_dir).is_file() and (config.run_dir / "config.yaml").is_file()


def changed_settings(recorded: Mapping[str, Any], config: Config) -> str:
    """The fixed settings that differ, such as `lr 0.05 -> 0.1, seed 0 -> 1`; empty if none does.

    recorded: the fixed settings of the run. A setting that is missing there, because an earlier version wrote it, counts as
    its default.
    """
    now, defaults = fixed_settings(config), fixed_settings(DEFAULTS)
    for name in ("batch_size", "freeze_batchnorm", "mixed_precision"):  # null resolves to the same value again
        if now[name] is None:
            now.pop(name)
    if recorded.get("mixed_precision") is None:  # an earlier version wrote null, whatever the launcher chose
        now.pop("mixed_precision", None)
    for name in ("dataset", "init_from"):
        if is_same_path(recorded.get(name), now[name], may_move=name == "dataset"):
            now.pop(name)
    pairs = {name: (recorded.get(name, defaults[name]), now[name]) for name in FIELDS if name in now}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def is_same_path(recorded: Any, now: Any, may_move: bool) -> bool:
    """Whether two settings are the same path, which earlier versions recorded as it was passed.

    may_move: whether any two absolute paths will do, as of a dataset, whose images are compared instead.
    """
    if not isinstance(recorded, str) or not isinstance(now, str) or not os.path.isabs(now):
        return False
    return os.path.abspath(os.path.expanduser(recorded)) == now or may_move and os.path.isabs(recorded)


def is_moved(config: Config) -> bool:
    """Whether the settings name another folder of the dataset than the run's config.yaml."""
    path = config.run_dir / "config.yaml"
    recorded = from_yaml(path).dataset if path.is_file() else config.dataset
    return recorded != config.dataset and not is_same_path(recorded, config.dataset, may_move=False)


def check_same_settings(config: Config) -> None:
    """Raises ValueError if the run was started with other settings, apart from FREE_SETTINGS."""
    path = config.run_dir / "config.yaml"
    changed = changed_settings(fixed_settings(from_yaml(path)), config) if path.is_file() else ""
    if changed:
        raise ValueError(
            f"{config.run_dir} was started with other settings: {changed}. "
            f"Keep its settings, or choose another run_name{weights_advice(config.run_dir)}."
        )


def weights_advice(run_dir: Path) -> str:
    """How to start a new run from the weights of a run; empty if it has saved none."""
    source = run_dir if (run_dir / "model" / "model.safetensors").is_file() else next(iter(checkpoints(run_dir)), None)
    return f" and start it from these weights with --init_from {source}" if source else ""


def ended_summary(config: Config) -> dict[str, Any] | None:
    """The summary of a run that this command would resume but that has completed or stopped early, else None.

    Raises ValueError if the run was started with other settings.
    """
    path = config.run_dir / "summary.json"
    if config.resume != "auto" or config.dry_run or not path.is_file():
        return None
    check_same_settings(config)
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary if summary["status"] in ("completed", "early_stopped") else None
    except (ValueError, KeyError, TypeError):
        return None  # damaged: the run resumes from its checkpoints and writes the summary again


def find_starts(config: Config) -> tuple[list[Path], list[str]]:
    """The intact checkpoints to resume from, in the order to try them, and a message for each skipped one.

    Both lists are empty for a new run. Raises ValueError if the run must not be resumed or has no intact checkpoint left.
    """
    recover(config.run_dir)
    if config.resume not in ("auto", "never"):
        given = Path(config.resume)
        if given.resolve().parent.parent != config.run_dir.resolve():
            raise ValueError(
                f"resume {given} does not belong to the run {config.run_dir}. Pass the --output_dir and --run_name of its run, "
                f"or start a new run from its weights with --init_from {given / 'model.safetensors'}."
            )
        check_continues(given, config)
        return [given], []
    if config.resume == "never":
        if (config.run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"{config.run_dir} already holds a run and resume is never. Choose another run_name, or --resume auto."
            )
        return [], []
    intact, skipped = [], []
    for folder in checkpoints(config.run_dir):
        try:
            check_continues(folder, config)
            intact.append(folder)
        except BadCheckpoint as error:
            skipped.append(f"Skipped {error}.")
    if skipped and not intact:
        raise ValueError(f"{' '.join(skipped)} {nothing_left(config)}")
    return intact, skipped


def nothing_left(config: Config) -> str:
    return (
        f"{config.run_dir} has no intact checkpoint left. Delete the folder to start again, or choose another run_name."
    )


def check_continues(folder: Path, config: Config) -> None:
    """Raises BadCheckpoint unless every file of the checkpoint is intact and its run has the same fixed settings."""
    changed = changed_settings(read_facts(folder).get("settings", {}), config)
    if changed:
        raise BadCheckpoint(f"{folder}: it belongs to another run ({changed})")


def set_newer_aside(run_dir: Path, step: int) -> None:
    """Renames the checkpoints after `step` to skipped-*, because the run will write these steps again. Deletes none."""
    for newer in checkpoints(run_dir):
        if int(newer.name.removeprefix("step-")) > step:
            aside = newer.with_name(f"skipped-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
