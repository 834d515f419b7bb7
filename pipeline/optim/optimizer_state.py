"""The state of an optimizer as named tensors, for checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.fsdp import fitted

# Python numbers of a state; the type is part of the key, because a tensor of no dimension is another value
NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}

OTHER_SHAPES = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_r", "exp_avg_sq_c", "Q"}  # of factored states

GROUP_STATE = "step"  # the only state that an optimizer of torch or timm keeps in a group, beside the options


def as_tensors(prefix: str, value: Any) -> dict[str, Tensor]:
    """A value of a state as tensors, `prefix`, `prefix[0]`, ... of a list, `prefix:int` of a number, none of None."""
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {prefix: value}
    if isinstance(value, list):
        return {f"{prefix}[{number}]": item for number, item in enumerate(value)}
    kind = type(value).__name__
    assert kind in NUMBERS, f"the optimizer's state {prefix} is a {kind}, which a checkpoint cannot hold"
    return {f"{prefix}:{kind}": torch.tensor(value, dtype=NUMBERS[kind][1])}


def put(place: dict[str, Any], key: str, value: Tensor) -> None:
    """Adds to `place` a value that as_tensors made a tensor of; the items of a list as a dict by number."""
    name, _, kind = key.partition(":")
    name, _, number = name.partition("[")
    if kind:
        place[name] = NUMBERS[kind][0](value.item())
    elif number:
        place.setdefault(name, {})[int(number.removesuffix("]"))] = value
    else:
        place[name] = value


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the optimizer's state, keyed `parameter name/state key`, and `group 0/step` for a group's own count."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors |= as_tensors(f"{names[parameter]}/{key}", value)
    for number, group in enumerate(optimizer.param_groups):
        tensors |= as_tensors(f"group {number}/{GROUP_STATE}", group.get(GROUP_STATE))
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads a state as state_tensors returns it. Raises ValueError if a name or shape does not match the model."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name.startswith("group ") and int(name.removeprefix("group ")) < len(saved["param_groups"]):
            put(saved["param_groups"][int(name.removeprefix("group "))], key, value)
            continue
        parameter = parameters.get(name)
        has_own_shape = key.partition("[")[0] in OTHER_SHAPES
        if parameter is None or not has_own_shape and value.shape not in (parameter.shape, torch.Size([])):
            raise ValueError(f"The model has no parameter for the optimizer state {full_name} of shape {list(value.shape)}.")
        # in the parameter's memory format, which the file does not store and fused kernels require
        fits = value.shape == parameter.shape and not has_own_shape
        put(state.setdefault(parameter, {}), key, fitted(value, parameter) if fits else value)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    saved["state"] = {
        number: {key: as_list(value) for key, value in state[parameter].items()}
        for number, parameter in zip(numbers, ordered)
        if parameter in state
    }
    optimizer.load_state_dict(saved)


def as_list(value: Any) -> Any:
    """The items of a list in their order; any other value unchanged."""
    return [value[number] for number in sorted(value)] if isinstance(value, dict) else value
