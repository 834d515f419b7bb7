"""`gpu`: the first hour on a GPU, in parts that can be run one at a time and are resumed where they stopped."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.benchmark import gpu_speed, gpu_training
from pipeline.benchmark.contenders import check_comparable
from pipeline.benchmark.gpu_groups import Group, Groups, has_gpu
from pipeline.benchmark.measuring import Row, Section
from pipeline.benchmark.reporting import machine_facts, read_rows
from pipeline.common.stopping import TrainingFailed
from pipeline.settings.parser import read_config

LOOPS: dict[str, Groups] = {
    "loop_resnet18": gpu_speed.loop_resnet18,
    "loop_resnet50": gpu_speed.loop_resnet50,
    "loop_vit_small": gpu_speed.loop_vit_small,
}
# in the order of --help and of a run without --parts
PARTS: dict[str, Groups] = {
    "tests": gpu_training.tests,
    "target_94": gpu_training.target_94,
    **LOOPS,
    **{f"half_{optimizer}": partial(gpu_training.half, optimizer) for optimizer in ("sgd", "adamw", "muon")},
    "loaders": gpu_speed.loaders,
    "steps": gpu_speed.steps,
    "finetune": gpu_training.finetune,
    "target_95": gpu_training.target_95,
}
# arguments that change what every group measures; the others select groups
MEASURED_WITH = ("rehearse", "rounds", "seconds", "warmup_steps")
# settings that the parts choose, and that the titles of the tables name
OF_THE_PARTS = (
    *("config", "model_name", "image_size", "batch_size", "mixed_precision", "compile", "channels_last", "stem", "seed"),
    *("optimizer", "sam_rho", "micro_batch_size"),
)


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """A section for each group of measurements: those in the file of an earlier call, then those that are not there yet.

    After args.minutes no further group begins. A group that fails does not stop the others. Raises ValueError without a GPU,
    unless args.rehearse is set, for settings that the parts choose, and for a file of other arguments; TrainingFailed at the
    end if something failed.
    """
    if not (args.rehearse or has_gpu()):
        raise ValueError("No GPU was found that torch can use. To run every part at toy size on a CPU, add --rehearse.")
    check_settings(args, settings)
    began = time.monotonic()
    conditions = {**{name: getattr(args, name) for name in MEASURED_WITH}, "settings": settings}
    done = read_done(args.output, conditions)
    for (title, name), rows in done.items():
        yield section_of(title, name, rows, written=True)
    facts = {**machine_facts(args.arguments), "measured_with": conditions}
    omitted, failures = 0, []
    for part in dict.fromkeys(args.parts):
        for group in PARTS[part](args, settings):
            if group.is_complete(done.get((group.section, group.name), [])):
                continue
            if time.monotonic() - began >= 60 * args.minutes:
                omitted += 1
                continue
            try:
                rows = timed_rows(group, facts)
            except (ValueError, TrainingFailed, OSError) as error:
                failures.append(f"{part}: {group.name or group.section}: {error}")
                print(f"\nfailed: {failures[-1]}", file=sys.stderr, flush=True)
                continue
            yield section_of(group.section, group.name, rows)
            failures += [f"{part}: {row['failed']} tests" for row in rows if row.get("failed")]
    if omitted:
        print(f"\n{omitted} groups did not begin within {args.minutes:g} minutes. The same command measures them.")
    if failures:
        raise TrainingFailed(f"Failed, and measured again by the same command: {'; '.join(failures)}")


def section_of(title: str, name: str, rows: list[Row], written: bool = False) -> Section:
    return Section(title, rows, rows[0].get("unit", ""), group=name, written=written)


def check_settings(args: Namespace, settings: list[str]) -> None:
    """Raises ValueError for invalid settings, for those that the parts choose, and for those that a peer does not support."""
    for setting in settings:
        name = setting.partition("=")[0].removeprefix("--")
        if setting.startswith("--") and name in OF_THE_PARTS:
            raise ValueError(f"The parts of gpu choose {name} themselves. Remove it, or use another benchmark.")
    config = read_config(settings)
    if LOOPS.keys() & set(args.parts):
        check_comparable(config)


def timed_rows(group: Group, facts: Row) -> list[Row]:
    """The rows of a group, each with the facts of the machine and with group_seconds, the time of the group."""
    began = time.monotonic()
    rows = group.measure()
    return [{**facts, **row, "group_seconds": round(time.monotonic() - began, 1)} for row in rows]


def read_done(output: Path | None, conditions: Row) -> dict[tuple[str, str], list[Row]]:
    """The rows of an earlier call with the same --output, by section and group.

    Raises ValueError if the file cannot be read, or was measured under other conditions.
    """
    path = None if output is None else output / "benchmark-gpu.jsonl"
    done: dict[tuple[str, str], list[Row]] = {}
    if path is None or not path.exists():
        return done
    for row in read_rows(path):
        earlier = row.get("measured_with", {})
        changed = [name for name, value in conditions.items() if earlier.get(name) != value]
        if changed:
            was, now = (", ".join(f"{name} {of.get(name)}" for name in changed) for of in (earlier, conditions))
            raise ValueError(f"{path} was measured with {was}, and not {now}. Pass the same arguments, or another --output.")
        done.setdefault((row["section"], row.get("group", "")), []).append(row)
    return done
