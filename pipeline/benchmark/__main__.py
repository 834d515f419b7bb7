"""The command line of the benchmarks: the commands, their arguments, and the output of their figures."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline.benchmark
from pipeline.benchmark.measuring import Section
from pipeline.benchmark.reporting import draw, heading, machine_facts, text_of, write_lines
from pipeline.common.suggestions import did_you_mean
from pipeline.common.system import usable_cores
from pipeline.run_folder.lock import FolderLock
from pipeline.settings.command_line import CommandFailed, CommandParser, above_zero, at_least, exit_status, one_of
from pipeline.settings.config import FIELDS


def made_set(parser: CommandParser, num_images: int = 5120) -> None:
    parser.add_argument(
        "--num_images", type=at_least(1), default=num_images, metavar="N", help="images of the synthetic set"
    )
    parser.add_argument("--made_size", type=at_least(1), default=32, metavar="N", help="side of its images in pixels")


def timed_steps(parser: CommandParser, seconds: float = 3.0) -> None:
    parser.add_argument("--seconds", type=above_zero, default=seconds, metavar="S", help="timed seconds of each measurement")
    parser.add_argument("--warmup_steps", type=at_least(1), default=3, metavar="N", help="untimed steps before")
    made_set(parser)


def loop_arguments(parser: CommandParser) -> None:
    timed_steps(parser)
    parser.add_argument("--fast", action="store_true", help="also measure ours with bf16 and channels_last")
    text = "also measure the bare loop with channels_last, and ours without"
    parser.add_argument("--layouts", action="store_true", help=text)
    text = "worker processes of the peers' loaders"
    parser.add_argument("--peer_workers", type=at_least(0), default=usable_cores(), metavar="N", help=text)


def loaders_arguments(parser: CommandParser) -> None:
    text = "numbers of worker processes to measure"
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=up_to(2), metavar="N", help=text)
    parser.add_argument("--batch_size", type=at_least(1), default=128, metavar="N", help="images per batch")
    parser.add_argument("--num_photos", type=at_least(1), default=256, metavar="N", help="synthetic JPEG photos")
    parser.add_argument("--seconds", type=above_zero, default=1.0, metavar="S", help="timed seconds of each loader and round")
    made_set(parser, num_images=2560)


def optimizers_arguments(parser: CommandParser) -> None:
    parser.add_argument("--model_name", default="resnet18", help="any model of train.py")
    parser.add_argument("--stem", type=one_of("imagenet", "small", "auto"), default="imagenet", help="as in train.py")
    parser.add_argument("--batch_size", type=at_least(1), default=128, metavar="N", help="images per step")
    parser.add_argument("--image_size", type=at_least(1), default=32, metavar="N", help="side in pixels")
    text = "true or false: keep images and convolutions in channels-last order"
    parser.add_argument("--channels_last", type=one_of("true", "false"), default="false", help=text)
    text = "precision of the whole steps: no, bf16 or fp16"
    parser.add_argument("--mixed_precision", type=one_of("no", "bf16", "fp16"), default="no", help=text)
    slow = "time limit of a row, which runs at least once"
    parser.add_argument("--seconds_per_row", type=above_zero, default=60.0, metavar="S", help=slow)
    parser.add_argument("--device", type=one_of("cpu", "cuda"), default="cpu", help="device to measure on, cpu or cuda")


def checkpoint_arguments(parser: CommandParser) -> None:
    parser.add_argument("--steps", type=at_least(1), default=10, metavar="N", help="steps per block")
    text = "images of the epoch that shares refer to (CIFAR-10's)"
    parser.add_argument("--epoch_images", type=at_least(1), default=50_000, metavar="N", help=text)
    made_set(parser)


def scaling_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "--processes", type=at_least(1), nargs="+", default=[1, 2], metavar="N", help="numbers of processes"
    )
    parser.add_argument("--steps", type=at_least(1), default=10, metavar="N", help="timed steps of each measurement")
    parser.add_argument("--warmup_steps", type=at_least(1), default=3, metavar="N", help="untimed steps before")
    parser.add_argument("--strong", action="store_true", help="batch_size is for all processes together, not per process")
    made_set(parser)


FACTORS = ("loader", "pin_memory", "precision", "compile", "batch_size", "memory")


def efficiency_arguments(parser: CommandParser) -> None:
    timed_steps(parser, seconds=2.0)
    text = "numbers of worker processes to measure"
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=up_to(2), metavar="N", help=text)
    text = (
        f"factors to vary, one at a time: {', '.join(FACTORS)}; memory is gradient checkpointing and micro-batches; "
        "compile takes minutes on a CPU, pin_memory matters on a GPU only"
    )
    default = ["loader", "precision", "batch_size"]
    parser.add_argument("--factors", type=one_of(*FACTORS), nargs="+", default=default, metavar="FACTOR", help=text)


GPU_PARTS = (
    *("tests", "target_94", "loop_resnet18", "loop_resnet50", "loop_vit_small"),
    *("half_sgd", "half_adamw", "half_muon", "loaders", "steps", "finetune", "target_95"),
)


def gpu_arguments(parser: CommandParser) -> None:
    text = f"parts to run, in this order: {', '.join(GPU_PARTS)}; each is made to fit into nine minutes on an H100"
    parser.add_argument("--parts", type=one_of(*GPU_PARTS), nargs="+", default=list(GPU_PARTS), metavar="PART", help=text)
    text = "begin no further measurements after so many minutes; the same command with --output continues"
    parser.add_argument("--minutes", type=above_zero, default=60.0, metavar="M", help=text)
    text = "run every part at toy size, on a CPU too, to test the command"
    parser.add_argument("--rehearse", action="store_true", help=text)
    text = "seeds of each run to a target, from 0 on"
    parser.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help=text)
    text = "precisions to measure, no (fp32 with TF32), bf16, fp16; half_* always measure fp32 too"
    precisions = ["bf16", "no", "fp16"]
    parser.add_argument("--precisions", type=one_of(*precisions), nargs="+", default=precisions, metavar="P", help=text)
    modes = ["off", "on", "reduce-overhead"]
    text = f"modes of torch.compile to measure in the loops: {', '.join(modes)}"
    parser.add_argument("--compile_modes", type=one_of(*modes), nargs="+", default=modes, metavar="MODE", help=text)
    parser.add_argument("--seconds", type=above_zero, default=3.0, metavar="S", help="timed seconds of each measurement")
    parser.add_argument("--warmup_steps", type=at_least(1), default=10, metavar="N", help="untimed steps before")


def lr_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "--num_steps", type=at_least(1), default=100, metavar="N", help="steps, each with one learning rate"
    )
    parser.add_argument("--lr_start", type=above_zero, default=1e-5, metavar="LR", help="first learning rate")
    parser.add_argument("--lr_end", type=above_zero, default=10.0, metavar="LR", help="last learning rate")


def finetune_arguments(parser: CommandParser) -> None:
    optimizers = ("sgd", "adam", "adamw", "muon")
    text = "optimizers of ours, each by its default settings; none after the flag compares the other trainers alone"
    parser.add_argument("--optimizers", nargs="*", default=list(optimizers), metavar="NAME", help=text)
    text = "other trainers to compare with: fastai, timm, plain; none after the flag compares ours alone"
    peers = ("fastai", "timm", "plain")
    parser.add_argument("--peers", type=one_of(*peers), nargs="*", default=list(peers), metavar="PEER", help=text)
    text = "Python of an environment with fastai and timm; default: this one, if it has fastai"
    parser.add_argument("--fastai_python", type=Path, metavar="PATH", help=text)


def up_to(workers: int) -> list[int]:
    return list(range(max(workers, usable_cores()) + 1)) if usable_cores() <= 4 else [0, *powers_of_two(usable_cores())]


def powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


@dataclass(frozen=True)
class Command:
    """A benchmark: its sentence in --help, its arguments, its default rounds, whether it accepts train.py's settings, and
    whether it draws a chart.

    Its module, pipeline.benchmark.NAME, has `sections(args, settings)`, which yields a Section for each table.
    """

    help: str
    add_arguments: Callable[[CommandParser], None]
    rounds: int | None
    settings: bool = True
    chart: bool = True


COMMANDS = {
    "loop": Command("training end to end: the bare loop, ours, and the installed peers", loop_arguments, 3),
    "loaders": Command(
        "loaders alone: ours, torch's and timm's, for small PNG images and photos", loaders_arguments, 3
    ),
    "optimizers": Command(
        "time of each optimizer, relative to SGD and to timm's Muon", optimizers_arguments, 20, settings=False
    ),
    "checkpoint": Command("how long saving a checkpoint blocks training, ours and Accelerate's", checkpoint_arguments, 5),
    "startup": Command("seconds to the end of the first step, and the time of each import", made_set, 3),
    "scaling": Command("one process and several: images/s, all-reduced bytes, efficiency", scaling_arguments, 3),
    "efficiency": Command("loaders, precision and batch sizes on this machine, with a recommendation", efficiency_arguments, 2),
    "gpu": Command("the first hour on a GPU, in parts that can be resumed", gpu_arguments, 3, chart=False),
    "finetune": Command(
        "test accuracy over time from given weights: ours by defaults, fastai, timm and a plain loop", finetune_arguments, 3
    ),
    "lr": Command("learning-rate range test with the settings of a run, and a suggestion", lr_arguments, None),
}


def make_parser() -> CommandParser:
    """A subcommand for each of COMMANDS, with its own and the common arguments."""
    parser = CommandParser(prog="python -m pipeline.benchmark", description=pipeline.benchmark.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = "Accepts every setting of train.py too. The default is --dataset synthetic, a generated set."
    real = {
        "lr": "Accepts every setting of train.py too.",
        "gpu": "Accepts settings of train.py too, for all parts but tests and steps, except those that the parts choose. The "
        "targets and half_* use CIFAR-10, finetune Oxford-IIIT Pet, the other parts a generated set.",
        "finetune": "Accepts every setting of train.py too. The defaults are --dataset oxford_iiit_pet --model_name "
        "tf_efficientnet_lite0 --pretrained true --image_size 128 --batch_size 16 --epochs 3; round n has seed n - 1.",
    }
    for name, command in COMMANDS.items():
        epilog = None if not command.settings else real.get(name, settings)
        own = subparsers.add_parser(name, help=command.help, description=command.help, epilog=epilog)
        command.add_arguments(own)
        if command.rounds is not None:
            text = "measurements of each row"
            own.add_argument("--rounds", type=at_least(1), default=command.rounds, metavar="N", help=text)
        chart = f" and the chart benchmark-{name}.png" if command.chart else ""
        text = f"folder to write benchmark-{name}.jsonl{chart} to"
        own.add_argument("--output", type=Path, metavar="DIR", help=text)
        own.set_defaults(parser=own)
    add_results(subparsers)
    return parser


def add_results(subparsers: Any) -> None:
    """The command that measures nothing: it turns the JSON lines of the others into Markdown."""
    text = "Markdown tables of the JSON lines of benchmarks, with machine and versions"
    own = subparsers.add_parser("results", help=text, description=text)
    own.add_argument("files", type=Path, nargs="+", metavar="FILE", help="benchmark-COMMAND.jsonl, written by --output")
    text = "Markdown file to write them to, between its lines <!-- benchmark results: begin --> and end; default: print them"
    own.add_argument("--write", type=Path, metavar="FILE", help=text)
    own.set_defaults(parser=own)


def write_results(args: argparse.Namespace) -> int:
    from pipeline.benchmark.results import print_or_write

    return print_or_write(args)


def measure(args: argparse.Namespace, settings: list[str]) -> int:
    """Measures, prints each table when it is complete, and writes the files. Raises ValueError, TrainingFailed, OSError."""
    if args.output is None:
        return measure_alone(args, settings)
    make_folder(args.output)
    lock = FolderLock(args.output, f".benchmark-{args.command}.lock", "pass another --output")
    try:
        return measure_alone(args, settings)
    finally:
        lock.release()


def measure_alone(args: argparse.Namespace, settings: list[str]) -> int:
    """measure, if no other process writes the same files."""
    facts = machine_facts(args.arguments)
    print(heading(facts), flush=True)
    has_chart = COMMANDS[args.command].chart
    sections: dict[tuple[str, str | None], Section] = {}
    for section in importlib.import_module(f"pipeline.benchmark.{args.command}").sections(args, settings):
        sections[section.title, section.group] = section  # a group that is measured again replaces its earlier rows
        print(f"\n{text_of(section)}", flush=True)
        if args.output is not None and not section.written:
            write_files(args.output / f"benchmark-{args.command}", list(sections.values()), facts, has_chart)
    if args.output is not None:
        print(f"\n{args.output / f'benchmark-{args.command}'}.jsonl{' and .png' if has_chart else ''}")
    return 0


def make_folder(path: Path) -> None:
    """Creates the folder of --output. Raises ValueError if it cannot be written, before anything is measured."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"--output {path} is not a folder that can be written: {error.strerror}. Pass another one.") from error


def write_files(stem: Path, sections: list[Section], facts: dict[str, Any], has_chart: bool) -> None:
    """Writes the JSON lines and the chart. Raises CommandFailed if that fails; what an earlier call wrote is unchanged."""
    try:
        write_lines(stem.with_name(f"{stem.name}.jsonl"), sections, facts)
        if has_chart:
            draw(stem.with_name(f"{stem.name}.png"), sections, facts)
    except OSError as error:
        raise CommandFailed(
            f"{stem}.jsonl cannot be written: {error.strerror}. It lacks the table above. Repair this and run the command again."
        ) from error


def check_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A benchmark's own arguments and the settings of train.py after them. Exits with status 2 for an unknown argument."""
    parser = make_parser()
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    commands = [*COMMANDS, "results"]
    if command is not None and command not in commands:
        parser.error(f"Unknown benchmark {command!r}.{did_you_mean(command, commands)} Known: {', '.join(commands)}.")
    args, settings = parser.parse_known_args(arguments)
    own = vars(args).pop("parser")
    has_settings = args.command in COMMANDS and COMMANDS[args.command].settings
    known = [f"--{name}" for name in ("config", *FIELDS)] if has_settings else []
    for argument in settings:
        if not known or (argument.startswith("--") and argument.split("=")[0] not in known):
            own.fail_for_unknown(argument, known)
    return args, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit status: 0 completed, 1 a measurement failed, 2 invalid input, 128 + n for signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, settings = check_arguments(arguments)
    args.arguments = arguments
    return exit_status(lambda: write_results(args) if args.command == "results" else measure(args, settings))


if __name__ == "__main__":
    sys.exit(main())
