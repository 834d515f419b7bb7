"""`gpu`: the first hour on a GPU, in parts that can be run one at a time and are resumed where they stopped."""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.benchmark import gpu_speed, gpu_training
from pipeline.benchmark.gpu_groups import Group, Groups, has_gpu
from pipeline.benchmark.measuring import Row, Section
from pipeline.benchmark.reporting import machine_facts

# in the order of --help and of a run without --parts
PARTS: dict[str, Groups] = {
    "tests": gpu_training.tests,
    "target_94": gpu_training.target_94,
    "loop_resnet18": gpu_speed.loop_resnet18,
    "loop_resnet50": gpu_speed.loop_resnet50,
    "loop_vit_small": gpu_speed.loop_vit_small,
    **{f"half_{optimizer}": partial(gpu_training.half, optimizer) for optimizer in ("sgd", "adamw", "muon")},
    "loaders": gpu_speed.loaders,
    "steps": gpu_speed.steps,
    "finetune": gpu_training.finetune,
    "target_95": gpu_training.target_95,
}


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """A section for each group of measurements: those in the file of an earlier call, then those that are not there yet.

    After args.minutes no further group begins. Raises ValueError without a GPU, unless args.rehearse is set.
    """
    if not (args.rehearse or has_gpu()):
        raise ValueError("No GPU was found that torch can use. To run every part at toy size on a CPU, add --rehearse.")
    began = time.monotonic()
    done = read_done(args.output)
    for (title, name), rows in done.items():
        yield Section(title, rows, rows[0].get("unit", ""), group=name)
    facts = machine_facts(args.arguments)
    omitted = 0
    for part in args.parts:
        for group in PARTS[part](args, settings):
            if (group.section, group.name) in done:
                continue
            if time.monotonic() - began >= 60 * args.minutes:
                omitted += 1
                continue
            rows = timed_rows(group, facts)
            yield Section(group.section, rows, rows[0].get("unit", ""), group=group.name)
    if omitted:
        print(f"\n{omitted} groups did not begin within {args.minutes:g} minutes. The same command measures them.")


def timed_rows(group: Group, facts: Row) -> list[Row]:
    """The rows of a group, each with the facts of the machine and with group_seconds, the time of the group."""
    began = time.monotonic()
    rows = group.measure()
    return [{**facts, **row, "group_seconds": round(time.monotonic() - began, 1)} for row in rows]


def read_done(output: Path | None) -> dict[tuple[str, str], list[Row]]:
    """The rows of an earlier call with the same --output, by section and group."""
    path = None if output is None else output / "benchmark-gpu.jsonl"
    done: dict[tuple[str, str], list[Row]] = {}
    if path is not None and path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            done.setdefault((row["section"], row["group"]), []).append(row)
    return done
