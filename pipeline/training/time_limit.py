"""The number of epochs that fit into time_limit, from steps that are measured before the first one and then undone.

The learning rate of every step depends on the number of epochs, so the number is fixed before the first step. The run measures
itself, not a copy: what is compiled or started is used afterwards. Weights, optimizer and counters are restored bit for bit.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter

import torch
from accelerate import Accelerator

from pipeline.common import console
from pipeline.distributed.accelerator import largest
from pipeline.distributed.fsdp import local
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.optim.optimizers import lr_of_step, set_lr
from pipeline.run_folder.checkpoint_writer import CheckpointWriter
from pipeline.run_folder.resume import has_begun
from pipeline.settings.batch_size import batch_size_at, steps_per_epoch
from pipeline.settings.checks import shortened
from pipeline.settings.config import Config
from pipeline.training.build import Parts
from pipeline.training.evaluation import evaluate
from pipeline.training.run import Run
from pipeline.training.state import COUNTED, RECORDED, TrainState, average_buffers, to_facts, to_tensors
from pipeline.training.step import Share, to_training_mode, train_step

STEPS_SHARE = 0.02  # of time_limit, for the steps that are timed
REPEATED_SHARE = 0.01  # of time_limit; a shorter validation is measured a second time, without what only the first one does
MOST_STEPS = 200

Kind = tuple[bool, int]  # of a step: whether the backbone is frozen, and the global batch size


@dataclasses.dataclass(frozen=True)
class Rates:
    """The seconds that the parts of a run take, of the slowest process.

    steps: one step, by kind; epoch_start: the start of an epoch besides its steps; copy: a checkpoint within an epoch;
    epoch_end: a checkpoint and the validation; finish: the test, and the files that are read and written at the end.
    """

    steps: Mapping[Kind, float]
    epoch_start: float
    copy: float
    epoch_end: float
    finish: float


def choose_epochs(state: TrainState, parts: Parts, run: Run, started: float) -> None:
    """Sets the epochs of a new run with time_limit, and writes them to config.yaml. Every rank must call it.

    started: time.perf_counter() at the start of the time limit. The state is unchanged, also after an exception.
    """
    config, accelerator, limit = run.config, run.accelerator, run.config.time_limit_seconds
    if limit is None or config.epochs == 0 or has_begun(config):
        return
    with restored(state, accelerator):
        rates = measured(state, parts, run, limit)
    elapsed = slowest(accelerator, perf_counter() - started)
    epochs, seconds = epochs_that_fit(limit - elapsed, rates, config, len(parts.loaders["train"]))
    run.config = dataclasses.replace(config, epochs=epochs)
    if accelerator.is_main_process:
        run.write_config()
        report(run.config, rates, elapsed + seconds)


def report(config: Config, rates: Rates, end: float) -> None:
    """Prints the choice. end: the expected duration of the run, in seconds."""
    limit = config.time_limit_seconds or 0.0
    step = max(rates.steps.values())
    console.say(
        f"time limit  {console.duration(limit)}: {console.plural(config.num_epochs, 'epoch')}, expected to end after "
        f"{console.duration(end)} ({step:.3g} s per step, {rates.epoch_end:.3g} s per validation and checkpoint)"
    )
    if end > limit:
        console.warn(
            f"time_limit {config.time_limit} is too short for one epoch. The run trains one, and ends after about "
            f"{console.duration(end)}."
        )
    for sentence in shortened(config):
        console.warn(sentence)


def epochs_that_fit(seconds: float, rates: Rates, config: Config, num_samples: int) -> tuple[int, float]:
    """The number of epochs that fit into these seconds, at least 1 and at most config.epochs, and the seconds that they need."""
    total, epochs = rates.finish + (rates.epoch_end if config.has_given_weights else 0.0), 0
    alike = max(1, config.freeze_epochs, *config.batch_size_schedule)  # from this epoch on all take the same time
    while config.epochs is None or epochs < config.epochs:
        longer = epoch_seconds(epochs, rates, config, num_samples)
        if epochs > 0 and total + longer > seconds:
            break
        number = max(int((seconds - total) / longer), 1) if epochs >= alike else 1
        number = number if config.epochs is None else min(number, config.epochs - epochs)
        total, epochs = total + number * longer, epochs + number
    return epochs, total


def epoch_seconds(epoch: int, rates: Rates, config: Config, num_samples: int) -> float:
    num_steps = steps_per_epoch(num_samples, batch_size_at(epoch, config), config.drop_last)
    num_copies = 0 if config.checkpoint_every_steps is None else num_steps // config.checkpoint_every_steps
    training = num_steps * rates.steps[kind_of(epoch, config)] + num_copies * rates.copy
    return rates.epoch_start + training + rates.epoch_end


def kind_of(epoch: int, config: Config) -> Kind:
    return epoch < config.freeze_epochs, batch_size_at(epoch, config)


def kinds(config: Config) -> list[Kind]:
    """The kinds of steps of the run, in their order."""
    starts = sorted({0, config.freeze_epochs, *config.batch_size_schedule})
    return list(dict.fromkeys(kind_of(epoch, config) for epoch in starts if config.epochs is None or epoch < config.epochs))


def measured(state: TrainState, parts: Parts, run: Run, limit: float) -> Rates:
    """Measures the parts of the run. It changes the state. Every rank must call it."""
    of_run = kinds(run.config)
    seconds = {kind: step_seconds(state, kind, parts.loaders["train"], run, STEPS_SHARE * limit / len(of_run)) for kind in of_run}
    copy, write, validation, epoch_end = epoch_end_seconds(state, parts, run, limit)
    test = validation * len(parts.loaders["test"]) / len(parts.loaders["val"])
    return Rates(
        steps={kind: step for kind, (step, _) in seconds.items()},
        epoch_start=max(start for _, start in seconds.values()),
        copy=copy,
        epoch_end=epoch_end,
        finish=test + write,
    )


def step_seconds(state: TrainState, kind: Kind, loader: AnyLoader, run: Run, budget: float) -> tuple[float, float]:
    """The seconds of a step, and those of the start of an epoch besides. budget: the seconds for the timed steps, at least 2.

    Of short epochs whole ones are timed, so that the seconds of a step include its part of their starts.
    """
    accelerator, sam_every = run.accelerator, run.config.sam_every
    num_batches = steps_per_epoch(len(loader), kind[1], run.config.drop_last)

    def timed_steps(steps: Iterator[None], number: int) -> float:
        return timed(lambda: [next(steps) for _ in range(number)], accelerator)

    steps = training_steps(state, kind, loader, run)
    timed_steps(steps, 1)  # compiles the model and starts the workers
    pilot = timed_steps(steps, 1)
    number = math.ceil(max(min(int(budget / pilot), MOST_STEPS), 2) / sam_every) * sam_every
    ahead = min(loader.batches_ahead, number)
    if 2 + ahead + number > num_batches:
        number = math.ceil(number / num_batches) * num_batches
        return timed_steps(steps, number) / number, 0.0
    steps = training_steps(state, kind, loader, run)
    opening = timed_steps(steps, 2)
    timed_steps(steps, ahead)  # the workers have prepared these meanwhile
    seconds = timed_steps(steps, number) / number
    return seconds, max(opening - 2 * seconds, 0.0)


def training_steps(state: TrainState, kind: Kind, loader: AnyLoader, run: Run) -> Iterator[None]:
    """Makes a training step at each `next`, without end. Raises Interrupted after a signal."""
    config, (is_frozen, batch_size) = run.config, kind
    num_batches = steps_per_epoch(len(loader), batch_size, config.drop_last)
    to_training_mode(state, config, is_frozen)
    for epoch in itertools.count():
        for batch, (images, labels) in enumerate(loader.train_epoch(epoch, batch_size, num_batches)):
            set_lr(state.optimizer, lr_of_step(0, batch, num_batches, [], config))
            count = min(batch_size, len(loader) - batch * batch_size)
            train_step(state, Share(images, labels, count, epochs=count / len(loader)), config, run.accelerator)
            run.stop_if_asked(state, is_last=False)
            yield


def epoch_end_seconds(state: TrainState, parts: Parts, run: Run, limit: float) -> tuple[float, float, float, float]:
    """The seconds of the copy of a checkpoint, of writing it, of the validation, and of all that an epoch ends with."""
    accelerator, scratch = run.accelerator, run.config.run_dir / ".time_limit"

    def validate() -> None:
        for model in state.models:
            evaluate(model, parts.loaders["val"], accelerator, signals=run.signals, loss=run.config.loss)

    def submit() -> None:
        average_buffers(state, accelerator)
        tensors, facts = to_tensors(state, accelerator), to_facts(state, accelerator)
        if writer is not None:
            writer.submit(state.step, tensors, facts, best=None, is_pending=True)

    def complete() -> None:
        if writer is not None:
            writer.complete({}, best=None)

    def end_epoch() -> None:
        submit()
        validate()
        complete()

    def join() -> None:
        if writer is not None:
            writer.join()

    writer = CheckpointWriter(scratch, 1, lambda: None) if accelerator.is_main_process else None
    try:
        if writer is not None:
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
            scratch.mkdir()
        validation = timed(validate, accelerator)
        copy, write = timed(submit, accelerator), timed(join, accelerator)
        if validation >= REPEATED_SHARE * limit and not run.config.compile:
            return copy, write, validation, copy + validation + write
        validation = timed(validate, accelerator)
        epoch_end = timed(end_epoch, accelerator)
        join()
        return copy, write, validation, epoch_end
    finally:
        join()
        if writer is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def timed(work: Callable[[], object], accelerator: Accelerator) -> float:
    """The seconds that `work` takes on the slowest rank and its device. Every rank must call it."""
    start = perf_counter()
    work()
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).synchronize()
    return slowest(accelerator, perf_counter() - start)


def slowest(accelerator: Accelerator, seconds: float) -> float:
    """The largest number of seconds of any rank, the same on every rank. Every rank must call it."""
    (nanoseconds,) = largest(accelerator, int(seconds * 1e9))
    return nanoseconds / 1e9


@contextlib.contextmanager
def restored(state: TrainState, accelerator: Accelerator) -> Iterator[None]:
    """Restores the state of a run before its first step on exit, bit for bit, also after an exception."""
    tensors = [local(tensor) for model in state.models for tensor in (*model.parameters(), *model.buffers())] + [state.sums]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    optimizer, scaler = state.optimizer.optimizer, accelerator.scaler
    options = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    moments = {parameter: copy.deepcopy(own) for parameter, own in optimizer.state.items()}  # some exist before the first step
    facts = copy.deepcopy({name: getattr(state, name) for name in (*COUNTED, *RECORDED)}) | {"bad_step": state.bad_step}
    scale, generator = None if scaler is None else scaler.state_dict(), torch.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
        optimizer.zero_grad()
        optimizer.state.clear()
        optimizer.state.update(moments)
        for group, own in zip(optimizer.param_groups, options):
            for name in group.keys() - own.keys() - {"params"}:  # of optimizers that count their steps in the group
                del group[name]
            group.update(own)
        for name, value in facts.items():
            setattr(state, name, value)
        if scaler is not None:
            scaler.load_state_dict(scale)
        torch.set_rng_state(generator)
