"""Exponential moving average of the weights."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.distributed.fsdp import is_sharded, local
from pipeline.settings.config import Config


def create_ema(model: nn.Module, config: Config) -> ModelEmaV3 | None:
    """timm's moving average of the model's weights and buffers, or None if ema_decay is null."""
    return None if config.ema_decay is None else ModelEmaV3(model, foreach=True)


def update_ema(ema: ModelEmaV3, model: nn.Module, ema_decay: float, epochs: float, step: int) -> None:
    """Updates ema = d ema + (1 - d) model with d = ema_decay ** epochs, which makes d independent of the batch size.

    epochs: the fraction of an epoch in this step; step: counted from 0. d is at most (1 + step) / (10 + step), so that the
    average soon forgets the initial weights (the warm-up of TensorFlow's ExponentialMovingAverage).
    """
    ema.decay = min(ema_decay**epochs, (1 + step) / (10 + step))
    if is_sharded(model):
        update_shards(ema, model)
    else:
        ema.update(model)


@torch.no_grad()
def update_shards(ema: ModelEmaV3, model: nn.Module) -> None:
    """timm's update on each rank's own shards: torch has no foreach operation on a mix of DTensors and plain tensors."""
    pairs = zip(ema.module.state_dict().values(), model.state_dict().values())
    for average, value in ((local(average), local(value)) for average, value in pairs):
        if average.is_floating_point():
            average.lerp_(value, 1 - ema.decay)
        else:
            average.copy_(value)
