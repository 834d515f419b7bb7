"""`checkpoint`: how long saving a checkpoint blocks training, for ours and Accelerate's save_state."""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.benchmark.children import run_child
from pipeline.benchmark.contenders import prepared
from pipeline.benchmark.measuring import Section, in_turns, summarise
from pipeline.settings.parser import read_config

THEIRS = "accelerator.save_state"
BLOCKED, WRITTEN = "ours: training is blocked", "ours: until it is on disk"
ALONE = "without saving"


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """A table of the milliseconds of saving, and one of steps without and with saving before them."""
    with prepared(args, settings) as (settings, environment, _):
        config = read_config(settings)
        arguments = {"settings": settings, "rounds": args.rounds, "steps": args.steps}
        result = run_child("checkpoint.measure", arguments, environment=environment)
    assert config.batch_size is not None
    block = summarise(result["blocks"], "ms", ALONE)
    epoch_ms = block[0]["median"] / args.steps * (args.epoch_images // config.batch_size)
    facts = {key: result[key] for key in ("device", "threads")}
    sizes = {THEIRS: result["their_bytes"], BLOCKED: None, WRITTEN: result["our_bytes"]}
    saving = summarise(
        result["savings"], "ms", THEIRS, {name: {"bytes_on_disk": size, **facts} for name, size in sizes.items()}
    )
    for row in saving:
        row["epoch_share"] = row["median"] / epoch_ms
    note = (
        f"An epoch of {args.epoch_images:,} images takes {epoch_ms / 1000:,.1f} s. "
        "Ours syncs the files to the disk; save_state does not."
    )
    yield Section(f"saving {config.model_name} with {config.optimizer}", saving, "ms", [note])
    for row in block:
        row["epoch_share"] = (row["median"] - block[0]["median"]) / epoch_ms
        row |= facts
    title = f"{args.steps} steps of batch {config.batch_size}, with saving before them; the share is the time that saving adds"
    yield Section(title, block, "ms")


def measure(settings: list[str], rounds: int, steps: int, folder: str) -> dict[str, Any]:
    """Runs in a child process. Returns milliseconds of saving and of blocks of steps, measured in turns, and bytes written."""
    import torch

    from pipeline.benchmark.stepclock import device_name

    saving = TimedSaving(settings, steps, folder)
    try:
        saving.take_steps()  # warms up and creates the optimizer's state
        saving.steps_after_ours()
        blocks = in_turns(
            {
                ALONE: lambda: milliseconds(saving.take_steps),
                "ours before them": saving.steps_after_ours,
                f"{THEIRS} before them": saving.steps_after_theirs,
            },
            rounds,
        )
        alone = in_turns({"ours": saving.ours, THEIRS: saving.theirs}, rounds)
        return {
            "blocks": blocks,
            "savings": {
                THEIRS: [taken for taken, _ in alone[THEIRS]],
                BLOCKED: [blocked for blocked, _ in alone["ours"]],
                WRITTEN: [written for _, written in alone["ours"]],
            },
            "their_bytes": alone[THEIRS][-1][1],
            "our_bytes": size_of(saving.run.config.run_dir / "checkpoints"),
            "device": device_name(saving.run.accelerator.device),
            "threads": torch.get_num_threads(),
        }
    finally:
        saving.run.release()


class TimedSaving:
    """A run that is saved in both ways and then trained for some steps; all times are in milliseconds."""

    def __init__(self, settings: list[str], steps: int, folder: str):
        from pipeline.benchmark.ours import start
        from pipeline.optim.optimizers import peak_lr, set_lr

        parts, self.run, self.state = start(settings, folder)
        self.loader, self.steps, self.their_folder = parts.loaders["train"], steps, Path(folder) / "save_state"
        set_lr(self.state.optimizer, peak_lr(self.run.config))

    def take_steps(self) -> None:
        from pipeline.benchmark.stepclock import wait_for
        from pipeline.training.step import Share, train_step

        config, accelerator = self.run.config, self.run.accelerator
        assert config.batch_size is not None
        for images, labels in self.loader.train_epoch(0, config.batch_size, self.steps):
            share = Share(images, labels, len(images), epochs=len(images) / len(self.loader))
            train_step(self.state, share, config, accelerator)
        wait_for(accelerator.device)

    def save(self) -> None:
        self.run.save(self.state)

    def save_state(self) -> None:
        self.run.accelerator.save_state(str(self.their_folder))

    def steps_after_ours(self) -> float:
        taken = milliseconds(self.save, self.take_steps)
        self.run.finish_saving()
        return taken

    def steps_after_theirs(self) -> float:
        taken = milliseconds(self.save_state, self.take_steps)
        shutil.rmtree(self.their_folder)
        return taken

    def ours(self) -> tuple[float, float]:
        """The times until training can continue, and until all files are on disk."""
        blocked = milliseconds(self.save)
        return blocked, blocked + milliseconds(self.run.finish_saving)

    def theirs(self) -> tuple[float, int]:
        """The time until training can continue, and the bytes written."""
        taken = milliseconds(self.save_state)
        num_bytes = size_of(self.their_folder)
        shutil.rmtree(self.their_folder)
        return taken, num_bytes


def milliseconds(*calls: Callable[[], Any]) -> float:
    """The time of the calls, one after another."""
    began = time.perf_counter()
    for call in calls:
        call()
    return 1000 * (time.perf_counter() - began)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
