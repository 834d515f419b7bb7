"""A trial step of the optimizer, before a run: whether it accepts optimizer_args, and how much state it keeps."""

import dataclasses
import inspect

import torch
from torch import nn

from pipeline.common.suggestions import did_you_mean
from pipeline.optim.optimizers import MATRIX, optimizer_row, peak_lr, set_lr
from pipeline.settings.config import Config

SIDE = 32  # of the matrix of the trial step

# arguments of constructors that are settings, where the optimizer reads the setting
SETTINGS = {
    "momentum": ("momentum", "muon_momentum"),
    "nesterov": ("nesterov",),
    "ns_steps": ("ns_steps",),
    "lr_scaling": ("muon_lr_scaling",),
    "fallback_lr_scale": ("adamw_lr_scale",),
}
# arguments of constructors that this project chooses
CHOSEN = {"params", "fused", "foreach", "capturable", "differentiable", "maximize", "distribute", "deterministic", "verbose"}


def check_optimizer_args(config: Config) -> None:
    """Raises ValueError unless the constructor of the optimizer accepts optimizer_args and a step works with them."""
    if not config.optimizer_args:
        return
    plain = trial_optimizer(dataclasses.replace(config, optimizer_args={}))
    settings = {"lr": "lr", "weight_decay": "weight_decay"}
    for argument, names in SETTINGS.items():
        settings |= {argument: name for name in names if name in optimizer_row(config.optimizer).settings}
    known = inspect.signature(type(plain)).parameters.keys() - CHOSEN - settings.keys()
    for name in config.optimizer_args:
        if name in settings:
            raise ValueError(f"optimizer_args must not contain {name}. Use the setting {settings[name]}.")
        if name not in known:
            raise ValueError(
                f"optimizer_args of {config.optimizer} must not contain {name!r}.{did_you_mean(name, known)} Its arguments: "
                f"{', '.join(sorted(known))}."
            )
    try:
        trial_optimizer(config)
    except (ValueError, TypeError, AssertionError, RuntimeError, AttributeError) as error:  # of constructors and steps
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        given = f"optimizer {config.optimizer} does not accept optimizer_args {config.optimizer_args}"
        raise ValueError(f"{given}: {reason}") from error


def trial_optimizer(config: Config) -> torch.optim.Optimizer:
    """The optimizer of the settings after one step on one matrix."""
    row, weight = optimizer_row(config.optimizer), nn.Parameter(torch.ones(SIDE, SIDE))
    optimizer = row.build([{"params": [weight], "lr_scale": 1.0, **row.route(MATRIX, config)}], config, None)
    set_lr(optimizer, peak_lr(config))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def state_per_weight(config: Config) -> float:
    """How many values of state the optimizer keeps for each weight of a matrix."""
    (state,) = trial_optimizer(config).state.values()
    values = [item for value in state.values() for item in (value if isinstance(value, list) else [value])]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) / SIDE**2
