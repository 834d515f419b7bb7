"""A run's life between steps: its folder and lock, where it goes on from, signals, log lines, checkpoints."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from pipeline.common import console
from pipeline.common.files import write_atomically, write_json
from pipeline.common.stopping import Interrupted, Signals, TrainingFailed
from pipeline.optim.schedule import best_epoch
from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoint_path
from pipeline.run_folder.checkpoint_writer import CheckpointWriter
from pipeline.run_folder.lock import RunLock
from pipeline.run_folder.resume import (
    check_same_settings,
    find_starts,
    fixed_settings,
    nothing_left,
    set_newer_aside,
)
from pipeline.settings.config import Config, to_yaml
from pipeline.training.metrics import COUNT, LOSS
from pipeline.training.state import TrainState, from_checkpoint, to_checkpoint
from pipeline.training.tracking import Tracker

AGREE_EVERY_STEPS = 10  # steps between two agreements of several processes on whether to stop

SMALLEST_SCALE = 2.0**-6  # of fp16's loss; it starts at 65536 and halves with each overflow


class Run:
    """What happens to a run besides training. Rank 0 writes; every rank makes one and calls its methods."""

    def __init__(self, config: Config, accelerator: Accelerator, facts: dict[str, Any]):
        """Takes the folder. Raises ValueError when it is in use, or holds a run that these settings do not continue."""
        self.config, self.accelerator, self.facts = config, accelerator, facts
        self.starts: list[Path] = []
        self.tracker: Tracker | None = None
        self.writer: CheckpointWriter | None = None
        self.last_read = time.perf_counter()
        self.submitted = -1  # the step of the last checkpoint that was handed to the writer
        if accelerator.is_main_process:
            self.lock = RunLock(config.run_dir)
            try:
                self.prepare()
            except BaseException:
                self.lock.release()
                raise
        if accelerator.num_processes > 1:
            self.starts = broadcast_object_list([self.starts])[0]
        self.signals = Signals()

    def prepare(self) -> None:
        """Finds where to go on from and writes the settings. Raises ValueError when these do not continue the run."""
        check_same_settings(self.config)
        self.starts, skipped = find_starts(self.config)
        for sentence in skipped:
            console.warn(sentence)
        self.write_config()

    def write_config(self) -> None:
        kept = dataclasses.replace(self.config, resume="auto", dry_run=False)
        write_atomically(self.config.run_dir / "config.yaml", to_yaml(kept).encode())

    def begin(self, state: TrainState) -> None:
        """Puts the state where the run goes on and opens the trackers there. Raises ValueError when no checkpoint fits."""
        start, facts = self.first_that_fits(state)
        self.submitted = -1 if start is None else state.step
        if self.accelerator.is_main_process:
            if start is not None:
                set_newer_aside(self.config.run_dir, state.step)
                console.say(f"Going on from {start}: epoch {state.epoch + 1}, step {state.step}.")
            self.tracker = Tracker(self.config, self.facts, facts.get("metrics_bytes", 0), facts.get("run_ids"))
            self.writer = CheckpointWriter(self.config.run_dir, self.config.keep_checkpoints, self.prepare_folder)
            self.writer.last_saved = self.submitted
        self.last_read = time.perf_counter()

    def first_that_fits(self, state: TrainState) -> tuple[Path | None, dict[str, Any]]:
        """Loads the newest checkpoint that fits the model; returns it and its facts, None for a new run."""
        for start in self.starts:
            try:
                return start, from_checkpoint(state, start, self.accelerator)
            except BadCheckpoint as error:
                if start == self.starts[-1]:
                    raise ValueError(f"{error} {nothing_left(self.config)}") from error
                if self.accelerator.is_main_process:
                    console.warn(f"Skipped {error}")
        return None, {}

    def prepare_folder(self) -> None:
        """Before a checkpoint: the settings are there and every line told so far is on the disk. Raises OSError."""
        assert self.tracker is not None
        if not (self.config.run_dir / "config.yaml").exists():
            self.write_config()
        self.tracker.lines.sync()

    def read_clock(self, state: TrainState, training: bool = False) -> None:
        """Adds the time since the last reading to the run's seconds, and to those of training if it was."""
        now = time.perf_counter()
        state.seconds += now - self.last_read
        if training:
            state.train_seconds += now - self.last_read
        self.last_read = now

    def progress_bar(self, state: TrainState, num_batches: int) -> Any:
        description = f"epoch {state.epoch + 1}/{self.config.epochs}"
        return console.progress_bar(num_batches, state.batch, description, shown=self.accelerator.is_main_process)

    def after_step(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None, is_last: bool) -> None:
        """Logs, saves and stops when it is time to. norm: the gradient's norm, None when nobody asked for it."""
        if is_last or state.step % self.config.log_every == 0:
            self.log_training(state, lr, batch_size, norm)
        if self.writer is not None:
            self.writer.poll()
        every = self.config.checkpoint_every_steps
        if every is not None and state.step % every == 0 and not is_last:
            self.save(state)
        self.stop_if_asked(state, is_last)

    def log_training(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None) -> None:
        """A training line about the steps since the last one. Raises TrainingFailed when one of their losses was not finite."""
        values, bad_step, grad_norm = fetch(state, norm, self.accelerator)
        self.read_clock(state, training=True)
        self.check_finite(state, bad_step, lr)
        count = values[COUNT] - state.logged[COUNT]
        line: dict[str, Any] = {"lr": lr, "batch_size": batch_size}
        if count:  # none if every step was skipped
            state.last_loss = line["loss"] = (values[LOSS] - state.logged[LOSS]) / count
        line["images_per_second"] = round(state.samples / state.train_seconds, 1)
        if grad_norm is not None:
            line["grad_norm"] = grad_norm
        if self.accelerator.scaler is not None:
            line |= {"scaler_scale": self.accelerator.scaler.get_scale(), "skipped_steps": state.skipped_steps}
            check_scale(line["scaler_scale"], state)
        state.logged = values
        self.log("train", state, state.epoch + 1, line)

    def log(self, split: str, state: TrainState, epoch: int, values: dict[str, Any]) -> None:
        """A line about an epoch, counted from 1."""
        if self.tracker is not None:
            self.tracker.log(split, state.place(epoch), values)

    def check_finite(self, state: TrainState, bad_step: int, lr: float) -> None:
        if bad_step >= 0:
            last = state.last_loss
            before = "there was none before" if last is None else f"the last finite one told was {last:.4g}"
            raise TrainingFailed(
                f"The loss of step {bad_step} in epoch {state.epoch + 1} was not finite, "
                f"near a learning rate of {lr:.3g}; {before}. "
                "Lower --lr, lengthen --warmup_epochs or set --clip_grad_norm 1. The last good checkpoint is kept."
            )

    def save(self, state: TrainState) -> None:
        """Has a checkpoint written from a copy of the state, while training goes on. Every rank calls it."""
        _, bad_step, _ = fetch(state, None, self.accelerator)
        self.read_clock(state)
        self.check_finite(state, bad_step, state.optimizer.param_groups[0]["lr"])
        tensors, facts = to_checkpoint(state, self.accelerator)
        if self.tracker is not None and self.writer is not None:
            facts |= {"metrics_bytes": self.tracker.lines.num_bytes, "run_ids": self.tracker.run_ids}
            facts["settings"] = fixed_settings(self.config)
            best = best_epoch(state.history, self.config)
            self.writer.submit(state.step, tensors, facts, None if best is None else state.history[best]["step"])
        self.submitted = state.step

    def finish_saving(self) -> None:
        """Returns on every rank when all checkpoints are whole. Raises TrainingFailed when the disk does not take one."""
        problem = None
        if self.writer is not None:
            try:
                self.writer.finish()
            except OSError as error:
                problem = (
                    f"The last checkpoint could not be written: {error}. Make room there first. {self.how_to_go_on()}"
                )
        if self.accelerator.num_processes > 1:
            problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise TrainingFailed(problem)

    def best_checkpoint(self, state: TrainState) -> Path | None:
        """The checkpoint of the best epoch so far, None before the first."""
        best = best_epoch(state.history, self.config)
        return None if best is None else checkpoint_path(self.config.run_dir, state.history[best]["step"])

    def stop_if_asked(self, state: TrainState, is_last: bool) -> None:
        """Raises Interrupted on every rank when a signal has come to one of them."""
        number = self.signals.received
        if self.accelerator.num_processes > 1:
            if not is_last and state.step % AGREE_EVERY_STEPS:
                return
            flag = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(flag).max())
        if number:
            raise Interrupted(number)

    def how_to_go_on(self) -> str:
        return f"To go on: python train.py --config {self.config.run_dir / 'config.yaml'}"

    def end(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, after all that it sums up, and closes what is open. Raises OSError."""
        if self.tracker is not None:
            self.tracker.lines.sync()
            write_json(self.config.run_dir / "summary.json", summary)
            self.tracker.close(summary)

    def release(self) -> None:
        """Gives the folder free and signals their usual meaning."""
        if self.accelerator.is_main_process:
            self.lock.release()
        if self.tracker is not None:
            self.tracker.lines.file.close()
        self.signals.release()


def check_scale(scale: float, state: TrainState) -> None:
    """Raises TrainingFailed when fp16's loss scale has collapsed: then hardly any step is applied any more."""
    if scale < SMALLEST_SCALE:
        raise TrainingFailed(
            f"The fp16 loss scale fell to {scale:g} and {state.skipped_steps} steps were skipped: gradients overflow at any "
            "scale. Use --mixed_precision bf16 or no, lower --lr, or set --clip_grad_norm 1. "
            "The last good checkpoint is kept."
        )


def fetch(state: TrainState, norm: Tensor | None, accelerator: Accelerator) -> tuple[list[float], int, float | None]:
    """The epoch's sums over all ranks, the first bad step of any (-1 for none) and rank 0's gradient norm, in one transfer.

    Every rank calls it.
    """
    own = torch.stack(
        [state.bad_step.to(state.sums), state.sums.new_zeros(()) if norm is None else norm.to(state.sums)]
    )
    if accelerator.num_processes > 1:
        rows = accelerator.gather(torch.cat([state.sums, own])).reshape(accelerator.num_processes, -1)
        own = torch.stack([rows[:, -2].max(), rows[0, -1]])
        values = torch.cat([rows[:, :-2].sum(dim=0), own]).tolist()
    else:
        values = torch.cat([state.sums, own]).tolist()
    return values[:-2], int(values[-2]), None if norm is None else values[-1]
