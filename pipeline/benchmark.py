"""Benchmarks, `python -m pipeline.benchmark COMMAND`: what the parts of a run cost, side by side in one process.

The calls that are compared take turns (A B C A B C ...), so that whatever else the machine does falls on all alike.
"""

import argparse
import copy
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.config import Config
from pipeline.console import progress_bar
from pipeline.files import write_atomically
from pipeline.metrics import zero_sums
from pipeline.optimizers import OPTIMIZERS, create_optimizer, parameter_groups, set_lr

Call = Callable[[], object]
Calls = dict[str, Call]

NUM_CLASSES = 10
LR = 1e-5  # the cost does not depend on it, and the weights stay ordinary numbers however many steps are timed

WHOLE_STEPS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
    "sam (sgd + SAM)": {"optimizer": "sam"},
    "muon": {"optimizer": "muon"},
    "muon + SAM": {"optimizer": "muon", "sam_rho": 0.05},
}
# a row of OPTIMIZERS, and whether in torch's fused form
OUR_OPTIMIZERS = {
    "sgd, fused": ("sgd", True),
    "sgd, for-loop": ("sgd", False),
    "adamw, fused": ("adamw", True),
    "adamw, for-loop": ("adamw", False),
    "muon": ("muon", False),
}


@dataclass(frozen=True)
class Section:
    """One table: what its rows share, the row that ratios are taken to, the milliseconds of every timed call."""

    title: str
    reference: str
    samples: dict[str, list[float]]

    def rows(self) -> list[dict[str, Any]]:
        """A row's name, ms (the median), min_ms, max_ms, n, ratio, warmed_up and the samples_ms that these are of.

        The first call of a row warms it up and is left out, unless there was time for no other.
        """
        kept = {name: samples[1:] or samples for name, samples in self.samples.items()}
        medians = {name: statistics.median(samples) for name, samples in kept.items()}
        return [
            {"section": self.title, "row": name, "ms": medians[name], "min_ms": min(samples), "max_ms": max(samples)}
            | {"n": len(samples), "warmed_up": len(self.samples[name]) > 1, "samples_ms": samples}
            | {"ratio": medians[name] / medians[self.reference], "ratio_to": self.reference}
            for name, samples in kept.items()
        ]


def take_turns(calls: Calls, args: argparse.Namespace) -> dict[str, list[float]]:
    """The milliseconds of every call, by its name: once each to warm up, then `rounds` times, in turns.

    A call rests when another one as long as its last would take it past `seconds_per_row`; each runs at least once.
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


def make_config(args: argparse.Namespace, **settings: Any) -> Config:
    settings |= {name: getattr(args, name) for name in ("model_name", "batch_size", "image_size", "stem")}
    return Config(**settings, channels_last=args.channels_last == "true")


def make_accelerator(args: argparse.Namespace) -> Any:
    """An Accelerator in fp32 on the device. Raises ValueError when there is no such device."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="no")
    if accelerator.device.type != args.device:
        raise ValueError(f"No {args.device} device was found, but {accelerator.device.type}. Use --device cpu.")
    return accelerator


def make_model_and_batch(args: argparse.Namespace, accelerator: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, images [B, 3, S, S] and labels [B] that stay on the device; all from seed 0."""
    from pipeline.machine import fit_to_machine
    from pipeline.models import create_model

    config = make_config(args)
    torch.manual_seed(0)
    model, _ = create_model(config.model_name, num_classes=NUM_CLASSES, image_size=args.image_size, stem=config.stem)
    model = fit_to_machine(model, config, accelerator)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size).to(accelerator.device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return model, images, torch.randint(NUM_CLASSES, (args.batch_size,)).to(accelerator.device)


def our_step(model: nn.Module, images: Tensor, labels: Tensor, config: Config, accelerator: Any) -> Call:
    """A training step as a run takes it: forward, backward, optimizer, metrics, on a copy of the model."""
    from pipeline.state import TrainState
    from pipeline.training import Share, train_step

    own = copy.deepcopy(model)
    prepared, optimizer = accelerator.prepare(own, create_optimizer(own, config, accelerator.mixed_precision))
    set_lr(optimizer, LR)
    bad_step = torch.tensor(-1, device=images.device)
    state = TrainState(prepared, optimizer, zero_sums(images.device), bad_step)
    share = Share(images, labels, len(images), epochs=0.0)
    return lambda: train_step(state, share, config, accelerator)


def bare_step(model: nn.Module, images: Tensor, labels: Tensor, config: Config) -> Call:
    """The shortest loop that a person would write with torch alone, with the very SGD that ours takes."""
    own = copy.deepcopy(model)
    fused = create_optimizer(own, config, "no").defaults["fused"]
    optimizer = torch.optim.SGD(own.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)

    def step() -> None:
        cross_entropy(own(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizers_alone(model: nn.Module, args: argparse.Namespace) -> Calls:
    """`step` of each optimizer on its own copy of the model; all share the model's gradients, which no step changes."""
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
    alone["timm muon"] = timm.optim.Muon(groups(config))  # its own defaults, our choice of what goes to AdamW
    for optimizer in alone.values():
        set_lr(optimizer, LR)

    matrices = []
    for filters in (p for group in groups(config) if group["use_muon"] for p in group["params"]):
        matrices.append(nn.Parameter(filters.detach().flatten(1).clone()))
        matrices[-1].grad = filters.grad.flatten(1)
    if matrices:
        alone["torch muon, matrices only"] = torch.optim.Muon(matrices, lr=LR)
    return {name: optimizer.step for name, optimizer in alone.items()}


def optimizers(args: argparse.Namespace) -> Iterator[Section]:
    """Whole training steps relative to SGD's, then optimizer steps alone relative to timm's Muon."""
    model, images, labels = make_model_and_batch(args, accelerator := make_accelerator(args))
    layout = "channels-last weights" if args.channels_last == "true" else "contiguous weights"
    calls: Calls = {}
    for name, settings in WHOLE_STEPS.items():
        calls[name] = our_step(model, images, labels, make_config(args, **settings), accelerator)
    calls["bare loop, torch's sgd"] = bare_step(model, images, labels, make_config(args, **WHOLE_STEPS["sgd"]))
    yield Section(f"whole training steps, {layout}", "sgd", take_turns(calls, args))
    calls.clear()
    accelerator.free_memory()
    cross_entropy(model(images), labels).backward()
    yield Section(f"optimizer.step alone, {layout}", "timm muon", take_turns(optimizers_alone(model, args), args))


def optimizers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name", default="resnet18", help="any that train.py takes")
    parser.add_argument("--stem", choices=("imagenet", "small", "auto"), default="imagenet", help="as train.py's")
    parser.add_argument("--batch_size", type=at_least_one, default=128, metavar="N", help="images of a step")
    parser.add_argument("--image_size", type=at_least_one, default=32, metavar="N", help="side in pixels")
    either, text = ("true", "false"), "keep images and convolutions in channels-last order"
    parser.add_argument("--channels_last", type=str.lower, choices=either, default="false", help=text)


@dataclass(frozen=True)
class Command:
    """A benchmark: a sentence for --help, its own arguments, and what it measures, a table at a time."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    sections: Callable[[argparse.Namespace], Iterator[Section]]


COMMANDS = {
    "optimizers": Command("what each costs, relative to SGD and to timm's Muon", optimizers_arguments, optimizers),
}


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """A subcommand for each of COMMANDS: the arguments that all have, then its own."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.benchmark", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    defaults = argparse.ArgumentDefaultsHelpFormatter
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(name, help=command.help, description=command.help, formatter_class=defaults)
        own.allow_abbrev = False
        command.add_arguments(own)
        own.add_argument("--rounds", type=at_least_one, default=20, metavar="N", help="turns of each row that count")
        slow = "a row that would take longer stops early; it runs at least once"
        own.add_argument("--seconds_per_row", type=float, default=60.0, metavar="S", help=slow)
        own.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
        own.add_argument("--json", type=Path, metavar="FILE", help="also write every row as a line of JSON")
    return parser


def machine_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on: processor, cores, torch's threads, device, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" and torch.cuda.is_available() else args.device,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "accelerate")},
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a section in Markdown, aligned for the terminal."""
    cells = [["row", "ms", "min", "max", "n", f"ratio to {rows[0]['ratio_to']}"]]
    for row in rows:
        times = [f"{row[key]:.2f}" for key in ("ms", "min_ms", "max_ms")]
        cells.append([row["row"], *times, f"{row['n']}{'' if row['warmed_up'] else ' (cold)'}", f"{row['ratio']:#.3g}"])
    cells.insert(1, ["---", *["---:"] * 5])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, writes the JSON; returns the exit status: 0 done, 2 for what cannot be measured here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(arguments)
    facts = {"command": f"python -m pipeline.benchmark {shlex.join(arguments)}", **machine_facts(args)}
    print("{command}\n{cpu}, {cores} cores, {threads} threads, device {device}".format(**facts))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{versions}\nmedian, least and most milliseconds of n calls in turns", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        if args.json is not None and not args.json.parent.is_dir():
            raise ValueError(f"There is no folder {args.json.parent} for --json {args.json}. Make it first.")
        for section in COMMANDS[args.command].sections(args):
            rows += section.rows()
            print(f"\n{section.title}\n{table(section.rows())}", flush=True)
            if args.json is not None:
                write_atomically(args.json, "".join(json.dumps(row | facts) + "\n" for row in rows).encode())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
