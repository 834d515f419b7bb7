"""Reads run folders in any state: ended, running, stopped or damaged."""

import json
import math
import os
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.system import is_alive
from pipeline.run_folder import lock
from pipeline.run_folder.paths import metrics_path
from pipeline.settings.config import DEFAULTS, FIELDS, TYPES, Config
from pipeline.settings.parser import SettingsLoader

ENDED = ("completed", "early_stopped")  # status in the summary of a run that was not stopped
MONITORS = typing.get_args(TYPES["monitor"])
PLACE = ("epoch", "step", "seconds")

Line = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep's file. metric: as in W&B, for example "val/accuracy"; maximize: whether a larger value is better.

    name: unique among the sweeps read together. logarithmic: the parameters that have a logarithmic distribution.
    """

    name: str
    path: Path
    method: str
    metric: str
    maximize: bool
    logarithmic: frozenset[str]


@dataclass(frozen=True)
class Trial:
    """A sweep's record of one of its runs. value: of the sweep's metric, None if there is none."""

    number: int
    status: str
    params: dict[str, Any]
    value: float | None
    error: str


@dataclass(frozen=True)
class RunRecord:
    """One run.

    name: unique among the runs read together. status: of the summary, else running (its process is alive) or unfinished.
    settings: include the learning rate that was used if lr is null. epochs: a dict per finished epoch with epoch, step,
    seconds, train and val (figures by name). log: the training lines, with progress in epochs if it is known. best, test: as in
    summary.json; without a summary, best is that of the epochs. facts: the rest of the summary, and image_size, the side of
    the model's input in pixels. sweep: the sweep whose folder holds the run; trial: the sweep's record of the run.
    """

    name: str
    path: Path
    status: str
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: list[Line] = field(default_factory=list)
    log: list[Line] = field(default_factory=list)
    best: Line | None = None
    test: Line | None = None
    facts: Line = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sweep: Sweep | None = None
    trial: Trial | None = None

    @property
    def ended(self) -> bool:
        """Whether the run is complete: it ended normally, or its sweep stopped it early."""
        return self.status in (*ENDED, "stopped")

    @property
    def val_accuracy(self) -> float | None:
        return number(self.best, "accuracy")

    @property
    def test_accuracy(self) -> float | None:
        return number(self.test, "accuracy")


def number(line: Any, key: str) -> float | None:
    """A finite number of a JSON object, else None."""
    value = line.get(key) if isinstance(line, dict) else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or metrics_path(path).is_file()


def read_run(path: Path) -> RunRecord:
    """Reads the files of a run. Missing or damaged parts are skipped without an exception; damaged ones are listed in notes."""
    notes: list[str] = []
    summary = read_mapping(path / "summary.json", notes)
    lines = read_lines(metrics_path(path), notes)
    epochs = epochs_of(lines)
    last_step = max((line["step"] for line in lines), default=0)
    if summary.get("status") not in ENDED and (number(summary, "steps") or 0) < last_step:
        summary = {}  # written before the run was resumed
    status = str(summary.get("status") or ("running" if is_running(path) else "unfinished"))
    settings = effective_settings(read_mapping(path / "config.yaml", notes))
    best, test = summary.get("best"), summary.get("test")
    facts = {key: value for key, value in summary.items() if key not in ("best", "test", "status", "reason")}
    monitor = str(settings["monitor"] if settings.get("monitor") in MONITORS else DEFAULTS.monitor)
    return RunRecord(
        name=path.resolve().name,
        path=path,
        status=status,
        reason=str(summary.get("reason", "")),
        settings=settings,
        epochs=epochs,
        log=log_of(lines, epochs),
        best=best if isinstance(best, dict) else best_of(epochs, monitor),
        test=test if isinstance(test, dict) else None,
        facts=facts | {"image_size": used_image_size(settings, path)},
        notes=tuple(notes),
    )


def read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; empty if the file does not exist, or with a note if it is invalid."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, SettingsLoader)
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} cannot be read")
        return {}
    return value


def read_lines(path: Path, notes: list[str]) -> list[Line]:
    """The valid lines of metrics.jsonl. An incomplete last line is ignored: it may be in writing."""
    if not path.is_file():
        return []
    texts = path.read_bytes().decode(errors="replace").split("\n")
    lines, unreadable = [], 0
    for place, text in enumerate(texts):
        try:
            line = json.loads(text)
        except ValueError:
            unreadable += bool(text.strip()) and place < len(texts) - 1
            continue
        if isinstance(line, dict) and all(number(line, key) is not None for key in PLACE):
            lines.append(line)
        else:
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable} unreadable lines of {path.name} were skipped")
    return lines


def epochs_of(lines: list[Line]) -> list[Line]:
    """An entry for each finished epoch, in order; a later line of the same epoch replaces an earlier one."""
    entries: dict[int, Line] = {}
    for line in lines:
        split = line.get("split")
        if split == "val" or (split == "train" and line.get("event") == "epoch"):
            entry = entries.setdefault(int(line["epoch"]), {"train": {}, "val": {}})
            entry |= {key: line[key] for key in PLACE}
            entry[split] = line
    return [entries[epoch] for epoch in sorted(entries)]


def log_of(lines: list[Line], epochs: list[Line]) -> list[Line]:
    """The training lines, each with `progress` in epochs; None in a first epoch that has not ended."""
    last_steps = {0: 0} | {entry["epoch"]: entry["step"] for entry in epochs}
    log = []
    for line in lines:
        if line.get("split") != "train" or line.get("event") == "epoch":
            continue
        epoch = line["epoch"]
        begin = last_steps.get(epoch - 1)
        end = last_steps.get(epoch)
        if end is None and begin is not None and epoch - 2 in last_steps:  # as many steps as the epoch before
            end = 2 * begin - last_steps[epoch - 2]
        progress = None
        if begin is not None and end is not None and end > begin:
            progress = epoch - 1 + (line["step"] - begin) / (end - begin)
        log.append(line | {"progress": progress})
    return log


def best_of(epochs: list[Line], monitor: str) -> Line | None:
    """The validation figures of the best epoch so far, of the trained weights or of their moving average."""
    best, best_rank = None, (-math.inf, -math.inf)
    for entry in epochs:
        for prefix in ("", "ema_"):
            value = number(entry["val"], prefix + monitor)
            signed = -math.inf if value is None else -value if monitor == "loss" else value
            loss = number(entry["val"], f"{prefix}loss")
            rank = signed, -math.inf if loss is None else -loss  # of equal values the one with the lowest loss
            if signed > -math.inf and rank > best_rank:
                figures = {key: entry["val"].get(prefix + key) for key in ("loss", "accuracy", "num_samples")}
                best, best_rank = {"epoch": entry["epoch"], **figures}, rank
    return best


def effective_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with null in lr replaced by the learning rate that was used, if it can be determined."""
    settings = {str(name): value for name, value in settings.items()}
    if settings and settings.get("lr") is None:
        settings["lr"] = usual_lr(settings)
    return settings


def used_image_size(settings: dict[str, Any], path: Path) -> int | None:
    """The side of the model's input in pixels: the setting, else that of the saved model, else None."""
    if settings.get("image_size") is not None:
        return settings["image_size"]
    model = read_mapping(path / "model" / "config.json", [])
    size = (model.get("pretrained_cfg") or {}).get("input_size")
    return size[-1] if isinstance(size, list) and size else None


def usual_lr(settings: dict[str, Any]) -> float | None:
    """The default learning rate for these settings; None for settings of another version."""
    from pipeline.optim.optimizers import peak_lr  # imports timm, which is slow and rarely needed

    try:
        return peak_lr(Config(**{name: value for name, value in settings.items() if name in FIELDS}))
    except (KeyError, TypeError):
        return None


def is_running(run_dir: Path) -> bool:
    """Whether the process that holds the run's lock seems to be alive. Does not touch the lock.

    Checks the process number for this machine, and the age of the file, which the process keeps updating, for another one.
    """
    path = run_dir / ".lock"
    holder = lock.read(path)
    try:
        if holder.get("machine") != os.uname().nodename:
            silence = time.time() - path.stat().st_mtime
            return "machine" in holder and silence < lock.SILENT_BEATS * lock.BEAT_SECONDS
        return is_alive(int(str(holder.get("process"))))
    except (OSError, ValueError):
        return False
