"""Our training as a contender: train_epoch of a run, with its folder and log lines, timed."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.benchmark.stepclock import StepClock, device_name, wait_for
from pipeline.benchmark.waiting import waiting
from pipeline.distributed.accelerator import make_accelerator, system_facts
from pipeline.distributed.fsdp import load_weights
from pipeline.loaders.loader import Batch, Loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.run_folder.checkpoint import checkpoint_path, read_tensors
from pipeline.run_folder.paths import metrics_path
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config
from pipeline.training.build import Parts, assemble, check_settings, load_images
from pipeline.training.evaluation import evaluate
from pipeline.training.loop import train as train_run
from pipeline.training.loop import train_epoch
from pipeline.training.run import Run
from pipeline.training.state import TrainState, begin_state

# override the given settings: the clock ends the run, and it has no external trackers
OWN = ["--epochs=1000", "--resume=never", "--run_name=run", "--log_with=null", "--checkpoint_every_steps=null"]

ALL_REDUCES = 10


class TimeUp(Exception):
    """Raised when the clock has ended."""


class TimedRun(Run):
    """A run that counts its steps on a clock and raises TimeUp when the clock has ended."""

    clock: StepClock

    def after_step(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None, is_last: bool) -> None:
        super().after_step(state, lr, batch_size, norm, is_last)
        if self.clock.step(batch_size):
            raise TimeUp


class WaitTimed:
    """A loader whose training epochs are timed by `waiting`."""

    def __init__(self, loader: AnyLoader, clock: StepClock):
        self.loader, self.clock = loader, clock

    def __len__(self) -> int:
        return len(self.loader)

    def train_epoch(self, epoch: int, batch_size: int, num_batches: int, first_batch: int = 0) -> Iterator[Batch]:
        return waiting(self.loader.train_epoch(epoch, batch_size, num_batches, first_batch), self.clock)


def start(settings: list[str], folder: str) -> tuple[Parts, TimedRun, TrainState]:
    """The parts, run and state before the first step of a run in `folder`. Raises ValueError as a run does."""
    config = read_config([*settings, *OWN, f"--output_dir={folder}"])
    check_settings(config)
    if not torch.cuda.is_available():  # otherwise Accelerate does not connect processes on CPUs
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = make_accelerator(config)
    parts = assemble(config, accelerator)
    load_images(parts, accelerator)
    run = TimedRun(parts.config, accelerator, system_facts(accelerator), {"given": config.dataset})
    state = begin_state(parts.model, parts.optimizer, accelerator, parts.ema)
    run.begin(state)
    return parts, run, state


def train_until_time_is_up(state: TrainState, loader: Any, run: TimedRun) -> None:
    """Trains epoch by epoch, without evaluation and saving between them."""
    try:
        while True:
            train_epoch(state, loader, run)
            state.epoch += 1
            state.batch = 0
            state.sums.zero_()
            state.logged = [0.0] * 4
    except TimeUp:
        return


def set_pin_memory(loader: AnyLoader, pin_memory: bool) -> None:
    """Sets pin_memory of a DataLoader before its first batch. Raises ValueError for a loader without workers."""
    parts = vars(loader.source) if isinstance(loader, Loader) else {}
    found = [value for value in parts.values() if isinstance(value, torch.utils.data.DataLoader)]
    if not found:
        raise ValueError("pin_memory applies to loader workers only. Add --loader workers.")
    for dataloader in found:
        dataloader.pin_memory = pin_memory


def train(
    settings: list[str], folder: str, pin_memory: bool | None = None, with_pieces: bool = False, **clock: Any
) -> dict[str, Any]:
    """Figures of the training steps of a run.

    clock: StepClock's arguments; pin_memory: None keeps the default; with_pieces: whether to measure `pieces` afterwards.
    """
    parts, run, state = start(settings, folder)
    device = run.accelerator.device
    if pin_memory is not None:
        set_pin_memory(parts.loaders["train"], pin_memory)
    run.clock = StepClock(device, **clock)
    try:
        train_until_time_is_up(state, WaitTimed(parts.loaders["train"], run.clock), run)
        figures = {**run.clock.figures(), "loader": parts.loaders["train"].kind}
        return {**figures, **(pieces(parts, run) if with_pieces else {})}
    finally:
        run.release()


def pieces(parts: Parts, run: TimedRun) -> dict[str, Any]:
    """The parts of a data-parallel step besides computation: gradient_bytes, all_reduce_ms, loader_images_per_second.

    all_reduce_ms is None for a single process. loader_images_per_second is for this process's loader alone, over at most one
    epoch.
    """
    accelerator, loader = run.accelerator, parts.loaders["train"]
    gradient_bytes = sum(weight.numel() * weight.element_size() for weight in parts.model.parameters())
    batch_size = parts.config.batch_size or 1
    num_batches = min(len(loader) // batch_size, 20)
    images, began = 0, time.perf_counter()
    for batch, _ in loader.train_epoch(0, batch_size, num_batches):
        images += len(batch)
    wait_for(accelerator.device)
    found = {"gradient_bytes": gradient_bytes, "loader_images_per_second": images / (time.perf_counter() - began)}
    if accelerator.num_processes == 1:
        return {**found, "all_reduce_ms": None}
    gradient = torch.zeros(gradient_bytes // 4, device=accelerator.device)
    for count in range(ALL_REDUCES + 1):
        if count == 1:  # the first one is a warm-up
            wait_for(accelerator.device)
            began = time.perf_counter()
        torch.distributed.all_reduce(gradient)
    wait_for(accelerator.device)
    return {**found, "all_reduce_ms": 1000 * (time.perf_counter() - began) / ALL_REDUCES}


def finetune(settings: list[str], began: float, folder: str) -> dict[str, Any]:
    """A whole run, as train.py does it: test accuracy and seconds since `began` at the end of each epoch in its metrics.

    The run keeps the checkpoint of every epoch, so that the test is not part of the time. The test accuracy of the run is that
    of its best epoch by validation.
    """
    own = [*settings, "--resume=never", "--run_name=run", "--log_with=null", "--keep_checkpoints=1000000"]
    config = read_config([*own, f"--output_dir={folder}"])
    summary = train_run(config)
    before = time.time() - began - summary["seconds"]  # until the run's own clock starts; its last files are a part of it
    lines = [json.loads(line) for line in metrics_path(config.run_dir).read_text().splitlines()]
    validated = [line for line in lines if line["split"] == "val"]
    accelerator = make_accelerator(config)
    accuracies = accuracies_at(config, [line["step"] for line in validated], accelerator)
    epochs = [
        {"epoch": line["epoch"], "seconds": before + line["seconds"], "test_accuracy": accuracy}
        for line, accuracy in zip(validated, accuracies)
    ]
    return {
        "epochs": epochs,
        "test_accuracy": summary["test"]["accuracy"],
        "device": device_name(accelerator.device),
        "threads": torch.get_num_threads(),
    }


def accuracies_at(config: Config, steps: list[int], accelerator: Accelerator) -> list[float]:
    """The test accuracy of the checkpoints of these steps, of the averaged weights if the run has them."""
    parts = assemble(config, accelerator)
    load_images(parts, accelerator)
    model, accuracies = parts.model.to(accelerator.device), []
    for step in steps:
        checkpoint = checkpoint_path(config.run_dir, step)
        load_weights(model, read_tensors(checkpoint, "model" if config.ema_decay is None else "ema"))
        accuracies.append(float(evaluate(model, parts.loaders["test"], accelerator)["accuracy"]))
    return accuracies
