"""A run's life between steps: its folder and lock, where it goes on from, signals, log lines, checkpoints."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from pipeline import console
from pipeline.checkpoint import (
    checkpoint_path,
    checkpoints,
    lock_run,
    newest_checkpoint,
    prune,
    read_facts,
    save_checkpoint,
    write_atomically,
    write_json,
)
from pipeline.config import FIELDS, Config, to_yaml
from pipeline.metrics import COUNT, LOSS
from pipeline.parsing import from_yaml
from pipeline.schedule import best_epoch
from pipeline.state import TrainState, from_checkpoint, to_checkpoint
from pipeline.tracking import Tracker

AGREE_EVERY_STEPS = 10  # steps between two agreements of several processes on whether to stop

SMALLEST_SCALE = 2.0**-6  # of fp16's loss; it starts at 65536 and halves with each overflow

# Settings that a run may change when it goes on: they move no figure by more than rounding.
FREE_SETTINGS = {
    "checkpoint_every_steps", "dry_run", "keep_checkpoints", "loader", "log_every", "log_with",
    "micro_batch_size", "num_workers", "output_dir", "project", "resume", "run_name",
}  # fmt: skip


class TrainingFailed(RuntimeError):
    """Training cannot go on; what was saved is whole."""


class Interrupted(Exception):
    """Somebody asked the run to stop; every rank raises it after the same step."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Signals:
    """Remembers SIGINT and SIGTERM until the loop asks; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self.earlier = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def release(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


def ended_summary(config: Config) -> dict[str, Any] | None:
    """The summary of the run if it would go on and has ended by itself, else None.

    Raises ValueError when it was begun with other settings.
    """
    path = config.run_dir / "summary.json"
    if config.resume != "auto" or config.dry_run or not path.is_file():
        return None
    check_same_settings(config)
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary if summary["status"] in ("completed", "early_stopped") else None


def check_same_settings(config: Config) -> None:
    """Raises ValueError when the run was begun with other settings than these, apart from FREE_SETTINGS."""
    path = config.run_dir / "config.yaml"
    if not path.is_file():
        return
    begun = from_yaml(path)
    free = FREE_SETTINGS | ({"batch_size"} if config.batch_size is None else set())  # null is filled in alike
    changed = [name for name in FIELDS if name not in free and getattr(begun, name) != getattr(config, name)]
    if changed:
        words = ", ".join(f"{name} {getattr(begun, name)} -> {getattr(config, name)}" for name in changed)
        raise ValueError(
            f"{config.run_dir} was begun with other settings: {words}. "
            f"Leave them as they were, choose another run_name, or start from its weights with --init_from {config.run_dir}."
        )


def find_start(config: Config) -> Path | None:
    """The checkpoint that the run goes on from, None for a new run. Raises ValueError when it must not or cannot."""
    if config.resume not in ("auto", "never"):
        given = Path(config.resume)
        read_facts(given)
        if given.resolve().parent.parent != config.run_dir.resolve():
            raise ValueError(
                f"resume {given} belongs to another run than {config.run_dir}. Give its --output_dir and --run_name too, "
                f"or start anew from its weights with --init_from {given / 'model.safetensors'}."
            )
        return given
    if config.resume == "never":
        if (config.run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"{config.run_dir} holds a run already and resume is never. Choose another run_name, or --resume auto."
            )
        return None
    folder, passed_over = newest_checkpoint(config.run_dir)
    for sentence in passed_over:
        console.warn(sentence)
    if folder is None and passed_over:
        raise ValueError(
            f"{config.run_dir} has no whole checkpoint left. Delete the folder to begin anew, or choose another run_name."
        )
    return folder


class Run:
    """What happens to a run besides training. Rank 0 writes; every rank makes one and calls its methods."""

    def __init__(self, config: Config, accelerator: Accelerator, facts: dict[str, Any]):
        """Takes the folder. Raises ValueError when it is in use, or holds a run that these settings do not continue."""
        self.config, self.accelerator, self.facts = config, accelerator, facts
        self.start: Path | None = None
        self.tracker: Tracker | None = None
        self.last_read = time.perf_counter()
        self.last_saved = -1
        if accelerator.is_main_process:
            self.lock = lock_run(config.run_dir)
            check_same_settings(config)
            self.start = find_start(config)
            kept = dataclasses.replace(config, resume="auto", dry_run=False)
            write_atomically(config.run_dir / "config.yaml", to_yaml(kept).encode())
        if accelerator.num_processes > 1:
            self.start = broadcast_object_list([self.start])[0]
        self.signals = Signals()

    def begin(self, state: TrainState) -> None:
        """Puts the state where the run goes on and opens the trackers there."""
        facts: dict[str, Any] = {}
        if self.start is not None:
            facts = from_checkpoint(state, self.start, self.accelerator)
            self.last_saved = state.step
        if self.accelerator.is_main_process:
            if self.start is not None:
                for newer in checkpoints(self.config.run_dir):
                    if int(newer.name[5:]) > state.step:
                        aside = newer.with_name(f"passed-over-{newer.name}")
                        shutil.rmtree(aside, ignore_errors=True)
                        newer.rename(aside)
                print(f"Going on from {self.start}: epoch {state.epoch + 1}, step {state.step}.", flush=True)
            self.tracker = Tracker(self.config, self.facts, facts.get("metrics_bytes", 0), facts.get("run_ids"))
        self.last_read = time.perf_counter()

    def read_clock(self, state: TrainState, training: bool = False) -> None:
        """Adds the time since the last reading to the run's seconds, and to those of training if it was."""
        now = time.perf_counter()
        state.seconds += now - self.last_read
        if training:
            state.train_seconds += now - self.last_read
        self.last_read = now

    def progress_bar(self, state: TrainState, num_batches: int) -> Any:
        description = f"epoch {state.epoch + 1}/{self.config.epochs}"
        return console.progress_bar(num_batches, state.batch, description, shown=self.accelerator.is_local_main_process)

    def after_step(self, state: TrainState, lr: float, batch_size: int, norm: Tensor | None, is_last: bool) -> None:
        """Logs, saves and stops when it is time to. norm: the gradient's norm, None when nobody asked for it."""
        if is_last or state.step % self.config.log_every == 0:
            self.log_training(state, lr, batch_size, norm)
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
        """Writes a checkpoint, then prunes. Every rank calls it."""
        _, bad_step, _ = fetch(state, None, self.accelerator)
        self.read_clock(state)
        self.check_finite(state, bad_step, state.optimizer.param_groups[0]["lr"])
        tensors, facts = to_checkpoint(state, self.accelerator)
        if self.tracker is not None:
            facts |= {"metrics_bytes": self.tracker.num_bytes(), "run_ids": self.tracker.run_ids}
            save_checkpoint(self.config.run_dir, state.step, tensors, facts)
            prune(self.config.run_dir, self.config.keep_checkpoints, self.best_checkpoint(state))
        self.last_saved = state.step
        self.accelerator.wait_for_everyone()

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

    def end(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and closes what is open."""
        if self.tracker is not None:
            write_json(self.config.run_dir / "summary.json", summary)
            self.tracker.close(summary)
            self.lock.close()
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
