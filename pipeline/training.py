"""The loop: train a model for some epochs, evaluate after each, and leave a folder that people can use.

One step is one optimizer update on one global batch. Processes, micro-batches and the batch-size schedule only decide how
that batch is cut up.
"""

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline import console
from pipeline.assembly import Parts, assemble, check_settings, make_accelerator, name_run, system_facts
from pipeline.config import Config
from pipeline.ending import closing_table, finish, stop
from pipeline.evaluate import evaluate
from pipeline.images import BadImage
from pipeline.loaders import Loader
from pipeline.metrics import IGNORED, add_batch, figures, zero_sums
from pipeline.optimizers import set_lr
from pipeline.plan import lr_of_step, plan_text
from pipeline.randomness import address
from pipeline.run import Interrupted, Run, TrainingFailed, ended_summary
from pipeline.schedule import batch_size_at, best_epoch, should_stop_early, steps_per_epoch
from pipeline.state import TrainState, average_buffers

DROPOUT = 4  # purpose in the addresses of randomness


def train(config: Config) -> dict[str, Any]:
    """Trains as the settings say and returns the run's summary, which is also in its summary.json.

    Raises ValueError for what is wrong before the first step, TrainingFailed for what goes wrong after it, and Interrupted
    when a signal stopped the run; whatever was saved is whole then, and summary.json tells how it ended.
    """
    check_settings(config)
    accelerator = make_accelerator(config)
    config = name_run(config, accelerator)
    summary = ended_summary(config)
    if summary is not None:
        accelerator.print(f"{config.run_dir} has ended ({summary['status']}); nothing was changed.")
        return summary
    parts = assemble(config, accelerator)
    accelerator.print(plan_text(config, parts, accelerator))
    if config.dry_run:
        return {}
    run = Run(config, accelerator, system_facts(accelerator))
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    state = TrainState(model, optimizer, zero_sums(accelerator.device), torch.tensor(-1, device=accelerator.device))
    run.begin(state)
    try:
        status = train_epochs(state, parts, run)
    except Interrupted as interruption:
        stop(state, run, "interrupted", str(interruption))
        raise
    except (TrainingFailed, BadImage) as error:
        stop(state, run, "failed", str(error))
        raise TrainingFailed(str(error)) from error
    summary = finish(state, parts, run, status)
    accelerator.print(closing_table(summary, config))
    return summary


def train_epochs(state: TrainState, parts: Parts, run: Run) -> str:
    """Trains and evaluates, epoch after epoch; returns how it ended: completed or early_stopped."""
    config, accelerator = run.config, run.accelerator
    while state.epoch < config.epochs:
        if should_stop_early(state.history, config):
            return "early_stopped"
        train_figures = train_epoch(state, parts.loaders["train"], run)
        model = accelerator.unwrap_model(state.model)
        average_buffers(model, accelerator)
        val_figures, _ = evaluate(model, parts.loaders["val"], accelerator)
        end_epoch(state, run, train_figures, val_figures)
    return "completed"


def train_epoch(state: TrainState, loader: Loader, run: Run) -> dict[str, Any]:
    """Trains from where the state stands to the end of its epoch; returns the epoch's figures over all ranks."""
    config = run.config
    batch_size = batch_size_at(state.epoch, config)
    num_batches = steps_per_epoch(len(loader), batch_size, config.drop_last)
    state.model.train()
    run.read_clock(state)
    with run.progress_bar(state, num_batches) as bar:
        for images, labels in loader.train_epoch(state.epoch, batch_size, num_batches, first_batch=state.batch):
            lr = lr_of_step(state.epoch, state.batch, num_batches, state.history, config)
            set_lr(state.optimizer, lr)
            count = min(batch_size, len(loader) - state.batch * batch_size)
            norm = train_step(state, images, labels, count, config, run.accelerator)
            bar.update()
            run.after_step(state, lr, batch_size, norm, is_last=state.batch == num_batches)
    return figures(run.accelerator.reduce(state.sums))


def train_step(
    state: TrainState, images: Tensor, labels: Tensor, count: int, config: Config, accelerator: Accelerator
) -> Tensor | None:
    """One optimizer update on one global batch, of which images and labels are this rank's share.

    images: float [B, C, S, S]; labels: int64 [B] or float [B, num_classes]; count: samples in the global batch.
    Returns the gradient's L2 norm before clipping, float []; None when clip_grad_norm is null.
    """
    torch.manual_seed(address(config.seed, DROPOUT, state.step, accelerator.process_index))
    loss_sum = accumulate_gradient(state, images, labels, count, config, accelerator)
    state.bad_step = torch.where(loss_sum.isfinite() | (state.bad_step >= 0), state.bad_step, state.step)
    norm = None
    if config.clip_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.batch += 1
    state.samples += count
    return norm


def accumulate_gradient(
    state: TrainState, images: Tensor, labels: Tensor, count: int, config: Config, accelerator: Accelerator
) -> Tensor:
    """Adds the gradient of the global batch's mean loss, micro-batch by micro-batch; returns this rank's loss sum, float []."""
    weight = accelerator.num_processes / count  # makes DDP's mean over ranks the mean over the global batch's samples
    size = config.micro_batch_size or len(images)
    total = torch.zeros((), device=images.device)
    for start in range(0, len(images), size):
        is_last = start + size >= len(images)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(state.model):
            part = labels[start : start + size]
            logits = state.model(images[start : start + size])
            loss_sum = loss_sum_of(logits, part, config.label_smoothing)
            accelerator.backward(loss_sum * weight)
        add_batch(state.sums, logits, hard_labels(part), loss_sum)
        total += loss_sum.detach()
    return total


def loss_sum_of(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy summed over the samples; labels: int64 [B], or float [B, num_classes] with rows that sum to 1, or to 0."""
    if labels.ndim == 1:
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED)
    share = label_smoothing / labels.shape[1]
    return cross_entropy(logits, labels * (1 - label_smoothing) + labels.sum(1, keepdim=True) * share, reduction="sum")


def hard_labels(labels: Tensor) -> Tensor:
    """The larger part of each mixed label; int64 [B]."""
    if labels.ndim == 1:
        return labels
    return labels.argmax(dim=1).where(labels.sum(dim=1) > 0, IGNORED)


def end_epoch(state: TrainState, run: Run, train_figures: dict[str, Any], val_figures: dict[str, Any]) -> None:
    """Takes the epoch into the history, tells of it, saves."""
    run.read_clock(state)
    earlier = state.history[-1] if state.history else {"samples": 0, "train_seconds": 0.0}
    state.epoch += 1
    state.batch = 0
    state.sums.zero_()
    state.logged = [0.0] * 4
    rate = (state.samples - earlier["samples"]) / (state.train_seconds - earlier["train_seconds"])
    entry = {
        **state.place(state.epoch),
        "train_seconds": state.train_seconds,
        "images_per_second": round(rate, 1),
        "train": train_figures,
        "val": val_figures,
    }
    state.history.append(entry)
    run.log("train", state, state.epoch, {"event": "epoch", **train_figures})
    run.log("val", state, state.epoch, val_figures)
    is_best = best_epoch(state.history, run.config) == len(state.history) - 1
    batch_size = batch_size_at(state.epoch - 1, run.config)
    lr = state.optimizer.param_groups[0]["lr"] / state.optimizer.param_groups[0]["lr_scale"]
    run.accelerator.print(console.epoch_line(state.epoch, run.config.epochs, entry, lr, batch_size, is_best))
    run.save(state)
    run.stop_if_asked(state, is_last=True)
