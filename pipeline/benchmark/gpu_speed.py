"""The parts of `gpu` that time training steps: the bare loop, ours and timm's script, the loaders, Muon and SAM."""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.benchmark.children import run_child
from pipeline.benchmark.contenders import BARE, OURS, peer_data, prepared
from pipeline.benchmark.gpu_groups import Group, has_gpu, precisions_of
from pipeline.benchmark.loaders import Kind, kinds_of, section_of
from pipeline.benchmark.measuring import Row, column, largest, summarise
from pipeline.common.system import usable_cores

SCRIPT = "timm's train.py"
# torch's default allows TF32 in convolutions only; this also allows it in matrix products, for all contenders alike
TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
PRECISION_NAMES = {"no": "fp32 with TF32", "bf16": "bf16", "fp16": "fp16"}
COMPILE_FLAGS = {"off": "false", "on": "true", "reduce-overhead": "reduce-overhead"}
MOST_WORKERS = 14


@dataclass(frozen=True)
class Workload:
    """A model with its images: `made` synthetic PNG images of `made_side` pixels, or JPEG photos if that is None."""

    model_name: str
    image_size: int
    batch_size: int
    made: int
    made_side: int | None


RESNET18 = Workload("resnet18", 32, 512, made=10_240, made_side=32)
RESNET50 = Workload("resnet50", 224, 256, made=2560, made_side=None)
VIT_SMALL = Workload("vit_small_patch16_224", 224, 256, made=2560, made_side=None)
TOY = {
    RESNET18: Workload("test_resnet", 16, 4, made=12, made_side=16),
    RESNET50: Workload("simple_mlp", 16, 4, made=12, made_side=None),
    VIT_SMALL: Workload("simple_mlp", 8, 4, made=12, made_side=None),
}


def sized(workload: Workload, args: Namespace) -> Workload:
    return TOY[workload] if args.rehearse else workload


def has_convolutions(workload: Workload) -> bool:
    """Whether its runs use channels_last by default."""
    return "res" in workload.model_name


def size_text(workload: Workload) -> str:
    return f"{workload.model_name} at {workload.image_size} pixels, batch {workload.batch_size}"


def workers_of(args: Namespace) -> int:
    """Worker processes of each loader."""
    return 0 if args.rehearse else min(max(usable_cores() - 2, 1), MOST_WORKERS)


def loop_groups(workload: Workload, args: Namespace, settings: list[str]) -> Iterator[Group]:
    """A group for each compile mode and precision: the bare loop, ours and timm's script, in turns in one process."""
    work = sized(workload, args)
    section = f"Training speed: {size_text(workload)}"
    with contextlib.ExitStack() as stack:

        @functools.cache
        def on_data() -> tuple[list[str], dict[str, str], Row]:
            own = Namespace(num_images=work.made, made_size=work.made_side)
            given = [f"--model_name={work.model_name}", f"--image_size={work.image_size}", "--stem=auto"]
            given += [f"--batch_size={work.batch_size}", f"--num_workers={workers_of(args)}", *settings]
            complete, environment, folder = stack.enter_context(prepared(own, given))
            data = peer_data(complete, environment, folder)
            return complete, {**environment, "HF_DATASETS_CACHE": str(folder / "cache")}, data

        def measure(precision: str, mode: str) -> list[Row]:
            complete, environment, data = on_data()
            flags = [*complete, f"--mixed_precision={precision}", f"--compile={COMPILE_FLAGS[mode]}"]
            # the layout that ours chooses by default, for all contenders alike
            flags.append(f"--channels_last={has_convolutions(work)}")
            common = {"settings": flags, "warmup_steps": args.warmup_steps, "seconds": args.seconds}
            peer = {**common, "data": data}
            calls = {
                BARE: ["peers.loops.bare", peer],
                OURS: ["ours.train", common],
                SCRIPT: ["peers.loops.timm_script", {**peer, "workers": workers_of(args)}],
            }
            return in_one_process(calls, args.rounds, environment)

        for mode in args.compile_modes:
            for precision in precisions_of(args):
                name = f"{PRECISION_NAMES[precision]}, compile {mode}"
                yield Group(section, name, functools.partial(measure, precision, mode))


def loop_resnet18(args: Namespace, settings: list[str]) -> Iterator[Group]:
    return loop_groups(RESNET18, args, settings)


def loop_resnet50(args: Namespace, settings: list[str]) -> Iterator[Group]:
    return loop_groups(RESNET50, args, settings)


def loop_vit_small(args: Namespace, settings: list[str]) -> Iterator[Group]:
    return loop_groups(VIT_SMALL, args, settings)


def in_one_process(calls: dict[str, list[Any]], rounds: int, environment: dict[str, str]) -> list[Row]:
    """The rows of contenders that take turns in one child process."""
    arguments = {"calls": calls, "rounds": rounds}
    found = run_child("gpu_child.take_turns", arguments, environment={**environment, **TF32})["results"]
    extras = {
        name: {"gpu_memory_bytes": largest(of_name, "gpu_memory_bytes")}
        | {"wait_fraction": sum(result["wait_fraction"] for result in of_name) / len(of_name)}
        | {key: of_name[-1][key] for key in ("device", "threads")}
        for name, of_name in found.items()
    }
    return summarise(column(found, "images_per_second"), "images/s", BARE, extras)


def loaders(args: Namespace, settings: list[str]) -> Iterator[Group]:
    """The tables of `benchmark loaders`, a group for small images and one for photos."""
    own = Namespace(
        workers=[0] if args.rehearse else sorted({0, 4, workers_of(args)}),
        batch_size=8 if args.rehearse else 256,
        num_images=12 if args.rehearse else RESNET18.made,
        num_photos=12 if args.rehearse else RESNET50.made,
        made_size=32,
        seconds=args.seconds,
        rounds=args.rounds,
    )

    def measure(title: str, kind: Kind) -> list[Row]:
        return section_of(title, kind, own, settings).rows

    for title, kind in kinds_of(own).items():
        yield Group("Loaders alone", title, functools.partial(measure, title, kind))


def steps(args: Namespace, settings: list[str]) -> Iterator[Group]:
    """The table of whole steps of `benchmark optimizers`, relative to SGD, for each model and precision."""

    def measure(own: Row) -> list[Row]:
        rows: list[Row] = run_child("gpu_child.optimizer_steps", {"own": own}, environment=TF32)["rows"]
        return rows

    for workload in (RESNET18, RESNET50, VIT_SMALL):
        work = sized(workload, args)
        for precision in precisions_of(args):
            own = {
                **{"model_name": work.model_name, "image_size": work.image_size, "batch_size": work.batch_size},
                **{"stem": "auto", "channels_last": str(has_convolutions(work)).lower(), "mixed_precision": precision},
                **{"device": "cuda" if has_gpu() else "cpu"},
                **{"rounds": 1 if args.rehearse else 20, "seconds_per_row": 10.0},
            }
            name = f"{size_text(workload)}, {PRECISION_NAMES[precision]}"
            yield Group("Training steps by optimizer", name, functools.partial(measure, own))
