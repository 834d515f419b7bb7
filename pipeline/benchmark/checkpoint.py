"""`checkpoint`: for how long saving holds training up, ours and Accelerate's save_state side by side."""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.benchmark.children import run_child
from pipeline.benchmark.contenders import prepared
from pipeline.benchmark.measuring import Section, in_turns, summarise
from pipeline.parsing import read_config

THEIRS = "accelerator.save_state"
HELD, WRITTEN = "ours: training is held up", "ours: until it is on the disk"
ALONE = "no saving"


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """Milliseconds of saving, then those of some steps without and with saving before them."""
    with prepared(args, settings) as (settings, environment, _):
        config = read_config(settings)
        arguments = {"settings": settings, "rounds": args.rounds, "steps": args.steps}
        result = run_child("checkpoint.measure", arguments, environment=environment)
    assert config.batch_size is not None
    block = summarise(result["blocks"], "ms", ALONE)
    epoch_ms = block[0]["median"] / args.steps * (args.epoch_images // config.batch_size)
    facts = {key: result[key] for key in ("device", "threads")}
    sizes = {THEIRS: result["their_bytes"], HELD: None, WRITTEN: result["our_bytes"]}
    saving = summarise(
        result["savings"], "ms", THEIRS, {name: {"bytes_on_disk": size, **facts} for name, size in sizes.items()}
    )
    for row in saving:
        row["epoch_share"] = row["median"] / epoch_ms
    note = (
        f"An epoch of {args.epoch_images:,} images takes {epoch_ms / 1000:,.1f} s. "
        "What ours writes is synced to the disk, what save_state writes is not."
    )
    yield Section(f"saving {config.model_name} with {config.optimizer}", saving, "ms", [note])
    for row in block:
        row["epoch_share"] = (row["median"] - block[0]["median"]) / epoch_ms
        row |= facts
    title = f"{args.steps} steps of batch {config.batch_size}, with saving before them; the share is what saving adds"
    yield Section(title, block, "ms")


def measure(settings: list[str], rounds: int, steps: int, folder: str) -> dict[str, Any]:
    """In a process of its own: milliseconds of saving and of blocks of steps, in turns, and the bytes that were written."""
    import torch

    from pipeline.benchmark.ours import start
    from pipeline.benchmark.stepclock import wait_for
    from pipeline.optimizers import peak_lr, set_lr
    from pipeline.training import Share, train_step

    parts, run, state = start(settings, folder)
    config, accelerator, loader = parts.config, run.accelerator, parts.loaders["train"]
    batch_size, theirs = config.batch_size or 1, Path(folder) / "save_state"
    set_lr(state.optimizer, peak_lr(config))

    def take_steps() -> None:
        for images, labels in loader.train_epoch(0, batch_size, steps):
            share = Share(images, labels, len(images), epochs=len(images) / len(loader))
            train_step(state, share, config, accelerator)
        wait_for(accelerator.device)

    def milliseconds(*calls: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for call in calls:
            call()
        return 1000 * (time.perf_counter() - began)

    def save() -> None:
        run.save(state)

    def save_state() -> None:
        accelerator.save_state(str(theirs))

    def with_ours() -> float:
        taken = milliseconds(save, take_steps)
        run.finish_saving()
        return taken

    def with_theirs() -> float:
        taken = milliseconds(save_state, take_steps)
        shutil.rmtree(theirs)
        return taken

    def save_alone() -> tuple[float, float]:
        held = milliseconds(save)
        return held, held + milliseconds(run.finish_saving)

    def save_state_alone() -> tuple[float, int]:
        taken = milliseconds(save_state)
        num_bytes = size_of(theirs)
        shutil.rmtree(theirs)
        return taken, num_bytes

    try:
        take_steps()  # warms up, and gives the optimizer its state
        with_ours()
        blocks = in_turns(
            {
                ALONE: lambda: milliseconds(take_steps),
                "ours before them": with_ours,
                f"{THEIRS} before them": with_theirs,
            },
            rounds,
        )
        alone = in_turns({"ours": save_alone, THEIRS: save_state_alone}, rounds)
        savings = {
            THEIRS: [taken for taken, _ in alone[THEIRS]],
            HELD: [held for held, _ in alone["ours"]],
            WRITTEN: [written for _, written in alone["ours"]],
        }
        return {
            "blocks": blocks,
            "savings": savings,
            "their_bytes": alone[THEIRS][-1][1],
            "our_bytes": size_of(config.run_dir / "checkpoints"),
            "device": accelerator.device.type,
            "threads": torch.get_num_threads(),
        }
    finally:
        run.release()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
