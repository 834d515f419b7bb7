"""Learning-rate and batch-size schedules: pure functions of progress and history.

Progress is measured in epochs (samples seen over samples in the training split), so it does not depend on the batch size.
The history has one dict per finished epoch, with the validation figures under "val" and, with ema_decay, "val_ema".
"""

import math
from collections.abc import Callable
from typing import Any

from pipeline.common.suggestions import check_known
from pipeline.settings.batch_size import batch_size_at, first_batch_size
from pipeline.settings.config import Config

History = list[dict[str, Any]]


def constant(progress: float, history: History, config: Config) -> float:
    """1 at any progress."""
    return 1.0


def step(progress: float, history: History, config: Config) -> float:
    """gamma ** (number of steps so far), like StepLR for a number and MultiStepLR for a list."""
    every = config.num_epochs / 3 if config.step_epochs is None else config.step_epochs
    passed = sum(progress >= epoch for epoch in every) if isinstance(every, list) else int(progress / every)
    return config.gamma**passed


def plateau(progress: float, history: History, config: Config) -> float:
    """gamma ** (number of plateaus); a plateau is plateau_patience epochs in a row without a better value.

    Counted as in early stopping. torch's ReduceLROnPlateau needs one epoch more for the same patience.
    """
    best, bad_epochs, scale = -math.inf, 0, 1.0
    for value in monitored(history, config):
        bad_epochs = 0 if value > best else bad_epochs + 1
        best = max(best, value)
        if bad_epochs >= config.plateau_patience:
            scale, bad_epochs = max(scale * config.gamma, config.min_lr_scale), 0
    return scale


def cosine(progress: float, history: History, config: Config) -> float:
    """min + (1 - min) (1 + cos(pi t)) / 2 with t from 0 to 1 after the warm-up (SGDR, https://arxiv.org/abs/1608.03983)."""
    return (
        config.min_lr_scale + (1 - config.min_lr_scale) * (1 + math.cos(math.pi * after_warmup(progress, config))) / 2
    )


def linear(progress: float, history: History, config: Config) -> float:
    """1 - (1 - min) t with t from 0 to 1 after the warm-up."""
    return 1 - (1 - config.min_lr_scale) * after_warmup(progress, config)


SCHEDULES: dict[str, Callable[[float, History, Config], float]] = {
    "constant": constant,
    "step": step,
    "plateau": plateau,
    "cosine": cosine,
    "linear": linear,
}


def check_scheduler_name(name: str) -> None:
    """Raises ValueError if SCHEDULES has no row of this name."""
    check_known("scheduler", name, SCHEDULES)


def after_warmup(progress: float, config: Config) -> float:
    """The finished fraction of the run after the warm-up, from 0 to 1."""
    warmup = warmup_length(config)
    return min(max((progress - warmup) / max(config.num_epochs - warmup, 1e-9), 0.0), 1.0)


def warmup_length(config: Config) -> float:
    """Epochs of warm-up: warmup_epochs, at most half of the run."""
    return min(config.warmup_epochs, config.num_epochs / 2)


def lr_scale(progress: float, history: History, config: Config) -> float:
    """The factor on every group's learning rate: schedule times warm-up times batch-size scaling. progress: in epochs."""
    warmup = min(progress / warmup_length(config), 1.0) if config.warmup_epochs else 1.0
    growth = batch_size_at(int(progress), config) / first_batch_size(config)
    scaling = {"none": 1.0, "sqrt": math.sqrt(growth), "linear": growth}[config.batch_lr_scaling]
    return SCHEDULES[config.scheduler](progress, history, config) * warmup * scaling


def monitored(history: History, config: Config) -> list[float]:
    """The monitored value of each epoch, signed so that larger is better; the better of the weights and their average.

    A value that is not finite becomes -inf, so that it ranks last.
    """
    kinds = ("val", "val_ema")
    return [max(signed(epoch[kind][config.monitor], config) for kind in kinds if kind in epoch) for epoch in history]


def signed(value: float | None, config: Config) -> float:
    """The value, or its negative for a loss; -inf for NaN, infinity and what a checkpoint holds for them, None."""
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if config.monitor == "loss" else value


def best_kind(entry: dict[str, Any], config: Config) -> str:
    """The better weights of an epoch: "val" for the trained ones, "val_ema" for their moving average."""
    return (
        "val_ema"
        if "val_ema" in entry and monitored([{"val": entry["val"]}], config) < monitored([entry], config)
        else "val"
    )


def best_epoch(history: History, config: Config) -> int | None:
    """The index of the epoch with the best monitored value; None before the first finite value.

    Of equal values, which are frequent with few validation images, it is the one with the lowest loss, the first of equals.
    """
    values = monitored(history, config)
    best = max(values, default=-math.inf)
    equal = [number for number, value in enumerate(values) if value == best > -math.inf]
    return min(equal, key=lambda number: loss_of(history[number], config), default=None)


def loss_of(entry: dict[str, Any], config: Config) -> float:
    """The validation loss of the better weights of an epoch; infinity if it is not finite."""
    loss = entry[best_kind(entry, config)].get("loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


def should_stop_early(history: History, config: Config) -> bool:
    """Whether early_stopping_patience epochs have passed since the best one, or since the start while none had a finite value."""
    if config.early_stopping_patience is None:
        return False
    values = monitored(history, config)
    best = max(values, default=-math.inf)
    return len(history) - (values.index(best) + 1 if best > -math.inf else 0) >= config.early_stopping_patience
