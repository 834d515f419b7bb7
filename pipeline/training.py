"""The loop: train a model for some epochs, evaluate after each, and leave a folder that people can use.

One step is one optimizer update on one global batch. Processes, micro-batches and the batch-size schedule only decide how
that batch is cut up.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.assembly import Parts, assemble, check_settings, freeze_backbone, load_images, warnings_of
from pipeline.common import console
from pipeline.common.randomness import address
from pipeline.common.stopping import Interrupted, TrainingFailed
from pipeline.data.shards import LostShard
from pipeline.distributed.accelerator import (
    make_accelerator,
    meet_in_layers,
    prepared,
    seed_generators,
    system_facts,
)
from pipeline.distributed.fsdp import whole
from pipeline.distributed.shared_failure import failing_together
from pipeline.ending import closing_table, finish, stop
from pipeline.evaluation import evaluate
from pipeline.images.decode import BadImage
from pipeline.loaders.shares import IGNORED, largest_share, share_of
from pipeline.loaders.sources import is_lost_worker
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.memory import is_out_of_memory, out_of_memory_advice
from pipeline.metrics import add_batch, figures, zero_sums
from pipeline.optim.ema import update_ema
from pipeline.optim.optimizers import lr_of_step, sam_rho, set_lr
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.optim.schedule import best_epoch, should_stop_early
from pipeline.plan import plan_text
from pipeline.run import Run
from pipeline.run_folder.paths import name_run
from pipeline.run_folder.resume import ended_summary
from pipeline.settings.batch_size import batch_size_at, steps_per_epoch
from pipeline.settings.config import Config
from pipeline.state import TrainState, average_buffers

DROPOUT = 4  # purpose in the addresses of randomness


def train(config: Config) -> dict[str, Any]:
    """Trains as the settings say and returns the run's summary, which is also in its summary.json.

    Raises ValueError for what is wrong before the first step, TrainingFailed for what goes wrong after it, and Interrupted
    when a signal stopped the run; whatever was saved is whole then, and summary.json tells how it ended.
    """
    check_settings(config)
    accelerator = make_accelerator(config)
    with failing_together():
        return train_on(accelerator, name_run(config, accelerator))


def train_on(accelerator: Accelerator, config: Config) -> dict[str, Any]:
    """train, for each of the processes."""
    if accelerator.is_main_process:
        for sentence in warnings_of(config):
            console.warn(sentence)
    summary = ended_summary(config)
    if summary is not None:
        text = f"{config.run_dir} has ended ({summary['status']}); nothing was changed."
        console.say(text, accelerator.is_main_process)
        return summary
    parts = assemble(config, accelerator)
    config = parts.config
    console.say(plan_text(config, parts, accelerator), accelerator.is_main_process)
    if config.dry_run:
        return {}
    load_images(parts, accelerator)
    run = Run(config, accelerator, system_facts(accelerator) | {"bad_images": len(parts.dataset.bad_images)})
    try:
        summary = train_in(run, parts)
    finally:
        run.release()
    console.say(closing_table(summary, config), accelerator.is_main_process)
    return summary


def train_in(run: Run, parts: Parts) -> dict[str, Any]:
    """Trains from where the run stands to its end and returns the summary; however it ends, its folder tells."""
    accelerator = run.accelerator
    model, optimizer = prepared(parts.model, parts.optimizer, accelerator)
    bad_step = torch.tensor(-1, device=accelerator.device)
    state = TrainState(model, optimizer, zero_sums(accelerator.device), bad_step, parts.ema)
    run.begin(state)
    try:
        with failing_together():
            return finish(state, parts, run, train_epochs(state, parts, run))
    except Interrupted as interruption:
        stop(state, run, "interrupted", str(interruption))
        raise
    except (TrainingFailed, BadImage, LostShard) as error:
        stop(state, run, "failed", str(error))
        raise TrainingFailed(str(error)) from error
    except (RuntimeError, OSError, EOFError) as error:
        if is_out_of_memory(error):
            advice = out_of_memory_advice(error, state.bare_model, parts.preprocessing, run.config, accelerator)
        elif is_lost_worker(error):
            advice = "A worker process that reads images was killed, as systems do that run out of memory. Lower --num_workers."
        elif isinstance(error, OSError):  # a full disk, at the end for example
            raise TrainingFailed(f"{error}. {run.how_to_go_on()}") from error
        else:
            raise
        stop(state, run, "failed", advice)
        raise TrainingFailed(advice) from error


def train_epochs(state: TrainState, parts: Parts, run: Run) -> str:
    """Trains and evaluates, epoch after epoch; returns how it ended: completed or early_stopped."""
    config, accelerator = run.config, run.accelerator
    while state.epoch < config.epochs:
        if should_stop_early(state.history, config):
            return "early_stopped"
        train_figures = train_epoch(state, parts.loaders["train"], run)
        average_buffers(state, accelerator)
        figures_of = {"train": train_figures, "val": evaluate(state.bare_model, parts.loaders["val"], accelerator)[0]}
        if state.ema is not None:
            figures_of["val_ema"] = evaluate(state.ema.module, parts.loaders["val"], accelerator)[0]
        end_epoch(state, run, figures_of)
    return "completed"


def train_epoch(state: TrainState, loader: AnyLoader, run: Run) -> dict[str, Any]:
    """Trains from where the state stands to the end of its epoch; returns the epoch's figures over all ranks."""
    config = run.config
    batch_size = batch_size_at(state.epoch, config)
    num_batches = steps_per_epoch(len(loader), batch_size, config.drop_last)
    state.model.train()
    freeze_backbone(state.bare_model, state.epoch < config.freeze_epochs)
    run.read_clock(state)
    with run.progress_bar(state, num_batches) as bar:
        for images, labels in loader.train_epoch(state.epoch, batch_size, num_batches, first_batch=state.batch):
            lr = lr_of_step(state.epoch, state.batch, num_batches, state.history, config)
            set_lr(state.optimizer, lr)
            count = min(batch_size, len(loader) - state.batch * batch_size)
            share = Share(images, labels, count, epochs=count / len(loader))
            norm = train_step(state, share, config, run.accelerator)
            bar.update()
            run.after_step(state, lr, batch_size, norm, is_last=state.batch == num_batches)
    return figures(run.accelerator.reduce(state.sums))


@dataclass(frozen=True)
class Share:
    """A rank's share of a global batch.

    images: float [B, C, S, S]; labels: int64 [B] or float [B, num_classes]; count: samples in the global batch; epochs: the
    part of an epoch that they are.
    """

    images: Tensor
    labels: Tensor
    count: int
    epochs: float


def train_step(state: TrainState, share: Share, config: Config, accelerator: Accelerator) -> Tensor | None:
    """One optimizer update on one global batch; all of it, or under fp16 nothing but a smaller loss scale.

    Returns the gradient's L2 norm before clipping, float []; None when clip_grad_norm is null.
    """
    model, norm = state.bare_model, None
    before = None if accelerator.scaler is None else fp16_memory(state, model)
    sharp = sam_rho(config) > 0 and state.step % config.sam_every == 0
    loss_sum = accumulate_gradient(
        state, share, config, accelerator, sync=config.sam_sync or not sharp, sums=state.sums
    )
    if before is None:
        state.bad_step = torch.where(loss_sum.isfinite() | (state.bad_step >= 0), state.bad_step, state.step)
    if sharp:
        sharpen_gradient(state, share, config, accelerator)
    if config.clip_grad_norm is not None:
        norm = whole(accelerator.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm))
    # Accelerate's wrapper looks for packages on the disk in every step; it is the one that knows the scaler
    optimizer = state.optimizer.optimizer if accelerator.scaler is None else state.optimizer
    optimizer.step()
    optimizer.zero_grad()
    if before is not None and state.optimizer.step_was_skipped:
        restore(state, model, before)
    elif state.ema is not None and config.ema_decay is not None:
        update_ema(state.ema, model, config.ema_decay, share.epochs, state.step)
    state.step += 1
    state.batch += 1
    state.samples += share.count
    return norm


def accumulate_gradient(
    state: TrainState, share: Share, config: Config, accelerator: Accelerator, sync: bool, sums: Tensor | None
) -> Tensor:
    """Adds the gradient of the global batch's mean loss, micro-batch by micro-batch; returns this rank's loss sum, float [].

    sync: whether the gradient is averaged over ranks; sums: the metrics to add to.
    """
    seed_generators(accelerator.device, address(config.seed, DROPOUT, state.step, accelerator.process_index))
    weight = accelerator.num_processes / share.count  # makes DDP's mean over ranks the mean over the batch's samples
    total = torch.zeros((), device=share.images.device)
    parts = micro_batches(share, config, accelerator)
    for number, (images, labels) in enumerate(parts, 1):
        with contextlib.nullcontext() if sync and number == len(parts) else accelerator.no_sync(state.model):
            logits = state.model(images)
            loss_sum = loss_sum_of(logits, labels, config.label_smoothing)
            # checkpointed layers run again in the backward pass, and would count the batch's statistics twice
            with kept_buffers(state.model) if config.gradient_checkpointing else contextlib.nullcontext():
                accelerator.backward(loss_sum * weight)
        if sums is not None:
            add_batch(sums, logits, hard_labels(labels), loss_sum)
        total += loss_sum.detach()
    return total


def micro_batches(share: Share, config: Config, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """The share's images and labels in parts of at most micro_batch_size.

    With sync_batchnorm or a sharded model the ranks meet in every layer, and each has as many parts as the largest share:
    the others are empty, or where statistics do not count them, one sample whose label is IGNORED.
    """
    size = config.images_at_once or len(share.images)
    parts = list(zip(share.images.split(size), share.labels.split(size)))
    if meet_in_layers(config, accelerator):
        largest = largest_share(share.count, accelerator.num_processes)
        start, stop = share_of(share.count, accelerator.process_index, accelerator.num_processes)
        filling = 0 if config.sync_batchnorm else 1
        unlabelled = torch.full_like(share.labels[:filling], IGNORED if share.labels.ndim == 1 else 0)
        parts = parts if stop > start else []
        number = math.ceil(largest / (config.images_at_once or largest))
        parts += [(share.images[:filling], unlabelled)] * (number - len(parts))
    return parts


def sharpen_gradient(state: TrainState, share: Share, config: Config, accelerator: Accelerator) -> None:
    """Puts the gradient at SAM's perturbed weights in place of that at the weights.

    Under fp16 an overflow of a rank's first gradient makes its perturbed weights NaN (inf times a radius of 0), and so the
    second gradient of all ranks: the scaler skips the step on each of them, and no rank has to wait to find out.
    """
    model = state.bare_model
    norm = sharpness_norm(model, config.sam_adaptive)
    with perturbed(model, sam_rho(config), config.sam_adaptive, norm):
        accumulate_gradient(state, share, config, accelerator, sync=True, sums=None)


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """On the way out the model's buffers are what they were on the way in."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, earlier in zip(model.buffers(), before):
        buffer.copy_(earlier)


def fp16_memory(state: TrainState, model: nn.Module) -> list[Tensor]:
    """Copies of what a forward pass changes: the epoch's sums and the model's buffers."""
    return [tensor.clone() for tensor in (state.sums, *model.buffers())]


def restore(state: TrainState, model: nn.Module, before: list[Tensor]) -> None:
    """Makes a skipped step one that never was; it is only counted."""
    for tensor, earlier in zip((state.sums, *model.buffers()), before):
        tensor.copy_(earlier)
    state.skipped_steps += 1


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


def end_epoch(state: TrainState, run: Run, figures_of: dict[str, Any]) -> None:
    """Takes the epoch into the history, tells of it, saves. figures_of: train, val and, with a moving average, val_ema."""
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
        **figures_of,
    }
    state.history.append(entry)
    run.log("train", state, state.epoch, {"event": "epoch", **figures_of["train"]})
    run.log("val", state, state.epoch, {**figures_of["val"], **prefixed("ema_", figures_of.get("val_ema", {}))})
    is_best = best_epoch(state.history, run.config) == len(state.history) - 1
    batch_size = batch_size_at(state.epoch - 1, run.config)
    lr = state.optimizer.param_groups[0]["lr"] / state.optimizer.param_groups[0]["lr_scale"]
    line = console.epoch_line(state.epoch, run.config.epochs, entry, lr, batch_size, is_best)
    console.say(line, run.accelerator.is_main_process)
    run.save(state)
    run.stop_if_asked(state, is_last=True)


def prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in values.items()}
