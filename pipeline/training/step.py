"""A training step: one optimizer update on one global batch, which ranks and micro-batches only split."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.common.randomness import address
from pipeline.distributed.accelerator import synchronizes_in_layers
from pipeline.distributed.fsdp import whole
from pipeline.optim.ema import update_ema
from pipeline.optim.optimizers import classifier_names, sam_rho
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.settings.batch_size import IGNORED, largest_share, num_micro_batches, share_of
from pipeline.settings.config import Config
from pipeline.training.losses import loss_sum
from pipeline.training.metrics import add_batch
from pipeline.training.state import TrainState

DROPOUT = 4  # purpose in the addresses of randomness


@dataclass(frozen=True)
class Share:
    """A rank's share of a global batch.

    images: float [B, C, S, S]; labels: int64 [B] or float [B, num_classes]; count: samples in the global batch; epochs: count
    over the samples of an epoch; class_weights: float [num_classes] or None.
    """

    images: Tensor
    labels: Tensor
    count: int
    epochs: float
    class_weights: Tensor | None = None


def train_step(state: TrainState, share: Share, config: Config, accelerator: Accelerator) -> Tensor | None:
    """Makes one optimizer update on one global batch. The fp16 scaler may skip it, which changes only the
    loss scale and the counters.

    Returns the gradient's L2 norm before clipping, float []; None if clip_grad_norm is null.
    """
    model, norm = state.bare_model, None
    before = None if accelerator.scaler is None else fp16_memory(state, model)
    sharp = sam_rho(config) > 0 and state.step % config.sam_every == 0
    total_loss = accumulate_gradient(
        state, share, config, accelerator, sync=config.sam_sync or not sharp, sums=state.sums
    )
    if before is None:
        state.bad_step = torch.where(total_loss.isfinite() | (state.bad_step >= 0), state.bad_step, state.step)
    if sharp:
        sharpen_gradient(state, share, config, accelerator)
    if config.clip_grad_norm is not None:
        norm = whole(accelerator.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm))
    # Accelerate's wrapper handles the fp16 scaler; without one it only looks for packages on the disk, in every step
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
    """Accumulates the gradient of the global batch's mean loss over micro-batches; returns this rank's loss sum, float [].

    sync: whether to average the gradient over ranks. sums: metrics that the batch is added to, or None.
    """
    seed_generators(accelerator.device, address(config.seed, DROPOUT, state.step, accelerator.process_index))
    weight = accelerator.num_processes / share.count  # turns DDP's mean over ranks into the mean over the batch's samples
    total = torch.zeros((), device=share.images.device)
    parts = micro_batches(share, config, accelerator)
    for number, (images, labels) in enumerate(parts, 1):
        with contextlib.nullcontext() if sync and number == len(parts) else accelerator.no_sync(state.model):
            logits = state.model(images)
            batch_loss = loss_sum(logits, labels, config.loss, config.label_smoothing, share.class_weights)
            # checkpointed layers run again in the backward pass and would update BatchNorm's statistics twice
            with kept_buffers(state.model) if config.gradient_checkpointing else contextlib.nullcontext():
                accelerator.backward(batch_loss * weight)
        if sums is not None:
            add_batch(sums, logits, hard_labels(labels), batch_loss)
        total += batch_loss.detach()
    return total


def micro_batches(share: Share, config: Config, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """The share's images [B, C, S, S] and labels, split as evenly as possible into the fewest parts of at most micro_batch_size.

    With sync_batchnorm or a sharded model the ranks communicate in every layer, so each rank returns as many parts as the
    largest share needs. A part without samples is empty with sync_batchnorm; otherwise it is one sample with the label IGNORED.
    """
    images, labels = share.images, share.labels
    if not synchronizes_in_layers(config, accelerator):
        number = num_micro_batches(len(images), config)
        return list(zip(images.tensor_split(number), labels.tensor_split(number)))
    number = num_micro_batches(largest_share(share.count, accelerator.num_processes), config)
    start, stop = share_of(share.count, accelerator.process_index, accelerator.num_processes)
    filling = 0 if config.sync_batchnorm else 1
    unlabelled = images[:filling], torch.full_like(labels[:filling], IGNORED if labels.ndim == 1 else 0)
    own = images[: stop - start], labels[: stop - start]  # none of a share that holds one ignored sample
    parts = zip(*(tensor.tensor_split(number) for tensor in own))
    return [part if len(part[0]) else unlabelled for part in parts]


def sharpen_gradient(state: TrainState, share: Share, config: Config, accelerator: Accelerator) -> None:
    """Replaces the gradient at the weights by the gradient at SAM's perturbed weights.

    Under fp16 an overflow in one rank's first gradient makes its perturbed weights NaN (inf times a radius of 0), and
    therefore the second gradient of all ranks. So the scaler skips the step on every rank without another exchange.
    """
    model = state.bare_model
    norm = sharpness_norm(model, config.sam_adaptive)
    with perturbed(model, sam_rho(config), config.sam_adaptive, norm):
        accumulate_gradient(state, share, config, accelerator, sync=True, sums=None)


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the model's buffers on exit, also after an exception."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, earlier in zip(model.buffers(), before):
            buffer.copy_(earlier)


def fp16_memory(state: TrainState, model: nn.Module) -> list[Tensor]:
    """Copies of the tensors that a forward pass changes: the epoch's sums and the model's buffers."""
    return [tensor.clone() for tensor in (state.sums, *model.buffers())]


def restore(state: TrainState, model: nn.Module, before: list[Tensor]) -> None:
    """Undoes the side effects of a skipped step and counts it. before: from fp16_memory."""
    for tensor, earlier in zip((state.sums, *model.buffers()), before):
        tensor.copy_(earlier)
    state.skipped_steps += 1


def hard_labels(labels: Tensor) -> Tensor:
    """The class with the largest share of each label; int64 [B], IGNORED for a label of zeros."""
    if labels.ndim == 1:
        return labels
    return labels.argmax(dim=1).where(labels.sum(dim=1) > 0, IGNORED)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds the generators that a model on the device uses: the CPU's and the device's own.

    torch.manual_seed seeds every backend, and records a stack trace for each that is not initialised: 0.2 to 0.5 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def to_training_mode(state: TrainState, config: Config, is_backbone_frozen: bool) -> None:
    """Prepares the model for training steps: with or without its backbone and BatchNorm's running statistics."""
    state.model.train()
    freeze_backbone(state.bare_model, is_backbone_frozen)
    if is_backbone_frozen or config.freeze_batchnorm:
        for module in state.bare_model.modules():
            if getattr(module, "track_running_stats", False):
                module.eval()


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """Freezes the parameters of everything but the classifier, or unfreezes them."""
    heads = classifier_names(model)
    for name, module in model.named_modules():
        if not name.startswith(heads):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not frozen)
