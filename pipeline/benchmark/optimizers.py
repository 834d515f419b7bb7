"""`optimizers`: times whole training steps and `optimizer.step` alone, in one process.

The compared calls run in turns (A B C A B C ...), so that other load on the machine affects all alike.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.benchmark.measuring import Row, Section, summarise
from pipeline.benchmark.stepclock import HALVES, device_name
from pipeline.common.console import progress_bar
from pipeline.optim.optimizers import OPTIMIZERS, create_optimizer, parameter_groups, set_lr
from pipeline.settings.config import Config

Call = Callable[[], object]
Calls = dict[str, Call]

NUM_CLASSES = 10
LR = 1e-5  # the time does not depend on it, and the weights stay finite for any number of steps

WHOLE_STEPS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
    "sam (sgd + SAM)": {"optimizer": "sam"},
    "muon": {"optimizer": "muon"},
    "muon + SAM": {"optimizer": "muon", "sam_rho": 0.05},
}
# a row of OPTIMIZERS, and whether to use torch's fused kernels
OUR_OPTIMIZERS = {
    "sgd, fused": ("sgd", True),
    "sgd, for-loop": ("sgd", False),
    "adamw, fused": ("adamw", True),
    "adamw, for-loop": ("adamw", False),
    "muon": ("muon", False),
}


def take_turns(calls: Calls, args: argparse.Namespace) -> dict[str, list[float]]:
    """The milliseconds of every call, by name: each runs once as a warm-up, then `rounds` times, in turns.

    A call is skipped if it would exceed `seconds_per_row` after another run as long as its last; each runs at least once.
    """
    wait: Call = (lambda: None) if args.device == "cpu" else torch.accelerator.synchronize
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with progress_bar((args.rounds + 1) * len(calls), 0, "measuring", shown=True) as bar:
        for _ in range(args.rounds + 1):
            for name, call in calls.items():
                bar.update()
                taken = samples[name]
                if taken and sum(taken) + taken[-1] > 1000 * args.seconds_per_row:
                    continue
                wait()
                start = perf_counter()
                call()
                wait()
                taken.append(1000 * (perf_counter() - start))
    return samples


def to_section(title: str, reference: str, samples: dict[str, list[float]], device: str) -> Section:
    """A table without the first call of each row, its warm-up. A row with a single call keeps it and is marked as cold."""
    kept = {name: taken[1:] or taken for name, taken in samples.items()}
    extras: dict[str, Row] = {
        name: {"device": device_name(torch.device(device)), "threads": torch.get_num_threads(), "warmed_up": len(taken) > 1}
        for name, taken in samples.items()
    }
    return Section(title, summarise(kept, "ms", reference, extras), "ms")


def make_config(args: argparse.Namespace, **settings: Any) -> Config:
    names = ("model_name", "batch_size", "image_size", "stem", "mixed_precision")
    settings |= {name: getattr(args, name) for name in names}
    return Config(**settings, channels_last=args.channels_last == "true")


def make_accelerator(args: argparse.Namespace) -> Any:
    """An Accelerator on the device. Raises ValueError if the device is not available, or for fp16 on a CPU."""
    from accelerate import Accelerator

    if args.mixed_precision == "fp16" and args.device == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU. On a CPU, use bf16 or no.")
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    if accelerator.device.type != args.device:
        raise ValueError(f"No {args.device} device was found, but {accelerator.device.type}. Use --device cpu.")
    return accelerator


def make_model_and_batch(args: argparse.Namespace, accelerator: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, images [B, 3, S, S] and labels [B], on the device, from seed 0."""
    from pipeline.distributed.accelerator import fit_to_machine
    from pipeline.models.create import create_model

    config = make_config(args)
    torch.manual_seed(0)
    model, _ = create_model(config.model_name, num_classes=NUM_CLASSES, image_size=args.image_size, stem=config.stem)
    model = fit_to_machine(model, config, accelerator)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size).to(accelerator.device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return model, images, torch.randint(NUM_CLASSES, (args.batch_size,)).to(accelerator.device)


def our_step(model: nn.Module, images: Tensor, labels: Tensor, config: Config, accelerator: Any) -> Call:
    """A training step of a run (forward, backward, optimizer, metrics) on a copy of the model."""
    from pipeline.training.state import begin_state
    from pipeline.training.step import Share, train_step

    own = copy.deepcopy(model)
    state = begin_state(own, create_optimizer(own, config, accelerator.mixed_precision), accelerator)
    set_lr(state.optimizer, LR)
    share = Share(images, labels, len(images), epochs=0.0)
    return lambda: train_step(state, share, config, accelerator)


def bare_step(model: nn.Module, images: Tensor, labels: Tensor, config: Config) -> Call:
    """The step of the shortest loop in plain torch, with the same SGD as ours."""
    own = copy.deepcopy(model)
    precision = config.mixed_precision or "no"
    fused = create_optimizer(own, config, precision).defaults["fused"]
    optimizer = torch.optim.SGD(own.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)
    device, half = images.device.type, HALVES.get(precision)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step() -> None:
        with torch.autocast(device, half) if half else contextlib.nullcontext():
            loss = cross_entropy(own(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def optimizers_alone(model: nn.Module, args: argparse.Namespace) -> Calls:
    """`step` of each optimizer on a copy of the model; all copies share the model's gradients, which no step changes."""
    import timm.optim

    def groups(config: Config) -> list[dict[str, Any]]:
        own = copy.deepcopy(model)
        for mine, parameter in zip(own.parameters(), model.parameters()):
            mine.grad = parameter.grad
        return parameter_groups(own, config)

    alone: dict[str, torch.optim.Optimizer] = {}
    for label, (name, fused) in OUR_OPTIMIZERS.items():
        config = make_config(args, optimizer=name)
        alone[label] = OPTIMIZERS[name].build(groups(config), config, fused)
    config = make_config(args, optimizer="muon")
    alone["timm muon"] = timm.optim.Muon(groups(config))  # timm's defaults, with our groups for AdamW
    for optimizer in alone.values():
        set_lr(optimizer, LR)

    matrices = []
    for filters in (p for group in groups(config) if group["use_muon"] for p in group["params"]):
        matrices.append(nn.Parameter(filters.detach().flatten(1).clone()))
        matrices[-1].grad = filters.grad.flatten(1)
    if matrices:
        alone["torch muon, matrices only"] = torch.optim.Muon(matrices, lr=LR)
    return {name: optimizer.step for name, optimizer in alone.items()}


def sections(args: argparse.Namespace, settings: list[str]) -> Iterator[Section]:
    """A table of whole training steps relative to SGD, and one of optimizer steps alone relative to timm's Muon."""
    model, images, labels = make_model_and_batch(args, accelerator := make_accelerator(args))
    layout = "channels-last weights" if args.channels_last == "true" else "contiguous weights"
    yield whole_steps(f"whole training steps, {layout}", model, images, labels, args, accelerator)
    accelerator.free_memory()
    cross_entropy(model(images), labels).backward()
    alone = take_turns(optimizers_alone(model, args), args)
    yield to_section(f"optimizer.step alone, {layout}", "timm muon", alone, args.device)


def whole_steps(
    title: str, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, accelerator: Any
) -> Section:
    """The table of whole training steps relative to SGD."""
    calls: Calls = {}
    for name, changed in WHOLE_STEPS.items():
        calls[name] = our_step(model, images, labels, make_config(args, **changed), accelerator)
    calls["bare loop, torch's sgd"] = bare_step(model, images, labels, make_config(args, **WHOLE_STEPS["sgd"]))
    return to_section(title, "sgd", take_turns(calls, args), args.device)
