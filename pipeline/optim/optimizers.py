"""Optimizers: the table OPTIMIZERS, and the assignment of parameters to groups."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import list_optimizers
from torch import nn

from pipeline.common.suggestions import did_you_mean
from pipeline.distributed.fsdp import is_sharded
from pipeline.optim.muon import Muon
from pipeline.optim.schedule import History, lr_scale
from pipeline.optim.timm_optimizers import check_timm_name, is_muon, timm_defaults, timm_optimizer
from pipeline.settings.batch_size import USUAL_BATCH_SIZE, first_batch_size
from pipeline.settings.config import DEFAULTS, Config

# The role of a parameter. A matrix is the weight of a hidden linear layer or of a convolution that mixes channels.
MATRIX, STEM, HEAD, DEPTHWISE, EMBEDDING, VECTOR = (
    "matrices",
    "stem",
    "head",
    "depthwise",
    "embeddings",
    "norms and biases",
)

Group = dict[str, Any]


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer: its constructor, its defaults, the settings that only it reads, and its groups of parameters.

    build: called with the groups, the settings and whether to use fused kernels (None: torch chooses). route: returns the
    options of the group for a parameter's role, including `name`. lr, given_lr: the default learning rates for a batch size of
    128, from scratch and from given weights, which a large one destroys (docs/results.md). sam_rho: the default, 0 for
    optimizers without SAM.
    """

    build: Callable[[list[Group], Config, bool | None], torch.optim.Optimizer]
    route: Callable[[str, Config], Group]
    lr: float
    given_lr: float
    weight_decay: float
    settings: tuple[str, ...] = ()
    sam_rho: float = 0.0


def decayed_or_not(role: str, config: Config) -> Group:
    """Two groups: norms and biases without weight decay, all other parameters with it."""
    if role == VECTOR:
        return {"name": VECTOR, "weight_decay": 0.0}
    return {"name": "weights", "weight_decay": weight_decay(config)}


def muon_or_adamw(role: str, config: Config) -> Group:
    """Muon for matrices; AdamW for stem, head, depthwise filters, embeddings, norms and biases, as Muon's author does."""
    if role == MATRIX:
        return {"name": "muon: matrices", "use_muon": True, "weight_decay": weight_decay(config)}
    decay = weight_decay(config) if config.adamw_weight_decay is None else config.adamw_weight_decay
    return {
        "name": f"adamw: {role}",
        "use_muon": False,
        "weight_decay": 0.0 if role in (VECTOR, EMBEDDING) else decay,
        "lr_scale": config.adamw_lr_scale,
    }


def build_sgd(groups: list[Group], config: Config, fused: bool | None) -> torch.optim.Optimizer:
    nesterov = config.nesterov and config.momentum > 0
    more = optimizer_arguments(config)
    return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=nesterov, fused=fused, **more)


def build_adam(groups: list[Group], config: Config, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1.0, fused=fused, **optimizer_arguments(config))


def build_adamw(groups: list[Group], config: Config, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1.0, fused=fused, **optimizer_arguments(config))


def build_muon(groups: list[Group], config: Config, fused: bool | None) -> torch.optim.Optimizer:
    return Muon(
        groups,
        momentum=config.muon_momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        lr_scaling=config.muon_lr_scaling,
        **optimizer_arguments(config),
    )


def build_timm(groups: list[Group], config: Config, fused: bool | None) -> torch.optim.Optimizer:
    momentum = config.muon_momentum if is_muon(config.optimizer) else config.momentum
    return timm_optimizer(config.optimizer, groups, peak_lr(config), momentum, optimizer_arguments(config))


SGD_SETTINGS = ("momentum", "nesterov")
MUON_SETTINGS = ("muon_momentum", "nesterov", "ns_steps", "muon_lr_scaling", "adamw_lr_scale", "adamw_weight_decay")

OPTIMIZERS = {
    "sgd": OptimizerRow(build_sgd, decayed_or_not, lr=0.1, given_lr=1e-3, weight_decay=5e-4, settings=SGD_SETTINGS),
    "adam": OptimizerRow(build_adam, decayed_or_not, lr=1e-3, given_lr=1e-4, weight_decay=0.0),
    "adamw": OptimizerRow(build_adamw, decayed_or_not, lr=1e-3, given_lr=1e-4, weight_decay=0.05),
    "sam": OptimizerRow(build_sgd, decayed_or_not, lr=0.1, given_lr=1e-3, weight_decay=5e-4, settings=SGD_SETTINGS, sam_rho=0.05),
    "muon": OptimizerRow(build_muon, muon_or_adamw, lr=1e-2, given_lr=3e-4, weight_decay=0.1, settings=MUON_SETTINGS),
}


def optimizer_row(name: str) -> OptimizerRow:
    """The row of OPTIMIZERS, or else a row made from what timm knows about its optimizer of this name."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    lr, weight_decay, settings = timm_defaults(name)
    route = muon_or_adamw if is_muon(name) else decayed_or_not
    return OptimizerRow(build_timm, route, lr=lr, given_lr=lr / 10, weight_decay=weight_decay, settings=settings)


def check_optimizer_name(name: str) -> None:
    """Raises ValueError for a name that neither OPTIMIZERS nor timm has, and for an optimizer of timm that is not supported."""
    if name in OPTIMIZERS:
        return
    if name not in list_optimizers():
        others = [other for other in list_optimizers() if other not in OPTIMIZERS]
        raise ValueError(
            f"Unknown optimizer {name!r}.{did_you_mean(name, [*OPTIMIZERS, *others])} Known: {', '.join(sorted(OPTIMIZERS))} and "
            f"timm's {', '.join(others)}."
        )
    check_timm_name(name)


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """optimizer_args with lists as tuples, as constructors expect them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.optimizer_args.items()}


def peak_lr(config: Config) -> float:
    """lr; if null, the optimizer's default, from scratch or from given weights, times sqrt(batch size / 128).

    The square-root rule is that of https://arxiv.org/abs/1404.5997.
    """
    if config.lr is not None:
        return config.lr
    row = optimizer_row(config.optimizer)
    base = row.given_lr if config.has_given_weights else row.lr
    return base * (first_batch_size(config) / USUAL_BATCH_SIZE) ** 0.5


def weight_decay(config: Config) -> float:
    return optimizer_row(config.optimizer).weight_decay if config.weight_decay is None else config.weight_decay


def sam_rho(config: Config) -> float:
    """The radius of SAM's perturbation; 0 disables SAM."""
    return optimizer_row(config.optimizer).sam_rho if config.sam_rho is None else config.sam_rho


def ignored_optimizer_settings(config: Config) -> list[str]:
    """A sentence for each setting that differs from its default and that this optimizer ignores."""
    own = {name for row in OPTIMIZERS.values() for name in row.settings}
    reasons = {name: f"with optimizer {config.optimizer}" for name in own - set(optimizer_row(config.optimizer).settings)}
    if sam_rho(config) == 0:
        reasons |= {name: "without sam_rho" for name in ("sam_adaptive", "sam_every", "sam_sync")}
    return [
        f"{name} {getattr(config, name)} has no effect {reason}."
        for name, reason in sorted(reasons.items())
        if getattr(config, name) != getattr(DEFAULTS, name)
    ]


def classifier_names(model: Any) -> tuple[str, ...]:
    """The names of the model's classifiers according to timm; distilled models have several."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def parameter_roles(model: Any) -> dict[str, str]:
    """The role of each parameter, by parameter name: MATRIX, STEM, HEAD, DEPTHWISE, EMBEDDING or VECTOR."""
    stems = model.pretrained_cfg.get("first_conv") or ()
    stems = (stems,) if isinstance(stems, str) else tuple(stems)
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    roles = {}
    for prefix, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own_name}" if prefix else own_name
            mixes = isinstance(module, (nn.Linear, nn.Conv2d)) and own_name == "weight"
            if parameter.ndim <= 1:
                role = VECTOR
            elif prefix in classifier_names(model):
                role = HEAD
            elif prefix in stems:
                role = STEM
            elif not mixes or name in undecayed:
                role = EMBEDDING if parameter.numel() > max(parameter.shape) or name in undecayed else VECTOR
            elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                role = DEPTHWISE
            else:
                role = MATRIX
            roles[name] = role
    return roles


def layer_scales(model: Any, decay: float | None) -> dict[str, float]:
    """The learning-rate factor of each parameter: decay ** (layers between it and the head), https://arxiv.org/abs/2106.08254.

    Raises ValueError for a model that does not define its layers (timm's group_matcher).
    """
    names = [name for name, _ in model.named_parameters()]
    if decay is None:
        return dict.fromkeys(names, 1.0)
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            "layer_decay needs a model that defines its layers; this one has no group_matcher. Remove layer_decay."
        )
    from timm.models import group_parameters

    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layers[name]) for name in names}


def parameter_groups(model: nn.Module, config: Config) -> list[Group]:
    """The optimizer's groups; every trainable parameter is in exactly one.

    Each group contains its name and lr_scale, by which set_lr multiplies the learning rate.
    """
    roles, scales = parameter_roles(model), layer_scales(model, config.layer_decay)
    groups: dict[tuple[str, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        options = optimizer_row(config.optimizer).route(roles[name], config)
        options["lr_scale"] = options.get("lr_scale", 1.0) * scales[name]
        group = groups.setdefault((options["name"], scales[name]), {"params": [], **options})
        group["params"].append(parameter)
    counted = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(counted) == len(set(counted)) == sum(parameter.requires_grad for parameter in model.parameters())
    return list(groups.values())


def create_optimizer(model: nn.Module, config: Config, mixed_precision: str) -> torch.optim.Optimizer:
    """The optimizer of the settings, with the groups of parameter_groups."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    # On a CPU the fused step takes half the time of the others, but twice the time with channels-last weights. With fp16 a
    # fused optimizer does not report to Accelerate that its step was skipped. Fused SGD supports neither weights that are
    # unfrozen after its first step nor shards. None lets torch choose among the others.
    possible = not (on_cpu and config.channels_last) and mixed_precision != "fp16" and config.freeze_epochs == 0
    shards_of_sgd = is_sharded(model) and optimizer_row(config.optimizer).build is build_sgd
    fused = True if possible and not shards_of_sgd else None
    return optimizer_row(config.optimizer).build(parameter_groups(model, config), config, fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_of_step(epoch: int, batch: int, num_batches: int, history: History, config: Config) -> float:
    """The learning rate of a step: the schedule at the middle of the step."""
    return peak_lr(config) * lr_scale(epoch + (batch + 0.5) / num_batches, history, config)
