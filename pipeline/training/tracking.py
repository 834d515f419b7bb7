"""Tracking: metrics.jsonl always; Weights & Biases, TensorBoard and others through Accelerate's trackers."""

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

WANDB_START_SECONDS = 30  # how long the start waits for an unreachable W&B


def tracker_names(config: Config) -> list[str]:
    """The trackers of log_with, and wandb under `wandb agent`.

    Raises ValueError for an unknown name or a tracker whose package is not installed.
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
    """A run's metrics.jsonl and its external trackers. Created and called on rank 0 only.

    num_bytes: size of metrics.jsonl at the checkpoint that the run resumes from; the rest of the file is cut off.
    run_ids: the external trackers' ids of the resumed run; empty for a new one.
    """

    def __init__(
        self, config: Config, facts: dict[str, Any], num_bytes: int = 0, run_ids: dict[str, str] | None = None
    ):
        self.run_ids = dict(run_ids or {})
        self.lines = LineFile(metrics_path(config.run_dir), num_bytes)
        self.external: dict[str, Any] = {}
        for name in tracker_names(config):
            self.attempt(name, "start", lambda: self.start(name, config, facts))

    def start(self, name: str, config: Config, facts: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        settings = {**dataclasses.asdict(config), **{f"system/{key}": value for key, value in facts.items()}}
        if name == "wandb":
            tracker = kind(config.project, **self.wandb_options(config))
        else:
            # trackers other than W&B accept numbers, strings and booleans only
            settings = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in settings.items()
            }
            folder = {"logging_dir": str(config.run_dir)} if kind.requires_logging_directory else {}
            tracker = kind(name if folder else config.project, **folder)
        tracker.start()
        if name == "wandb":  # a sweep has set and locked its own already
            settings = {key: value for key, value in settings.items() if key not in tracker.run.config}
        tracker.store_init_configuration(settings)
        self.external[name] = tracker
        if name == "wandb":
            self.run_ids["wandb"] = tracker.run.id

    def wandb_options(self, config: Config) -> dict[str, Any]:
        import wandb

        options = {"name": config.run_name, "dir": str(config.run_dir)}
        if "wandb" in self.run_ids:
            options |= {"id": self.run_ids["wandb"], "resume": "allow"}
        return {**options, "settings": wandb.Settings(init_timeout=WANDB_START_SECONDS)}

    def attempt(self, name: str, verb: str, action: Callable[[], Any]) -> None:
        """Calls action; if it fails, warns and disables the external tracker `name`, and training continues."""
        try:
            action()
        except Exception as error:  # an external service may raise anything, and must not end a run
            self.external.pop(name, None)
            warnings.warn(
                f"{name} could not {verb} and is disabled for the rest of the run; metrics.jsonl has everything. {error}",
                stacklevel=2,
            )

    def log(self, split: str, place: dict[str, Any], values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and logs its numbers to the external trackers as split/key.

        place: epoch, step, samples and seconds.
        """
        self.lines.append(json.dumps({"split": split, **place, **values}))
        prefix = f"{split}_epoch" if values.get("event") == "epoch" else split  # keeps an epoch's mean apart from a step's loss
        numbers = {external_name(prefix, key): value for key, value in values.items() if isinstance(value, (int, float))}
        numbers |= {"epoch": place["epoch"], "samples": place["samples"]}
        for name, tracker in list(self.external.items()):
            self.attempt(name, "log", lambda: tracker.log(numbers, step=place["step"]))

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the external trackers. W&B gets the final figures in its run summary, where it can sort runs by them."""
        self.lines.close()
        figures = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        for part in ("best", "test"):
            figures |= {
                f"{part}/{key}": value
                for key, value in (summary.get(part) or {}).items()
                if isinstance(value, (int, float))
            }
        for name, tracker in list(self.external.items()):
            end = partial(end_wandb, tracker.run, summary, figures) if name == "wandb" else tracker.finish
            self.attempt(name, "finish", end)


def end_wandb(run: Any, summary: dict[str, Any], figures: dict[str, Any]) -> None:
    """Ends a W&B run: as failed if it failed, and as preempted, which queues it again, after SIGUSR1 of a batch system.

    A run stopped otherwise, for example by a sweep's early termination, is finished: the search uses its figures.
    """
    preempted = summary.get("reason") == "SIGUSR1"
    run.summary.update(figures)
    if preempted:
        run.mark_preempting()
    run.finish(exit_code=1 if preempted or summary["status"] == "failed" else 0)


def external_name(split: str, key: str) -> str:
    """split/key; scaler/scale and scaler/skipped_steps for the figures of the fp16 scaler, which belong to no split."""
    return {"scaler_scale": "scaler/scale", "skipped_steps": "scaler/skipped_steps"}.get(key, f"{split}/{key}")
