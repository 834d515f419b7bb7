"""Evaluation: exact sums and counts over a split, for any number of processes."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.distributed.fsdp import is_sharded
from pipeline.loaders.loader import Loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.training.metrics import add_batch, add_calibration, add_confusion, figures, zero_sums


def evaluate(
    model: nn.Module, loader: AnyLoader, accelerator: Accelerator, calibration: Tensor | None = None
) -> tuple[dict[str, float | int], Tensor]:
    """loss, accuracy, top5_accuracy and num_samples over all ranks, and the confusion matrix int64 [num_classes, num_classes].

    Every rank must call it, with the unwrapped model. calibration: bins from metrics.zero_calibration; this rank's samples
    are added to them in place.
    """
    sums = zero_sums(accelerator.device)
    confusion = torch.zeros(loader.num_classes, loader.num_classes, dtype=torch.int64, device=accelerator.device)
    was_training = model.training
    model.eval()
    num_batches, sharded = 0, is_sharded(model)
    # FSDP2 cannot train with weights that it gathered in inference mode
    with torch.no_grad() if sharded else torch.inference_mode():
        for images, labels in loader.eval_epoch():
            with accelerator.autocast():
                logits = model(images).float()
            num_batches += 1
            add_batch(sums, logits, labels, cross_entropy(logits, labels, reduction="sum"))
            add_confusion(confusion, logits, labels)
            if calibration is not None:
                add_calibration(calibration, logits, labels)
        if sharded:  # every rank takes part in each forward pass of any rank
            assert isinstance(loader, Loader), "a stream of a sharded model is refused earlier"
            for _ in range(loader.most_eval_batches() - num_batches):
                model(loader.blank_image())
    model.train(was_training)
    return figures(accelerator.reduce(sums)), accelerator.reduce(confusion)
