"""Evaluation: exact sums and counts over a split, for any number of processes."""

from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.common.stopping import Interrupted, Signals
from pipeline.distributed.accelerator import largest
from pipeline.distributed.fsdp import is_sharded
from pipeline.loaders.loader import Batch, Loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.training.confident_mistakes import ConfidentMistakes
from pipeline.training.losses import loss_sum
from pipeline.training.metrics import (
    add_batch,
    add_calibration,
    add_classes,
    balance_figures,
    figures,
    roc_auc,
    zero_class_counts,
    zero_sums,
)

AGREE_EVERY_BATCHES = 10  # batches of a rank between two agreements of several processes on whether to stop


def evaluate(
    model: nn.Module,
    loader: AnyLoader,
    accelerator: Accelerator,
    classes: Tensor | None = None,
    calibration: Tensor | None = None,
    signals: Signals | None = None,
    mistakes: ConfidentMistakes | None = None,
    loss: str = "cross_entropy",
) -> dict[str, float | int]:
    """loss (a row of losses.LOSSES), accuracy, top5_accuracy, num_samples, balanced_accuracy, macro_f1 and, of two classes,
    roc_auc, over all ranks.

    Every rank must call it, with the unwrapped model. classes: counts from metrics.zero_class_counts, calibration: bins from
    metrics.zero_calibration, mistakes: empty; this rank's samples are added to them in place. signals: if one of the ranks
    receives a signal, every rank raises Interrupted.
    """
    sums = zero_sums(accelerator.device)
    counts = zero_class_counts(loader.num_classes, accelerator.device) if classes is None else classes
    scores: list[Tensor] = []
    was_training = model.training
    model.eval()
    sharded = is_sharded(model)
    batches = padded_batches(loader) if sharded else loader.eval_epoch()
    # FSDP2 cannot train with weights that it gathered in inference mode
    with torch.no_grad() if sharded else torch.inference_mode():
        for images, labels in until_signal(batches, signals, accelerator):
            with accelerator.autocast():
                logits = model(images).float()
            if not len(labels):
                continue
            add_batch(sums, logits, labels, loss_sum(logits, labels, loss))
            add_classes(counts, logits, labels)
            if loader.num_classes == 2:
                scores.append(torch.stack([class_1_score(logits, loss).to(sums.dtype), labels.to(sums.dtype)], dim=1))
            if calibration is not None:
                add_calibration(calibration, logits, labels, loss)
            if mistakes is not None:
                mistakes.add(images, logits, labels, loss)
    model.train(was_training)
    found = figures(accelerator.reduce(sums)) | balance_figures(accelerator.reduce(counts))
    if loader.num_classes == 2:
        everyones = from_all_ranks(torch.cat([sums.new_zeros(0, 2), *scores]), accelerator)
        found["roc_auc"] = roc_auc(*everyones.unbind(dim=1))
    return found


def class_1_score(logits: Tensor, loss: str) -> Tensor:
    """What the probability of class 1 of two classes grows with, without its rounding near 0 and 1; float [B]."""
    return logits[:, 1] if loss == "bce" else logits[:, 1] - logits[:, 0]


def from_all_ranks(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all ranks on the CPU, [N, 2]; the second column is 0 or more. Every rank must call it."""
    if accelerator.num_processes > 1:
        rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1))
    rows = rows.cpu()
    return rows[rows[:, 1] >= 0]


def padded_batches(loader: AnyLoader) -> Iterator[Batch]:
    """The batches of eval_epoch, then blank images without labels, as many batches as the rank with most batches has.

    Every rank takes part in each forward pass of a sharded model.
    """
    assert isinstance(loader, Loader), "a stream of a sharded model is refused earlier"
    number = 0
    for number, (images, labels) in enumerate(loader.eval_epoch(), 1):
        yield images, labels
    for _ in range(loader.most_eval_batches() - number):
        yield loader.blank_image(), loader.labels[:0]


def until_signal(batches: Iterator[Batch], signals: Signals | None, accelerator: Accelerator) -> Iterator[Batch]:
    """Yields the batches. Raises Interrupted between two of them, on every rank, if one of the ranks received a signal.

    Several ranks agree every AGREE_EVERY_BATCHES batches, and ranks with fewer batches take part until all have finished.
    """
    if signals is None:
        yield from batches
    elif accelerator.num_processes == 1:
        for batch in batches:
            if signals.received:
                raise Interrupted(signals.received)
            yield batch
    else:
        some_left = 1
        while some_left:
            number = 0
            for number, batch in enumerate(islice(batches, AGREE_EVERY_BATCHES), 1):
                yield batch
            received, some_left = largest(accelerator, signals.received, int(number == AGREE_EVERY_BATCHES))
            if received:
                raise Interrupted(received)
