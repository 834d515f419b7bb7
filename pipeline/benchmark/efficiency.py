"""`efficiency`: measures settings of loading, precision and memory on this machine and recommends some."""

import shlex
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from pipeline.benchmark.contenders import contender, prepared
from pipeline.benchmark.measuring import Row, Section, column, in_turns, largest, summarise
from pipeline.common.console import plural
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

BASE = "as given"
WORTH = 1.02  # smallest speed-up of a recommended choice


def choices_of(args: Namespace, config: Config) -> dict[str, dict[str, list[str]]]:
    """The flags of each choice, by factor and row name; one factor is changed at a time."""
    batch = config.batch_size or 128
    part = max(batch // 4, 1)
    layout = "channels_last" if config.channels_last is False else "contiguous"
    layout_flags = [f"--channels_last={layout == 'channels_last'}"]
    workers = {
        plural(count, "worker"): ["--loader=workers", f"--num_workers={count}"] for count in args.workers
    }
    factors = {
        "loader": {**({} if config.loader == "auto" else {"loader auto": ["--loader=auto"]}), **workers},
        "precision": {
            "bf16": ["--mixed_precision=bf16"],
            layout: layout_flags,
            f"bf16, {layout}": ["--mixed_precision=bf16", *layout_flags],
        },
        "compile": {"compile": ["--compile=true"]},
        "batch_size": {f"batch {size}": [f"--batch_size={size}"] for size in (batch // 2, batch * 2) if size},
        "memory": {
            "gradient_checkpointing": ["--gradient_checkpointing=true"],
            f"micro-batches of {part}": [f"--micro_batch_size={part}"],
            f"both, micro-batches of {part}": ["--gradient_checkpointing=true", f"--micro_batch_size={part}"],
        },
    }
    return {factor: factors[factor] for factor in factors if factor in args.factors}


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """Two tables: every choice alone, and the recommended choices together."""
    clock = {"warmup_steps": args.warmup_steps, "seconds": args.seconds}
    with prepared(args, settings) as (settings, environment, _):
        config = read_config(settings)
        factors = choices_of(args, config)
        flags = {BASE: [], **{name: given for choices in factors.values() for name, given in choices.items()}}
        calls = {
            name: contender("ours.train", [*settings, *given], environment, clock) for name, given in flags.items()
        }
        if "pin_memory" in args.factors:
            given = [*settings, "--loader=workers", f"--num_workers={max(args.workers)}"]
            for pin in (True, False):
                name = f"pin_memory {'on' if pin else 'off'}, {plural(max(args.workers), 'worker')}"
                calls[name] = contender("ours.train", given, environment, clock, pin_memory=pin)
        first = to_section(
            f"{config.model_name}, batch {config.batch_size}, one choice at a time", in_turns(calls, args.rounds)
        )
        yield first
        medians = {row["row"]: row["median"] for row in first.rows}
        chosen = recommended(factors, medians)
        together = [flag for name in chosen for flag in flags[name]]
        calls = {
            name: contender("ours.train", [*settings, *given], environment, clock)
            for name, given in {BASE: [], "recommended": together}.items()
        }
        second = to_section("the recommended choices together", in_turns(calls, args.rounds))
        gain = second.rows[1]["ratio"]
        second.notes.extend(advice(together if gain >= WORTH else [], gain, factors, medians))
        yield second


def to_section(title: str, results: dict[str, list[Row]]) -> Section:
    """A table of images/s, the fraction of time that the loop waited for data, and the peak memory."""
    extras: dict[str, dict[str, Any]] = {}
    for name, of_name in results.items():
        waited = [result["wait_fraction"] for result in of_name]
        extras[name] = {"wait_fraction": sum(waited) / len(waited), "loader": of_name[-1]["loader"]}
        extras[name] |= {key: largest(of_name, key) for key in ("peak_memory_bytes", "gpu_memory_bytes")}
        extras[name] |= {key: of_name[-1][key] for key in ("device", "threads")}
    return Section(title, summarise(column(results, "images_per_second"), "images/s", BASE, extras), "images/s")


def recommended(factors: dict[str, dict[str, list[str]]], medians: dict[str, float]) -> list[str]:
    """The fastest choice of each factor with a speed-up of at least WORTH; batch_size and memory are not recommended."""
    best = [
        max(choices, key=lambda name: medians[name])
        for factor, choices in factors.items()
        if factor not in ("batch_size", "memory")
    ]
    return [name for name in best if medians[name] >= WORTH * medians[BASE]]


def advice(
    together: list[str], gain: float, factors: dict[str, dict[str, list[str]]], medians: dict[str, float]
) -> list[str]:
    """The recommendation as text."""
    if together:
        lines = [f"For this machine: {shlex.join(together)} ({gain:.2f} times as fast as without them)."]
    else:
        lines = ["For this machine: the settings as they are; no choice gave a speed-up of 2 % together with the others."]
    for name in factors.get("batch_size", {}):
        lines.append(
            f"{name} runs at {medians[name] / medians[BASE]:.2f} times the images per second; no batch size is recommended, "
            "because it changes the training."
        )
    return lines
