"""Where a run goes on from: what it was begun with, whether it has ended, which of its checkpoints may continue it."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoints, read_facts, recover
from pipeline.settings.config import DEFAULTS, FIELDS, Config
from pipeline.settings.parser import from_yaml

# Settings that a run may change when it goes on: they move no figure by more than rounding.
FREE_SETTINGS = {
    "channels_last", "checkpoint_every_steps", "dry_run", "keep_checkpoints", "loader", "log_every", "log_with",
    "micro_batch_size", "num_workers", "output_dir", "project", "resume", "run_name",
}  # fmt: skip


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a run keeps from its beginning to its end, as JSON holds them."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}
    # the stream has an order of its own; all other loaders share one
    settings["loader"] = config.loader if config.loader == "stream" else DEFAULTS.loader
    fixed: dict[str, Any] = json.loads(json.dumps(settings))
    return fixed


def changed_settings(begun: Mapping[str, Any], config: Config) -> str:
    """`lr 0.05 -> 0.1` and so on for the fixed settings that differ; empty where none does.

    A setting that `begun` does not know, because an earlier version wrote it, counts as its default.
    """
    now, defaults = fixed_settings(config), fixed_settings(DEFAULTS)
    if config.batch_size is None:  # null is filled in alike
        now.pop("batch_size")
    pairs = {name: (begun.get(name, defaults[name]), now[name]) for name in FIELDS if name in now}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def check_same_settings(config: Config) -> None:
    """Raises ValueError when the run was begun with other settings than these, apart from FREE_SETTINGS."""
    path = config.run_dir / "config.yaml"
    changed = changed_settings(fixed_settings(from_yaml(path)), config) if path.is_file() else ""
    if changed:
        raise ValueError(
            f"{config.run_dir} was begun with other settings: {changed}. "
            f"Leave them as they were, choose another run_name, or start from its weights with --init_from {config.run_dir}."
        )


def ended_summary(config: Config) -> dict[str, Any] | None:
    """The summary of the run if it would go on and has ended by itself, else None.

    Raises ValueError when it was begun with other settings.
    """
    path = config.run_dir / "summary.json"
    if config.resume != "auto" or config.dry_run or not path.is_file():
        return None
    check_same_settings(config)
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary if summary["status"] in ("completed", "early_stopped") else None
    except (ValueError, KeyError, TypeError):
        return None  # damaged: the checkpoints know better, and the run's end writes it anew


def find_starts(config: Config) -> tuple[list[Path], list[str]]:
    """The whole checkpoints that the run may go on from, the one to try first first, and a sentence for each passed over.

    None for a new run. Raises ValueError when the run must not go on or has nothing left to go on from.
    """
    recover(config.run_dir)
    if config.resume not in ("auto", "never"):
        given = Path(config.resume)
        if given.resolve().parent.parent != config.run_dir.resolve():
            raise ValueError(
                f"resume {given} belongs to another run than {config.run_dir}. Give its --output_dir and --run_name too, "
                f"or start anew from its weights with --init_from {given / 'model.safetensors'}."
            )
        check_continues(given, config)
        return [given], []
    if config.resume == "never":
        if (config.run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"{config.run_dir} holds a run already and resume is never. Choose another run_name, or --resume auto."
            )
        return [], []
    whole, passed_over = [], []
    for folder in checkpoints(config.run_dir):
        try:
            check_continues(folder, config)
            whole.append(folder)
        except BadCheckpoint as error:
            passed_over.append(f"Passed over {error}.")
    if passed_over and not whole:
        raise ValueError(f"{' '.join(passed_over)} {nothing_left(config)}")
    return whole, passed_over


def nothing_left(config: Config) -> str:
    return (
        f"{config.run_dir} has no whole checkpoint left. Delete the folder to begin anew, or choose another run_name."
    )


def check_continues(folder: Path, config: Config) -> None:
    """Raises BadCheckpoint unless every file of the checkpoint is whole and it is one of a run with these settings."""
    changed = changed_settings(read_facts(folder).get("settings", {}), config)
    if changed:
        raise BadCheckpoint(f"{folder}: is a checkpoint of another run ({changed})")


def set_newer_aside(run_dir: Path, step: int) -> None:
    """Renames the checkpoints after a step, which the run will write anew, to passed-over-*; nothing is deleted."""
    for newer in checkpoints(run_dir):
        if int(newer.name.removeprefix("step-")) > step:
            aside = newer.with_name(f"passed-over-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
