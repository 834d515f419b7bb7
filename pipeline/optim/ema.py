"""An exponential moving average of the weights, beside them."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.distributed.fsdp import is_sharded, local
from pipeline.settings.config import Config


def create_ema(model: nn.Module, config: Config) -> ModelEmaV3 | None:
    """timm's average of the model's weights and buffers, or None when ema_decay is null."""
    return None if config.ema_decay is None else ModelEmaV3(model, foreach=True)


def update_ema(ema: ModelEmaV3, model: nn.Module, ema_decay: float, epochs: float, step: int) -> None:
    """ema = d ema + (1 - d) model with d = ema_decay ** epochs, so that the batch size does not matter.

    epochs: the part of an epoch that the step took; step: from 0. Early on d is at most (1 + step) / (10 + step): the average
    forgets the initial weights (the warm-up of TensorFlow's ExponentialMovingAverage).
    """
    ema.decay = min(ema_decay**epochs, (1 + step) / (10 + step))
    if is_sharded(model):
        update_shards(ema, model)
    else:
        ema.update(model)


@torch.no_grad()
def update_shards(ema: ModelEmaV3, model: nn.Module) -> None:
    """timm's update, each rank of its own shards: torch has no operation on lists of shared and plain tensors together."""
    pairs = zip(ema.module.state_dict().values(), model.state_dict().values())
    for average, value in ((local(average), local(value)) for average, value in pairs):
        if average.is_floating_point():
            average.lerp_(value, 1 - ema.decay)
        else:
            average.copy_(value)
