"""Sharpness-aware minimisation: a context in which the weights are perturbed towards a higher loss.

SAM: https://arxiv.org/abs/2010.01412. ASAM, its scale-invariant form: https://arxiv.org/abs/2102.11600.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-12  # avoids 0 / 0 for a gradient of zeros


def weights_and_gradients(model: nn.Module) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters that have a gradient, and their gradients."""
    pairs = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


def sharpness_norm(model: nn.Module, adaptive: bool) -> Tensor:
    """The L2 norm of the gradient g, or of |w| g if adaptive, which normalises the perturbation; float32 [] or wider."""
    parameters, gradients = weights_and_gradients(model)
    if adaptive:
        gradients = list(torch._foreach_mul(gradients, [parameter.detach().abs() for parameter in parameters]))
    precision = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(list(torch._foreach_norm(gradients, 2, dtype=precision))).norm()


@contextmanager
def perturbed(model: nn.Module, rho: float, adaptive: bool, norm: Tensor) -> Iterator[None]:
    """Inside the context every weight w with a gradient g is w + e with e = rho g / norm, or rho w^2 g / norm if adaptive.

    The gradients are None inside. A loss scale cancels, because norm contains it too. BatchNorm does not update its running
    statistics inside, so that a step updates them once. On exit, also after an exception, the weights are restored bit for
    bit.
    """
    parameters, gradients = weights_and_gradients(model)
    weights = [parameter.data for parameter in parameters]
    if adaptive:
        gradients = list(torch._foreach_mul(torch._foreach_mul(gradients, weights), weights))
    radius = (rho / (norm + TINY)).to(weights[0].dtype)
    # a tensor times one scalar tensor is a fused kernel on a GPU; a list of scalar tensors would launch one kernel for each
    neighbours = list(torch._foreach_mul(gradients, radius))
    torch._foreach_add_(neighbours, weights)
    normalisations: list[Any] = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    try:
        for parameter, neighbour in zip(parameters, neighbours):
            # replaces the tensor, so that restoring the weight neither copies nor rounds
            parameter.data, parameter.grad = neighbour, None
        for module in normalisations:
            module.track_running_stats = False
        yield
    finally:
        for parameter, weight in zip(parameters, weights):
            parameter.data = weight
        for module in normalisations:
            module.track_running_stats = True
