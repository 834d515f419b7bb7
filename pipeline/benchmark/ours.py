"""Our own training as a contender: the very train_epoch of a run, in its folder, with its log lines; only timed."""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmark.stepclock import StepClock, wait_for
from pipeline.distributed.accelerator import make_accelerator, system_facts
from pipeline.loaders.loader import Batch, Loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.run_folder.paths import name_run
from pipeline.settings.parser import read_config
from pipeline.training.build import Parts, assemble, check_settings, load_images
from pipeline.training.loop import train_epoch
from pipeline.training.metrics import zero_sums
from pipeline.training.run import Run
from pipeline.training.state import TrainState

# whatever file of settings is given: the time decides when it ends, and nobody is told of it
OWN = ["--epochs=1000", "--resume=never", "--run_name=run", "--log_with=null", "--checkpoint_every_steps=null"]

ALL_REDUCES = 10


class TimeUp(Exception):
    """The clock has seen enough steps."""


class TimedRun(Run):
    """A run that tells a clock of each step, and raises TimeUp when its time is up."""

    clock: StepClock

    def after_step(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None, is_last: bool) -> None:
        super().after_step(state, lr, batch_size, norm, is_last)
        if self.clock.step(batch_size):
            raise TimeUp


class WaitTimed:
    """A loader's training epochs; the clock is told for how long each next batch was waited."""

    def __init__(self, loader: AnyLoader, clock: StepClock):
        self.loader, self.clock = loader, clock

    def __len__(self) -> int:
        return len(self.loader)

    def train_epoch(self, epoch: int, batch_size: int, num_batches: int, first_batch: int = 0) -> Iterator[Batch]:
        batches = iter(self.loader.train_epoch(epoch, batch_size, num_batches, first_batch))
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if self.clock.is_running:
                self.clock.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def start(settings: list[str], folder: str) -> tuple[Parts, TimedRun, TrainState]:
    """All that a run has before its first step, in `folder`. Raises ValueError as a run would."""
    config = read_config([*settings, *OWN, f"--output_dir={folder}"])
    check_settings(config)
    if not torch.cuda.is_available():  # without it Accelerate leaves processes on CPUs to themselves
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = make_accelerator(config)
    config = name_run(config, accelerator)
    parts = assemble(config, accelerator)
    load_images(parts, accelerator)
    run = TimedRun(parts.config, accelerator, system_facts(accelerator))
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    bad_step = torch.tensor(-1, device=accelerator.device)
    state = TrainState(model, optimizer, zero_sums(accelerator.device), bad_step, parts.ema)
    run.begin(state)
    return parts, run, state


def train_until_time_is_up(state: TrainState, loader: Any, run: TimedRun) -> None:
    """Epoch after epoch, without what happens between them: evaluation and saving."""
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
    """Before the first batch; raises ValueError for a loader that has no workers' DataLoader."""
    parts = vars(loader.source) if isinstance(loader, Loader) else {}
    found = [value for value in parts.values() if isinstance(value, torch.utils.data.DataLoader)]
    if not found:
        raise ValueError("pin_memory is a matter of loader workers. Add --loader workers.")
    for dataloader in found:
        dataloader.pin_memory = pin_memory


def train(
    settings: list[str], folder: str, pin_memory: bool | None = None, with_pieces: bool = False, **clock: Any
) -> dict[str, Any]:
    """Figures of training steps as a run takes them.

    clock: StepClock's arguments; pin_memory: None leaves our choice; with_pieces: whether to measure `pieces` afterwards.
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
    """What a data-parallel step is made of besides computing: gradient_bytes, all_reduce_ms, loader_images_per_second.

    The first are of one step and None for a single process; the last is this process's loader alone, over one epoch at most.
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
        if count == 1:  # the first one warms up
            wait_for(accelerator.device)
            began = time.perf_counter()
        torch.distributed.all_reduce(gradient)
    wait_for(accelerator.device)
    return {**found, "all_reduce_ms": 1000 * (time.perf_counter() - began) / ALL_REDUCES}
