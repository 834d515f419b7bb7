"""A run besides its training steps: folder and lock, resuming, signals, log lines, checkpoints."""

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

AGREE_EVERY_STEPS = 10  # with several processes, steps between two exchanges of received signals

SMALLEST_SCALE = 2.0**-6  # of the fp16 loss; it starts at 65536 and halves at each overflow


class Run:
    """Everything of a run besides the training steps. Every rank creates one and calls its methods; rank 0 writes."""

    def __init__(self, config: Config, accelerator: Accelerator, facts: dict[str, Any]):
        """Locks the folder. Raises ValueError if it is in use, or contains a run that these settings cannot resume."""
        self.config, self.accelerator, self.facts = config, accelerator, facts
        self.starts: list[Path] = []
        self.tracker: Tracker | None = None
        self.writer: CheckpointWriter | None = None
        self.last_read = time.perf_counter()
        self.submitted = -1  # step of the last checkpoint given to the writer; -1 before the first
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
        """Finds checkpoints to resume from and writes config.yaml. Raises ValueError if the settings cannot resume the run."""
        check_same_settings(self.config)
        self.starts, skipped = find_starts(self.config)
        for sentence in skipped:
            console.warn(sentence)
        self.write_config()

    def write_config(self) -> None:
        kept = dataclasses.replace(self.config, resume="auto", dry_run=False)
        write_atomically(self.config.run_dir / "config.yaml", to_yaml(kept).encode())

    def begin(self, state: TrainState) -> None:
        """Loads the checkpoint to resume from and opens the trackers. Raises ValueError if no checkpoint fits the model."""
        start, facts = self.first_that_fits(state)
        self.submitted = -1 if start is None else state.step
        if self.accelerator.is_main_process:
            if start is not None:
                set_newer_aside(self.config.run_dir, state.step)
                console.say(f"Resuming from {start}: epoch {state.epoch + 1}, step {state.step}.")
            self.tracker = Tracker(self.config, self.facts, facts.get("metrics_bytes", 0), facts.get("run_ids"))
            self.writer = CheckpointWriter(self.config.run_dir, self.config.keep_checkpoints, self.prepare_folder)
            self.writer.last_saved = self.submitted
        self.last_read = time.perf_counter()

    def first_that_fits(self, state: TrainState) -> tuple[Path | None, dict[str, Any]]:
        """Loads the newest checkpoint that fits the model; returns it and its facts, or None and no facts for a new run."""
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
        """Called before a checkpoint is written: restores a missing config.yaml and syncs metrics.jsonl. Raises OSError."""
        assert self.tracker is not None
        if not (self.config.run_dir / "config.yaml").exists():
            self.write_config()
        self.tracker.lines.sync()

    def read_clock(self, state: TrainState, training: bool = False) -> None:
        """Adds the time since the last call to state.seconds, and to state.train_seconds if it was spent on training."""
        now = time.perf_counter()
        state.seconds += now - self.last_read
        if training:
            state.train_seconds += now - self.last_read
        self.last_read = now

    def progress_bar(self, state: TrainState, num_batches: int) -> Any:
        description = f"epoch {state.epoch + 1}/{self.config.epochs}"
        return console.progress_bar(num_batches, state.batch, description, shown=self.accelerator.is_main_process)

    def after_step(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None, is_last: bool) -> None:
        """Logs, saves and stops if due. norm: the gradient's norm, None if clip_grad_norm is null."""
        if is_last or state.step % self.config.log_every == 0:
            self.log_training(state, lr, batch_size, norm)
        if self.writer is not None:
            self.writer.poll()
        every = self.config.checkpoint_every_steps
        if every is not None and state.step % every == 0 and not is_last:
            self.save(state)
        self.stop_if_asked(state, is_last)

    def log_training(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None) -> None:
        """Logs a line about the steps since the last line. Raises TrainingFailed if one of their losses was not finite."""
        values, bad_step, grad_norm = fetch(state, norm, self.accelerator)
        self.read_clock(state, training=True)
        self.check_finite(state, bad_step, lr)
        count = values[COUNT] - state.logged[COUNT]
        line: dict[str, Any] = {"lr": lr, "batch_size": batch_size}
        if count:  # 0 if every step was skipped
            state.last_loss = line["loss"] = (values[LOSS] - state.logged[LOSS]) / count
        line["images_per_second"] = round(state.samples / state.train_seconds, 1)
        if grad_norm is not None:
            line["grad_norm"] = grad_norm
        if self.accelerator.scaler is not None:
            line |= {"scaler_scale": self.accelerator.scaler.get_scale(), "skipped_steps": state.skipped_steps}
            check_scale(line["scaler_scale"], state.skipped_steps, self.new_run())
        state.logged = values
        self.log("train", state, state.epoch + 1, line)

    def log(self, split: str, state: TrainState, epoch: int, values: dict[str, Any]) -> None:
        """Logs a line on rank 0. epoch: the epoch of the line, counted from 1."""
        if self.tracker is not None:
            self.tracker.log(split, state.place(epoch), values)

    def check_finite(self, state: TrainState, bad_step: int, lr: float) -> None:
        """Raises TrainingFailed if a step has had a loss that was not finite."""
        if bad_step >= 0:
            last = state.last_loss
            before = "no loss was logged before" if last is None else f"the last logged loss was {last:.4g}"
            raise TrainingFailed(
                f"The loss of step {bad_step} in epoch {state.epoch + 1} was not finite, "
                f"near a learning rate of {lr:.3g}; {before}. "
                f"Lower --lr, lengthen --warmup_epochs or set --clip_grad_norm 1; this requires {self.new_run()}."
            )

    def save(self, state: TrainState) -> None:
        """Copies the state into a checkpoint that the writer saves while training continues. Every rank must call it."""
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
        """Waits on every rank until all checkpoints are complete. Raises TrainingFailed if one cannot be written."""
        problem = None
        if self.writer is not None:
            try:
                self.writer.finish()
            except OSError as error:
                problem = (
                    f"The last checkpoint could not be written: {error}. Make room there first. {self.resume_command()}"
                )
        if self.accelerator.num_processes > 1:
            problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise TrainingFailed(problem)

    def best_checkpoint(self, state: TrainState) -> Path | None:
        """The checkpoint of the best epoch so far; None before the first epoch has ended."""
        best = best_epoch(state.history, self.config)
        return None if best is None else checkpoint_path(self.config.run_dir, state.history[best]["step"])

    def stop_if_asked(self, state: TrainState, is_last: bool) -> None:
        """Raises Interrupted on every rank if one of them has received a signal."""
        number = self.signals.received
        if self.accelerator.num_processes > 1:
            if not is_last and state.step % AGREE_EVERY_STEPS:
                return
            flag = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(flag).max())
        if number:
            raise Interrupted(number)

    def resume_command(self) -> str:
        return f"To resume: python train.py --config {self.config.run_dir / 'config.yaml'}"

    def new_run(self, start: Path | None = None) -> str:
        """Names a new run, for settings that may not change in this one, from `start` or the last checkpoint."""
        if start is None and self.submitted >= 0:
            start = checkpoint_path(self.config.run_dir, self.submitted)
        return "a new run, with another --run_name" + ("" if start is None else f" and --init_from {start}")

    def end(self, summary: dict[str, Any]) -> None:
        """Syncs metrics.jsonl, then writes summary.json and closes the trackers. Raises OSError."""
        if self.tracker is not None:
            self.tracker.lines.sync()
            write_json(self.config.run_dir / "summary.json", summary)
            self.tracker.close(summary)

    def release(self) -> None:
        """Releases the lock and restores the earlier signal handlers."""
        if self.accelerator.is_main_process:
            self.lock.release()
        if self.tracker is not None:
            self.tracker.lines.file.close()
        self.signals.release()


def check_scale(scale: float, skipped_steps: int, new_run: str) -> None:
    """Raises TrainingFailed if the fp16 loss scale has collapsed, because hardly any step is applied then.

    new_run: the text of Run.new_run.
    """
    if scale < SMALLEST_SCALE:
        raise TrainingFailed(
            f"The fp16 loss scale fell to {scale:g} and {skipped_steps} steps were skipped: gradients overflow at any "
            f"scale. Use --mixed_precision bf16 or no, lower --lr, or set --clip_grad_norm 1; this requires {new_run}."
        )


def fetch(state: TrainState, norm: Tensor | None, accelerator: Accelerator) -> tuple[list[float], int, float | None]:
    """The epoch's sums over all ranks, the largest bad_step of them (-1 for none) and rank 0's gradient norm, in one transfer.

    Every rank must call it.
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
