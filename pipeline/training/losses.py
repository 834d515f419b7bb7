"""Losses: a row of LOSSES per kind, each a sum over samples; and the class probabilities that a model trained with it gives."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.settings.batch_size import IGNORED

PRESENT = 0.2  # with bce, a class with a larger share of a mixed label is present; timm's recipes of arXiv 2110.00476
GAMMA = 2.0  # of the focal loss, the value that arXiv 1708.02002 found best


def shares_of(labels: Tensor, logits: Tensor) -> Tensor:
    """The share of each class in each label, in the logits' dtype [B, num_classes]; zeros for IGNORED.

    labels: int64 [B], or shares already.
    """
    if labels.ndim == 2:
        return labels.to(logits.dtype)
    return (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)


def smoothed(shares: Tensor, label_smoothing: float) -> Tensor:
    """The shares with a part of each label spread over all classes; rows of zeros stay zeros."""
    return shares * (1 - label_smoothing) + shares.sum(1, keepdim=True) * (label_smoothing / shares.shape[1])


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
    """-sum over classes of weight * share * log softmax(logits)."""
    if labels.ndim == 2:
        return functional.cross_entropy(logits, smoothed(labels, label_smoothing), weights, reduction="sum")
    return functional.cross_entropy(
        logits, labels, weights, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED
    )


def bce(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of each class, present or not, added up over the classes (https://arxiv.org/abs/2110.00476).

    Of a mixed label every class with a share above PRESENT is present. As timm's BinaryCrossEntropy with sum_classes.
    """
    shares = shares_of(labels, logits)
    targets = smoothed_presence((shares > PRESENT).to(logits.dtype), label_smoothing)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    return (losses * (shares.sum(dim=1) > 0 if weights is None else shares @ weights)).sum()


def smoothed_presence(present: Tensor, label_smoothing: float) -> Tensor:
    """1 - s + s / num_classes for a class that is present, s / num_classes for any other."""
    return present * (1 - label_smoothing) + label_smoothing / present.shape[1]


def focal(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
    """-sum over classes of weight * share * (1 - p)^GAMMA * log p with p = softmax(logits) (https://arxiv.org/abs/1708.02002)."""
    log_p = logits.log_softmax(dim=1)
    targets = smoothed(shares_of(labels, logits), label_smoothing)
    losses = (1 - log_p.exp()) ** GAMMA * log_p * targets
    return -(losses if weights is None else losses * weights).sum()


# logits: float [B, num_classes]; labels: int64 [B], or float [B, num_classes] with rows that sum to 1, or to 0 for IGNORED;
# weights: float [num_classes] or None. Returns the samples' losses added up, float [].
Loss = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]

LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "bce": bce, "focal": focal}


def loss_sum(
    logits: Tensor, labels: Tensor, loss: str, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """The samples' losses added up, float []; `loss` is a row of LOSSES."""
    return LOSSES[loss](logits, labels, label_smoothing, None if weights is None else weights.to(logits.dtype))


def probabilities(logits: Tensor, loss: str) -> Tensor:
    """The probability of each class [B, num_classes]: softmax, or with bce the sigmoid of each class, which need not sum to 1."""
    return logits.sigmoid() if loss == "bce" else logits.softmax(dim=1)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """The weight of each class, samples / (classes * samples of the class), so that the mean over the samples is 1; float32.

    labels: int64 [N], of the training split. Classes without samples get 0 and are not counted. As scikit-learn's "balanced".
    """
    # bincount would wait for a GPU, to read the largest label
    counts = torch.zeros(num_classes, dtype=torch.int64, device=labels.device).index_add_(0, labels, torch.ones_like(labels))
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)
