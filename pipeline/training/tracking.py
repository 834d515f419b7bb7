"""Tracking: metrics.jsonl always; Weights & Biases, TensorBoard and the rest through Accelerate's trackers."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.common.files import LineFile
from pipeline.common.suggestions import did_you_mean
from pipeline.run_folder.paths import metrics_path
from pipeline.settings.config import Config

WANDB_START_SECONDS = 30  # how long an unreachable W&B may hold up the start


def tracker_names(config: Config) -> list[str]:
    """The trackers that log_with asks for, and wandb under `wandb agent`.

    Raises ValueError for a name that Accelerate does not know or whose package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [config.log_with] if isinstance(config.log_with, str) else list(config.log_with or [])
    if "WANDB_SWEEP_ID" in os.environ and "wandb" not in names:
        names.append("wandb")
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(
                f"Unknown tracker '{name}' in log_with.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)} Known: {known}."
            )
        if name not in [str(available) for available in get_available_trackers()]:
            raise ValueError(f"log_with {name} needs a package that is not installed: pip install {name}")
    return names


class Tracker:
    """A run's metrics.jsonl and its outside trackers. Made and called on rank 0 only.

    num_bytes: how much of metrics.jsonl belongs to the state that the run goes on from; the rest is cut off.
    run_ids: the outside trackers' ids of the run that goes on; empty for a new one.
    """

    def __init__(
        self, config: Config, facts: dict[str, Any], num_bytes: int = 0, run_ids: dict[str, str] | None = None
    ):
        self.run_ids = dict(run_ids or {})
        self.lines = LineFile(metrics_path(config.run_dir), num_bytes)
        self.outside: dict[str, Any] = {}
        for name in tracker_names(config):
            self.attempt(name, "start", lambda: self.start(name, config, facts))

    def start(self, name: str, config: Config, facts: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        settings = {**dataclasses.asdict(config), **{f"system/{key}": value for key, value in facts.items()}}
        if name == "wandb":
            tracker = kind(config.project, **self.wandb_options(config))
        else:
            # outside W&B a setting is a number, a text or a truth value
            settings = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in settings.items()
            }
            folder = {"logging_dir": str(config.run_dir)} if kind.requires_logging_directory else {}
            tracker = kind(name if folder else config.project, **folder)
        tracker.start()
        if name == "wandb":  # a sweep has set its own already and locked them
            settings = {key: value for key, value in settings.items() if key not in tracker.run.config}
        tracker.store_init_configuration(settings)
        self.outside[name] = tracker
        if name == "wandb":
            self.run_ids["wandb"] = tracker.run.id

    def wandb_options(self, config: Config) -> dict[str, Any]:
        import wandb

        options = {"name": config.run_name, "dir": str(config.run_dir)}
        if "wandb" in self.run_ids:
            options |= {"id": self.run_ids["wandb"], "resume": "allow"}
        return {**options, "settings": wandb.Settings(init_timeout=WANDB_START_SECONDS)}

    def attempt(self, name: str, verb: str, action: Callable[[], Any]) -> None:
        """Does something with an outside tracker; when it fails, the tracker is let go with a warning and training goes on."""
        try:
            action()
        except Exception as error:  # an outside service may raise anything, and none of it is worth a run
            self.outside.pop(name, None)
            warnings.warn(
                f"{name} could not {verb} and is left out from here on; metrics.jsonl has everything. {error}",
                stacklevel=2,
            )

    def log(self, split: str, place: dict[str, Any], values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, and its numbers to the outside trackers under the names split/key.

        place: epoch, step, samples and seconds.
        """
        self.lines.append(json.dumps({"split": split, **place, **values}))
        prefix = f"{split}_epoch" if values.get("event") == "epoch" else split  # an epoch's mean is not a step's loss
        numbers = {outside_name(prefix, key): value for key, value in values.items() if isinstance(value, (int, float))}
        numbers |= {"epoch": place["epoch"], "samples": place["samples"]}
        for name, tracker in list(self.outside.items()):
            self.attempt(name, "log", lambda: tracker.log(numbers, step=place["step"]))

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the outside trackers; W&B gets the final figures, where it can sort runs by them."""
        self.lines.close()
        figures = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        for part in ("best", "test"):
            figures |= {
                f"{part}/{key}": value
                for key, value in (summary.get(part) or {}).items()
                if isinstance(value, (int, float))
            }
        for name, tracker in list(self.outside.items()):
            end = partial(end_wandb, tracker.run, summary, figures) if name == "wandb" else tracker.finish
            self.attempt(name, "finish", end)


def end_wandb(run: Any, summary: dict[str, Any], figures: dict[str, Any]) -> None:
    """Ends a W&B run: as failed when it failed, to be queued again when a batch system takes the machine back.

    One that was stopped otherwise, by a sweep's early termination for example, has finished: a search counts what it reached.
    """
    preempted = summary.get("reason") == "SIGUSR1"
    run.summary.update(figures)
    if preempted:
        run.mark_preempting()
    run.finish(exit_code=1 if preempted or summary["status"] == "failed" else 0)


def outside_name(split: str, key: str) -> str:
    """split/key, but scaler/scale and scaler/skipped_steps for what is of the fp16 scaler and of no split."""
    return {"scaler_scale": "scaler/scale", "skipped_steps": "scaler/skipped_steps"}.get(key, f"{split}/{key}")
