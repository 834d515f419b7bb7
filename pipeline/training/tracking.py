"""Tracking: metrics.jsonl always; Weights & Biases, TensorBoard and others through Accelerate's trackers."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.common import console
from pipeline.common.files import LineFile, to_json
from pipeline.common.suggestions import did_you_mean
from pipeline.run_folder.paths import metrics_path
from pipeline.settings.config import Config

PLACE = ("epoch", "step", "samples", "seconds")  # what every line has besides its split
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

    step: the step of the checkpoint that the run resumes from, 0 for a new run. num_bytes: size of metrics.jsonl there; the
    rest of the file is cut off. run_ids: the external trackers' ids of the resumed run; empty for a new one.
    """

    def __init__(
        self,
        config: Config,
        facts: dict[str, Any],
        step: int = 0,
        num_bytes: int = 0,
        run_ids: dict[str, str] | None = None,
    ):
        self.run_ids = dict(run_ids or {})
        self.lines = LineFile(metrics_path(config.run_dir), num_bytes)
        self.external: dict[str, Any] = {}
        self.placed_step = -1  # the last step whose epoch and samples the external trackers have
        self.first_steps: dict[str, int] = {}  # by tracker, if it already has the figures of all earlier steps
        for name in tracker_names(config):
            self.attempt(name, "start", lambda: self.start(name, config, facts, step))
        if "tensorboard" in self.external:  # purge_step hides what it has from that step on
            for line in lines_from(step, metrics_path(config.run_dir)):
                self.send(line, ["tensorboard"])

    def start(self, name: str, config: Config, facts: dict[str, Any], step: int) -> None:
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
            options: dict[str, Any] = {"logging_dir": str(config.run_dir)} if kind.requires_logging_directory else {}
            if name == "tensorboard":
                options["purge_step"] = step  # hides what a killed run logged after the checkpoint
            tracker = kind(name if "logging_dir" in options else config.project, **options)
        tracker.start()
        if name == "wandb":  # a sweep has set and locked its own already
            settings = {key: value for key, value in settings.items() if key not in tracker.run.config}
        tracker.store_init_configuration(settings)
        self.external[name] = tracker
        if name == "wandb":
            self.continue_wandb(tracker.run, step)

    def continue_wandb(self, run: Any, step: int) -> None:
        """Finds the first step that W&B accepts: it drops figures of steps that it already has."""
        self.run_ids["wandb"] = run.id
        self.first_steps["wandb"] = first = run.step
        if first > step + 1:
            console.warn(
                f"W&B has this run's figures up to step {first - 1} and keeps them. The run resumes at step {step}: the figures "
                f"of steps {step + 1} to {first - 1} are not sent again. metrics.jsonl has all of them."
            )

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
        line = {"split": split, **place, **values}
        self.lines.append(to_json(line))
        self.send(line, list(self.external))

    def send(self, line: dict[str, Any], names: Iterable[str]) -> None:
        """Logs the numbers of a line in these external trackers; epoch and samples once per step."""
        split, step = line["split"], line["step"]
        prefix = f"{split}_epoch" if line.get("event") == "epoch" else split  # keeps an epoch's mean apart from a step's loss
        numbers = {
            external_name(prefix, key): value
            for key, value in line.items()
            if key not in PLACE and isinstance(value, (int, float))
        }
        if step != self.placed_step:
            numbers |= {"epoch": line["epoch"], "samples": line["samples"]}
            self.placed_step = step
        for name in names:
            if step >= self.first_steps.get(name, 0):
                self.attempt(name, "log", lambda: self.external[name].log(numbers, step=step))

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the external trackers. W&B gets the final figures in its run summary, by which it sorts runs and trials.

        Its val/ figures become those of the best epoch, since W&B ranks the trials of a sweep by the summary.
        """
        self.lines.close()
        figures = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        best = summary.get("best") or {}
        validated = "val/ema_" if best.get("weights") == "ema" else "val/"
        for prefix, values in ((validated, best), ("best/", best), ("test/", summary.get("test") or {})):
            figures |= {f"{prefix}{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        figures.pop(f"{validated}epoch", None)
        for name, tracker in list(self.external.items()):
            end = partial(end_wandb, tracker.run, summary, figures) if name == "wandb" else tracker.finish
            self.attempt(name, "finish", end)


def lines_from(step: int, path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about this step and later ones."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [line for line in lines if line["step"] >= step]


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
