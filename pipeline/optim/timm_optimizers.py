"""The optimizers of timm: constructor, defaults and settings, from timm's OptimInfo; refuses those without an exact resume.

https://github.com/huggingface/pytorch-image-models/blob/main/timm/optim/_optim_factory.py
"""

import inspect
import random
from typing import Any

import torch
from timm.optim import get_optimizer_class, get_optimizer_info, kron, list_optimizers

# Default learning rates where the constructor's is none, or is that of another kind of schedule: SGD's is 1e-3 there;
# Adafactor's is null, with 1e-2 as the largest step of its own schedule; big_vision trains with 1e-3, not 1.
DEFAULT_LR = {"SGD": 0.1, "SGDW": 0.1, "SGDP": 0.1, "Adafactor": 1e-2, "AdafactorBigVision": 1e-3, "Muon": 1e-2}


class ReproducibleKron(kron.Kron):
    """timm's Kron with random numbers that depend on its number of steps only: equal in all processes and after a resume.

    Its functions are not compiled, because compiling them takes a minute and needs a C++ compiler.
    """

    def _init_fns(self) -> None:
        self._tiny = torch.finfo(torch.bfloat16).tiny
        for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
            setattr(self, name, getattr(kron, name))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.rng = random.Random(max((state["step"] for state in self.state.values() if state), default=0))
        return super().step(closure)


def is_muon(name: str) -> bool:
    """Whether an optimizer of timm has groups for Muon and for AdamW."""
    return constructor(name).__name__ == "Muon"


def constructor(name: str) -> type[torch.optim.Optimizer]:
    found = get_optimizer_class(name, bind_defaults=False)
    assert isinstance(found, type)
    return ReproducibleKron if found is kron.Kron else found


def check_timm_name(name: str) -> None:
    """Raises ValueError for an optimizer of timm that this project does not support."""
    info = get_optimizer_info(name)
    plain = name.removeprefix("bnb").removeprefix("fused").removesuffix("8bit")
    instead = f"Use {plain}" if plain != name and plain in list_optimizers() else "Use adamw"
    if isinstance(info.opt_class, str):
        package = info.opt_class.partition(".")[0]
        raise ValueError(
            f"optimizer {name} is not supported: it is a kernel of the package {package} for NVIDIA GPUs, whose state has a "
            f"format of its own, for which an exact resume is not tested. {instead}."
        )
    if info.second_order:
        raise ValueError(
            f"optimizer {name} is not supported: it differentiates the gradient, so every backward pass would have to keep its "
            f"graph, which micro-batches, SAM and several processes do not. {instead}."
        )
    if constructor(name) is ReproducibleKron and not kron.has_opt_einsum:
        raise ValueError(
            f"optimizer {name} needs the package opt_einsum: without it, its products take hundreds of GiB. Install it with "
            "pip install opt_einsum."
        )


def timm_defaults(name: str) -> tuple[float, float, tuple[str, ...]]:
    """The default learning rate and weight decay of an optimizer of timm, and the settings that only some optimizers read."""
    info = get_optimizer_info(name)
    parameters = inspect.signature(constructor(name)).parameters
    lr = DEFAULT_LR.get(constructor(name).__name__, parameters["lr"].default)
    momentum: tuple[str, ...] = ("momentum",) if info.has_momentum else ()
    if is_muon(name):
        momentum = ("muon_momentum", "adamw_lr_scale", "adamw_weight_decay")
    return float(lr), float(parameters["weight_decay"].default), momentum


def timm_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, momentum: float, arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of timm with these groups. lr: the peak; arguments: of the constructor, instead of timm's defaults.

    A corrected weight decay (adamc, lionc, ...) is lr^2 / peak times weight_decay, with the peak of the group.
    """
    info = get_optimizer_info(name)
    given = {**(info.defaults or {}), **({"momentum": momentum} if info.has_momentum else {}), **arguments}
    if constructor(name) is ReproducibleKron:
        given["deterministic"] = True  # its own generator, not torch's, which dropout also uses
    build: Any = constructor(name)
    optimizer: torch.optim.Optimizer = build(groups, lr=lr, **given)
    for group in optimizer.param_groups:
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = lr * group["lr_scale"]
    return optimizer
