"""A run besides its training steps: folder and lock, resuming, signals, log lines, checkpoints."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from pipeline.common import console
from pipeline.common.files import write_atomically, write_json
from pipeline.common.stopping import Interrupted, Signals, TrainingFailed
from pipeline.distributed.accelerator import largest, launch_facts
from pipeline.distributed.fsdp import local
from pipeline.optim.schedule import best_epoch
from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoint_path, recorded_dataset
from pipeline.run_folder.checkpoint_writer import CheckpointWriter
from pipeline.run_folder.dataset_record import check_same_images, write_record
from pipeline.run_folder.lock import FolderLock, check_shared
from pipeline.run_folder.resume import (
    check_same_settings,
    find_starts,
    fixed_settings,
    nothing_left,
    set_newer_aside,
)
from pipeline.settings.config import Config, to_yaml
from pipeline.training.metrics import COUNT, LOSS
from pipeline.training.state import TrainState, are_finite, average_buffers, from_checkpoint, to_facts, to_tensors
from pipeline.training.tracking import Tracker

AGREE_EVERY_STEPS = 10  # with several processes, steps between two exchanges of received signals

LOWER_RATE = "Lower --lr, lengthen --warmup_epochs or set --clip_grad_norm 1"

SMALLEST_SCALE = 2.0**-6  # of the fp16 loss; it starts at 65536 and halves at each overflow


class Run:
    """Everything of a run besides the training steps. Every rank creates one and calls its methods; rank 0 writes."""

    def __init__(self, config: Config, accelerator: Accelerator, facts: dict[str, Any], dataset: dict[str, Any]):
        """Locks the folder. dataset: the record of the dataset for dataset.json, on rank 0.

        Raises ValueError if the folder is in use, or contains a run that these settings or this dataset cannot resume.
        """
        self.config, self.accelerator, self.facts, self.dataset = config, accelerator, facts, dataset
        self.starts: list[Path] = []
        self.tracker: Tracker | None = None
        self.writer: CheckpointWriter | None = None
        self.last_read = time.perf_counter()
        self.submitted = -1  # step of the last checkpoint given to the writer; -1 before the first
        self.pending = -1  # the same during the validation of its epoch, else -1
        if accelerator.is_main_process:
            self.lock = FolderLock(config.run_dir)
            try:
                self.prepare()
            except BaseException:
                self.lock.release()
                raise
        if accelerator.num_processes > 1:
            self.starts = broadcast_object_list([self.starts])[0]
            check_shared(config.run_dir, accelerator)
        self.signals = Signals()

    def prepare(self) -> None:
        """Finds checkpoints to resume from and writes config.yaml. Raises ValueError if the settings cannot resume the run."""
        check_same_settings(self.config)
        self.starts, skipped = find_starts(self.config)
        for sentence in skipped:
            console.warn(sentence)
        self.check_dataset()
        self.write_config()

    def check_dataset(self) -> None:
        """Raises ValueError if the images differ from those that the checkpoint was trained on."""
        if not self.starts:
            return
        recorded = recorded_dataset(self.starts[0])
        if recorded is None:
            console.warn(
                f"{self.starts[0]} was written by an earlier version and does not record its dataset: whether "
                f"{self.config.dataset} has the same images is not verified."
            )
            return
        check_same_images(recorded, self.dataset, self.config.run_dir)
        if recorded["path"] == self.dataset["path"]:
            self.dataset["given"] = recorded["given"]

    def write_config(self) -> None:
        kept = dataclasses.replace(self.config, resume="auto", dry_run=False)
        given = self.dataset["given"]
        comment = "" if given == kept.dataset else f"# dataset as passed on the command line or in a file: {given!r}\n"
        write_atomically(self.config.run_dir / "config.yaml", (comment + to_yaml(kept)).encode())
        write_record(self.config.run_dir, self.dataset)

    def begin(self, state: TrainState) -> None:
        """Loads the checkpoint to resume from and opens the trackers. Raises ValueError if no checkpoint fits the model."""
        start, facts = self.first_that_fits(state)
        self.submitted = -1 if start is None else state.step
        if self.accelerator.is_main_process:
            if start is not None:
                set_newer_aside(self.config.run_dir, state.step)
                console.say(f"Resuming from {start}: epoch {state.epoch + 1}, step {state.step}.")
                self.check_launch(facts.get("launch", {}))
            metrics_bytes, run_ids = facts.get("metrics_bytes", 0), facts.get("run_ids")
            self.tracker = Tracker(self.config, self.facts, state.step, metrics_bytes, run_ids)
            self.writer = CheckpointWriter(self.config.run_dir, self.config.keep_checkpoints, self.prepare_folder)
            self.writer.last_saved = self.submitted
        self.last_read = time.perf_counter()

    def check_launch(self, recorded: dict[str, Any]) -> None:
        """Warns if the kind of device or the sharding has changed since the checkpoint, which are not settings."""
        now = launch_facts(self.accelerator)
        changed = [f"{name} {recorded[name]} -> {value}" for name, value in now.items() if recorded.get(name, value) != value]
        if changed:
            console.warn(f"The run resumes with {', '.join(changed)}: its results may differ by rounding.")

    def first_that_fits(self, state: TrainState) -> tuple[Path | None, dict[str, Any]]:
        """Loads the newest checkpoint that fits; returns it and its facts, None for a new run. Raises ValueError if none fits."""
        for start in self.starts:
            facts, problem = {}, None
            try:
                facts = from_checkpoint(state, start, self.accelerator)
            except BadCheckpoint as error:
                problem = str(error)
            if self.accelerator.num_processes > 1:  # one rank alone may fail to read it, and all must start at one step
                problem = next(filter(None, gather_object([problem])), None)
            if problem is None:
                return start, facts
            if start == self.starts[-1]:
                raise ValueError(f"{problem} {nothing_left(self.config)}")
            if self.accelerator.is_main_process:
                console.warn(f"Skipped {problem}")
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
        description = f"epoch {state.epoch + 1}/{self.config.num_epochs}"
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
                f"{LOWER_RATE}; this requires {self.new_run()}."
            )

    def save(self, state: TrainState, is_pending: bool = False) -> None:
        """Copies the state into a checkpoint that the writer saves while training continues. Every rank must call it.

        is_pending: the epoch is trained and not yet validated. Raises TrainingFailed for a state that could not be resumed.
        """
        _, bad_step, _ = fetch(state, None, self.accelerator)
        self.read_clock(state)
        self.check_finite(state, bad_step, state.optimizer.param_groups[0]["lr"])
        self.check_weights(state)
        average_buffers(state, self.accelerator)
        tensors = to_tensors(state, self.accelerator)
        facts = to_facts(state, self.accelerator)
        if self.writer is not None:
            self.writer.submit(state.step, tensors, facts | self.facts_of_run(), self.best_step(state), is_pending)
        self.submitted, self.pending = state.step, state.step if is_pending else -1

    def save_figures(self, state: TrainState) -> None:
        """Completes the pending checkpoint with the figures of its epoch; without one, saves all. Every rank must call it."""
        if self.pending != state.step:
            self.save(state)
            return
        self.read_clock(state)
        facts = to_facts(state, self.accelerator)
        if self.writer is not None:
            self.writer.complete(facts | self.facts_of_run(), self.best_step(state))
        self.pending = -1

    def facts_of_run(self) -> dict[str, Any]:
        """What a checkpoint contains besides the state. Called on rank 0 only."""
        assert self.tracker is not None
        return {
            "metrics_bytes": self.tracker.lines.num_bytes,
            "run_ids": self.tracker.run_ids,
            "settings": fixed_settings(self.config),
            "launch": launch_facts(self.accelerator),
            "dataset": self.dataset,
        }

    def best_step(self, state: TrainState) -> int | None:
        best = best_epoch(state.history, self.config)
        return None if best is None else int(state.history[best]["step"])

    def check_weights(self, state: TrainState) -> None:
        """Raises TrainingFailed if a weight or a running statistic is not finite: every later loss would be NaN."""
        tensors = [local(tensor) for tensor in state.bare_model.state_dict().values() if tensor.is_floating_point()]
        if any(largest(self.accelerator, int(not are_finite(tensors)))):
            raise TrainingFailed(
                f"The model's weights are not finite after step {state.step - 1} in epoch {state.epoch + 1}, although its loss "
                f"was. {LOWER_RATE}; this requires {self.new_run()}."
            )

    def check_validation(self, state: TrainState, loss: float) -> None:
        """Deletes the checkpoint of the epoch and raises TrainingFailed if the validation loss of the weights is not finite.

        Not under fp16: there the evaluation alone may overflow, and the scaler skips training steps that do.
        """
        if math.isfinite(loss) or self.accelerator.scaler is not None:
            return
        if self.writer is not None:
            self.writer.discard(state.step)
            self.submitted = self.writer.last_saved
        raise TrainingFailed(
            f"The validation loss of epoch {state.epoch + 1} is not finite. {LOWER_RATE}; this requires {self.new_run()}."
        )

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
        step = self.best_step(state)
        return None if step is None else checkpoint_path(self.config.run_dir, step)

    def stop_if_asked(self, state: TrainState, is_last: bool) -> None:
        """Raises Interrupted on every rank if one of them has received a signal."""
        if self.accelerator.num_processes > 1 and not is_last and state.step % AGREE_EVERY_STEPS:
            return
        (number,) = largest(self.accelerator, self.signals.received)
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
