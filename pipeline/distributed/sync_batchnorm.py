"""Synchronised BatchNorm, on every device, for ranks with any number of samples, none included.

torch's SyncBatchNorm does not support CPUs. Under bf16 it gathers float32 statistics from ranks with samples and bf16 zeros
from ranks without.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with the mean and variance per channel over the values of all ranks.

    x: float [B, C, ...], where B may be 0. Returns the normalised x, and mean, biased variance and count over all ranks,
    float64 [C], [C] and []. All ranks must call it and its backward pass. The sums are computed in float64, so the distribution
    of the values over the ranks changes the result by float32 rounding at most. Gradient: https://arxiv.org/abs/1502.03167.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        others = [dimension for dimension in range(x.ndim) if dimension != 1]
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        own_var, own_mean = (torch.zeros(x.shape[1], device=x.device),) * 2
        if x.numel():
            own_var, own_mean = torch.var_mean(x.float(), others, correction=0)
        own_mean, own_var = own_mean.double(), own_var.double()
        sums = torch.cat([count * own_mean, count * (own_var + own_mean**2), count])
        dist.all_reduce(sums)
        mean, squares, count = *(sums[:-1] / sums[-1]).chunk(2), sums[-1]
        var = (squares - mean**2).clamp(min=0)
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = (var + eps).rsqrt().float()
        normalised = (x.float() - mean.float().view(shape)) * scale.view(shape)
        context.save_for_backward(normalised, scale, count)
        context.others, context.shape = others, shape
        context.mark_non_differentiable(mean, var, count)
        return normalised.to(x.dtype), mean, var, count

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        normalised, scale, count = context.saved_tensors
        wide = gradients[0].float()
        sums = torch.stack([wide.sum(context.others), (wide * normalised).sum(context.others)]).double()
        dist.all_reduce(sums)
        mean, projection = ((part / count).float().view(context.shape) for part in sums)
        return ((wide - mean - normalised * projection) * scale.view(context.shape)).to(gradients[0].dtype), None


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer is a BatchNorm, of torch or derived from it as timm's."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class GlobalBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d or 3d of the global batch: training uses statistics over all ranks, including ranks without samples."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm expects [B, C, ...], got {list(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        normalised, mean, var, count = Normalize.apply(input, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self.update_running(self.running_mean, self.running_var, mean, var * count / (count - 1).clamp(min=1))
        if self.weight is None:
            return normalised
        shape = [1, -1] + [1] * (input.ndim - 2)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)

    @torch.no_grad()
    def update_running(self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> None:
        """Updates the running statistics by momentum, or as a cumulative mean if momentum is None, as in torch."""
        weight: Any = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            weight = 1 / self.num_batches_tracked.to(running_mean) if weight is None else weight
        running_mean.lerp_(mean.to(running_mean), 0.0 if weight is None else weight)
        running_var.lerp_(var.to(running_var), 0.0 if weight is None else weight)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d, over all ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def convert_batchnorm(module: nn.Module) -> nn.Module:
    """Replaces every BatchNorm in the module by GlobalBatchNorm; keeps parameters, buffers and names.

    Raises ValueError for an unsupported type of BatchNorm.
    """
    from timm.layers import BatchNormAct2d

    for name, child in module.named_children():
        setattr(module, name, convert_batchnorm(child))
    if not isinstance(module, _BatchNorm):
        return module
    kinds: dict[type, type[GlobalBatchNorm]] = {
        BatchNormAct2d: GlobalBatchNormAct,
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), GlobalBatchNorm),
    }
    if type(module) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"sync_batchnorm supports {known}; this model has a {type(module).__name__}. Remove sync_batchnorm."
        )
    converted = kinds[type(module)](
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    converted.__dict__.update(module.__dict__)  # share parameters, buffers, submodules and hooks
    return converted
