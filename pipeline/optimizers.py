"""Optimizers: parameter groups, and one row of OPTIMIZERS each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import DEFAULTS, Config, did_you_mean

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer: how it is built from parameter groups, its own defaults, and the settings that it alone reads."""

    build: Callable[[Groups, Config, bool], torch.optim.Optimizer]
    lr: float
    weight_decay: float
    settings: tuple[str, ...] = ()


def build_sgd(groups: Groups, config: Config, fused: bool) -> torch.optim.Optimizer:
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=nesterov, fused=fused)


def build_adam(groups: Groups, config: Config, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1.0, fused=fused)


def build_adamw(groups: Groups, config: Config, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1.0, fused=fused)


OPTIMIZERS = {
    "sgd": OptimizerRow(build_sgd, lr=0.1, weight_decay=5e-4, settings=("momentum", "nesterov")),
    "adam": OptimizerRow(build_adam, lr=1e-3, weight_decay=0.0),
    "adamw": OptimizerRow(build_adamw, lr=1e-3, weight_decay=0.05),
}


def check_optimizer_name(name: str) -> None:
    """Raises ValueError when OPTIMIZERS has no such row."""
    if name not in OPTIMIZERS:
        raise ValueError(
            f"Unknown optimizer '{name}'.{did_you_mean(name, OPTIMIZERS)} Known: {', '.join(sorted(OPTIMIZERS))}."
        )


def peak_lr(config: Config) -> float:
    return OPTIMIZERS[config.optimizer].lr if config.lr is None else config.lr


def weight_decay(config: Config) -> float:
    return OPTIMIZERS[config.optimizer].weight_decay if config.weight_decay is None else config.weight_decay


def ignored_optimizer_settings(config: Config) -> list[str]:
    """A sentence for each setting that was changed and that this optimizer does not read."""
    own = {name for row in OPTIMIZERS.values() for name in row.settings}
    unread = own - set(OPTIMIZERS[config.optimizer].settings)
    return [
        f"{name} {getattr(config, name)} has no effect with optimizer {config.optimizer}."
        for name in sorted(unread)
        if getattr(config, name) != getattr(DEFAULTS, name)
    ]


def parameter_groups(model: nn.Module, config: Config) -> Groups:
    """Every trainable parameter in exactly one group: `weights` are decayed, `norms and biases` are not.

    Each group carries its name and lr_scale, a factor on the learning rate that the loop sets at every step.
    """
    timm_model: Any = model
    no_decay = timm_model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "weight_decay": weight_decay(config)},
        "norms and biases": {"params": [], "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or name in no_decay
            groups["norms and biases" if undecayed else "weights"]["params"].append(parameter)
    return [{"name": name, "lr_scale": 1.0, **group} for name, group in groups.items() if group["params"]]


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer that config asks for, over parameter_groups(model)."""
    groups = parameter_groups(model, config)
    on_cpu = next(model.parameters()).device.type == "cpu"
    # Measured on a CPU: the fused step takes half the time, but twice the time on channels-last weights.
    fused = not (on_cpu and config.channels_last)
    return OPTIMIZERS[config.optimizer].build(groups, config, fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by `parameter name/key`, for a checkpoint."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives the optimizer the state that state_tensors returned. Raises ValueError when a name or shape does not fit."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise ValueError(
                f"The optimizer state has {full_name} of shape {list(value.shape)}, which this model does not."
            )
        # in the parameter's memory order, which the file does not keep
        fitted = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(parameter, {})[key] = fitted
    saved = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    saved["state"] = {number: state[parameter] for number, parameter in zip(numbers, ordered) if parameter in state}
    optimizer.load_state_dict(saved)
