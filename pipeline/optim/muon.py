"""Muon: orthogonalised momentum for weight matrices and filters, AdamW for all other parameters, in one optimizer."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.backends.mkldnn import MkldnnModule
from torch.optim.adamw import adamw

from pipeline.common.suggestions import check_known

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c in p(r) = a + b r + c r^2, https://kellerjordan.github.io/posts/muon
MIN_NORM = 1e-7  # a gradient with a smaller Frobenius norm gets a smaller update; zeros get zeros
STEPS_PER_GRAM = 5  # each multiplies the Gram matrix's rounding errors by up to a^2 = 12, so it is recomputed after these

LR_SCALINGS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
    "original": lambda rows, cols: max(1.0, rows / cols) ** 0.5,
}


def newton_schulz_flops(rows: int, cols: int, ns_steps: int = 5) -> tuple[int, int]:
    """Floating-point operations to orthogonalise one matrix: (with _gram_steps, with _plain_steps)."""
    short, long = sorted((rows, cols))
    num_grams = -(-ns_steps // STEPS_PER_GRAM)
    gram = num_grams * 4 * short**2 * long + (8 * ns_steps - 6 * num_grams) * short**3
    plain = ns_steps * (4 * short**2 * long + 2 * short**3)
    return gram, plain


def _plain_steps(matrix: Tensor, ns_steps: int) -> Tensor:
    """X <- p(X X^T) X, `ns_steps` times; matrix: [B, rows, cols] or [rows, cols] with rows <= cols."""
    a, b, c = COEFFICIENTS
    multiply_add = torch.baddbmm if matrix.ndim == 3 else torch.addmm
    for _ in range(ns_steps):
        gram = matrix @ matrix.mT
        matrix = multiply_add(matrix, multiply_add(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix


def _polynomial(gram: Tensor) -> Tensor:
    """p(R) = a I + b R + c R^2."""
    a, b, c = COEFFICIENTS
    polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


def _gram_steps(matrix: Tensor, ns_steps: int) -> Tensor:
    """The result of _plain_steps, computed on the smaller Gram matrix: R = X X^T; Q <- p(R) Q and R <- p(R) R p(R); then Q X."""
    for start in range(0, ns_steps, STEPS_PER_GRAM):
        gram = matrix @ matrix.mT
        product = polynomial = _polynomial(gram)
        for _ in range(min(STEPS_PER_GRAM, ns_steps - start) - 1):
            gram = polynomial @ (polynomial @ gram)
            polynomial = _polynomial(gram)
            product = polynomial @ product
        matrix = product @ matrix
    return matrix


def orthogonalize(matrix: Tensor, ns_steps: int = 5) -> Tensor:
    """U S' V^T for each matrix U S V^T, with S' near one; [rows, cols] or a stack [B, rows, cols], zeros stay zeros.

    Quintic Newton-Schulz iteration from X = G / ||G||_F, https://kellerjordan.github.io/posts/muon/. On a CPU it uses
    fp32, because few CPUs have bf16 units, and _gram_steps where that takes fewer operations. _gram_steps requires true
    fp32, so after `torch.set_float32_matmul_precision("high")` _plain_steps is used. Other devices use bf16 and
    _plain_steps, which tolerates bf16's rounding. The result has the dtype of the iteration.
    """
    on_cpu = matrix.device.type == "cpu"
    wide = matrix.to(torch.float32 if on_cpu else torch.bfloat16)
    tall = matrix.size(-2) > matrix.size(-1)
    wide = wide.mT if tall else wide
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=MIN_NORM)
    gram_flops, plain_flops = newton_schulz_flops(matrix.size(-2), matrix.size(-1), ns_steps)
    true_fp32 = on_cpu and MkldnnModule.matmul.fp32_precision in ("none", "ieee")
    iterate = _gram_steps if true_fp32 and gram_flops < plain_flops else _plain_steps
    wide = iterate(wide, ns_steps)
    return wide.mT if tall else wide


def partition(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Splits the indices of `costs` into `num_parts` lists of nearly equal sums: largest first, each into the lightest list."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0] * num_parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = sums.index(min(sums))
        parts[lightest].append(index)
        sums[lightest] += costs[index]
    return parts


def _share(params_of_ranks: list[list[Tensor]]) -> None:
    """Broadcasts the parameters of each rank to all others, in one flat buffer per rank. Every rank must call it."""
    flats = [torch.cat([p.reshape(-1) for p in params]) if params else None for params in params_of_ranks]
    works = [dist.broadcast(flat, rank, async_op=True) for rank, flat in enumerate(flats) if flat is not None]
    for work in works:
        if work is not None:
            work.wait()
    for params, flat in zip(params_of_ranks, flats):
        pieces = () if flat is None else flat.split([p.numel() for p in params])
        for param, piece in zip(params, pieces):
            param.copy_(piece.view_as(param))


def _check_group(group: dict[str, Any]) -> None:
    if "use_muon" not in group:
        raise ValueError("A parameter group lacks `use_muon`. Set it to True for weight matrices and filters, else to False.")
    thin = [tuple(p.shape) for p in group["params"] if p.ndim < 2]
    if group["use_muon"] and thin:
        raise ValueError(
            f"Muon requires parameters with two or more dimensions, got shape {thin[0]}. "
            "Put biases and norms in a group with use_muon=False."
        )
    check_known("lr_scaling", group["lr_scaling"], LR_SCALINGS)
    beta1, beta2 = group["betas"]
    ranges = {
        "lr": (group["lr"] >= 0, "zero or more"),
        "weight_decay": (group["weight_decay"] >= 0, "zero or more"),
        "eps": (group["eps"] >= 0, "zero or more"),
        "momentum": (0 <= group["momentum"] < 1, "at least 0 and below 1"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "at least 0 and below 1"),
        "ns_steps": (group["ns_steps"] >= 1, "one or more"),
    }
    for name, (in_range, condition) in ranges.items():
        if not in_range:
            raise ValueError(f"Muon's {name} must be {condition}, got {group[name]}.")


class Muon(torch.optim.Optimizer):
    """Muon groups (`use_muon: True`, filters [out, in, kh, kw] as matrices [out, in * kh * kw]) and AdamW groups (False).

    A Muon step with the gradient g is that of torch.optim.Muon:
        buffer = momentum * buffer + (1 - momentum) * g
        update = orthogonalize((1 - momentum) * g + momentum * buffer if nesterov else buffer)
        weight = (1 - lr * weight_decay) * weight - lr * scale(rows, cols) * update
    An AdamW step is that of torch.optim.AdamW and ignores `nesterov`. Parameters without a gradient are skipped.
    A group may set its own lr, weight_decay, betas and other options; `lr` is read at each step. State, by parameter:
    `momentum_buffer`, or `exp_avg`, `exp_avg_sq` and `step` (float32 scalar); all plain tensors.

    `match_rms_adamw` scales by 0.2 sqrt(max(rows, cols)), so that an update of any shape has the RMS of a typical AdamW
    update. Therefore both kinds of group can share one lr and weight decay; the defaults are AdamW's usual 1e-3 and
    Moonlight's 0.1 (https://arxiv.org/abs/2502.16982). `original` scales by sqrt(max(1, rows / cols)) and requires an lr
    of 0.02 or more. Momentum 0.95, Nesterov and five steps are the defaults of Muon's author, who found that Nesterov is
    always slightly better and that five steps bring the singular values to 0.7 - 1.2 (link above).

    With `distribute` and more than one process (DDP: equal gradients on all ranks), each rank orthogonalises its part
    of the matrices, balanced by operations, and broadcasts the new weights. Then every rank must call `step`.

    Raises ValueError for a group without `use_muon`, for a parameter with fewer than two dimensions in a Muon group,
    and for settings out of range.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        lr_scaling: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        distribute: bool = True,
    ) -> None:
        super().__init__(
            list(param_groups),
            dict(
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                lr_scaling=lr_scaling,
                betas=betas,
                eps=eps,
                distribute=distribute,
            ),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; raises ValueError if `use_muon` is missing or True for a vector, or if a setting is out of range."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient; returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon_step if group["use_muon"] else self._adamw_step)(group, params)
        return loss

    def _state(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The state `name` of each parameter, initialised with zeros."""
        for param in params:
            if name not in self.state[param]:
                scalar = name == "step"
                self.state[param][name] = torch.zeros((), dtype=torch.float32) if scalar else torch.zeros_like(param)
        return [self.state[param][name] for param in params]

    def _muon_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = self._state(params, "momentum_buffer")
        for buffer, grad in zip(buffers, grads):
            buffer.lerp_(grad, 1 - group["momentum"])

        shared = group["distribute"] and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        costs = [min(newton_schulz_flops(p.size(0), p[0].numel(), group["ns_steps"])) for p in params]
        parts = partition(costs, dist.get_world_size() if shared else 1)
        mine = parts[dist.get_rank() if shared else 0]

        batches: dict[Hashable, list[int]] = {}  # one stack per shape; on a CPU stacking only costs a copy
        for index in mine:
            param = params[index]
            batches.setdefault(index if param.device.type == "cpu" else param.shape, []).append(index)
        for batch in batches.values():
            updates = [
                (grads[i].lerp(buffers[i], group["momentum"]) if group["nesterov"] else buffers[i]).flatten(1)
                for i in batch
            ]
            matrix = updates[0] if len(updates) == 1 else torch.stack(updates)
            orthogonal = orthogonalize(matrix, group["ns_steps"])
            scale = LR_SCALINGS[group["lr_scaling"]](*matrix.shape[-2:])
            for i, update in zip(batch, orthogonal.reshape(len(batch), *matrix.shape[-2:])):
                params[i].mul_(1 - group["lr"] * group["weight_decay"])
                params[i].add_(update.reshape(params[i].shape), alpha=-group["lr"] * scale)
        if shared:
            _share([[params[i] for i in part] for part in parts])

    def _adamw_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            self._state(params, "exp_avg"),
            self._state(params, "exp_avg_sq"),
            [],
            self._state(params, "step"),
            # torch's default kernel: on a CPU the fused one is wrong if a loaded state has another memory format
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
