"""Metrics: sums and counts added up on the device and divided once at the end."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.settings.batch_size import IGNORED
from pipeline.training.losses import probabilities

LOSS, CORRECT, TOP5, COUNT = range(4)

LARGEST_CONFUSION = 2000  # classes up to which the confusion matrix is counted

UNEVEN = 2  # classes whose samples differ by more than this factor are uneven

NUM_BINS = 15  # of calibration, as in arXiv 1706.04599


def zero_sums(device: torch.device) -> Tensor:
    """Sums of loss, top-1 correct, top-5 correct, and samples; float64 [4] (float32 on devices without float64)."""
    return torch.zeros(4, dtype=sum_dtype(device), device=device)


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def add_batch(sums: Tensor, logits: Tensor, labels: Tensor, loss_sum: Tensor) -> None:
    """Adds a batch to the sums in place, without waiting for the device.

    logits: float [B, num_classes]; labels: int64 [B]; loss_sum: float [], the samples' losses added up.
    """
    correct = predicted_classes(logits) == labels
    counts = [which.sum(dtype=sums.dtype) for which in (correct, correct | in_top5(logits, labels), labels != IGNORED)]
    sums += torch.stack([loss_sum.to(sums.dtype), *counts])


def predicted_classes(logits: Tensor) -> Tensor:
    """The class with the largest logit, the first of equal ones; int64 [B]. Accuracy and confusion matrix both use it."""
    return logits.argmax(dim=1)


def in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is among the five largest logits; of equal logits the first class ranks higher; bool [B]."""
    own = logits.gather(1, labels.clamp(min=0)[:, None])
    numbers = torch.arange(logits.shape[1], device=logits.device)
    behind = (logits < own) | (logits == own) & (numbers >= labels[:, None])
    return (logits.shape[1] - behind.sum(dim=1) < 5) & (labels != IGNORED)


def figures(sums: Tensor) -> dict[str, float | int]:
    """loss, accuracy and top5_accuracy (fractions) over num_samples; zeros without samples (every step was skipped)."""
    loss, correct, top5, num_samples = sums.tolist()
    count = num_samples or 1
    return {
        "loss": loss / count,
        "accuracy": correct / count,
        "top5_accuracy": top5 / count,
        "num_samples": int(num_samples),
    }


def zero_class_counts(num_classes: int, device: torch.device) -> Tensor:
    """Zeros for add_classes: a confusion matrix, int64 [num_classes, num_classes], or with more than LARGEST_CONFUSION classes
    the samples, the predictions and the correct ones of each class, int64 [num_classes, 3], because a matrix of 10,000 classes
    takes 0.8 GB.
    """
    columns = num_classes if num_classes <= LARGEST_CONFUSION else 3
    return torch.zeros(num_classes, columns, dtype=torch.int64, device=device)


def is_confusion(counts: Tensor) -> bool:
    """Whether the counts are a confusion matrix."""
    return counts.shape[0] == counts.shape[1]


@torch.no_grad()
def add_classes(counts: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Adds a batch in place to the counts of zero_class_counts, without waiting for the device.

    logits: float [B, num_classes]; labels: int64 [B]. A confusion matrix has true classes as rows.
    """
    predicted, ones = predicted_classes(logits), torch.ones_like(labels)
    if is_confusion(counts):
        counts.view(-1).index_add_(0, labels * len(counts) + predicted, ones)
    else:
        samples, predictions, correct = counts.T
        samples.index_add_(0, labels, ones)
        predictions.index_add_(0, predicted, ones)
        correct.index_add_(0, labels, (predicted == labels).to(labels))


def counts_by_class(counts: Tensor) -> list[tuple[int, int, int]]:
    """The samples, the predictions and the correct ones of each class."""
    columns = [counts.sum(dim=1), counts.sum(dim=0), counts.diagonal()] if is_confusion(counts) else list(counts.T)
    return [(samples, predictions, correct) for samples, predictions, correct in torch.stack(columns, dim=1).tolist()]


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def f1(samples: int, predictions: int, correct: int) -> float | None:
    """The harmonic mean of precision and recall; None for a class without samples and predictions."""
    return ratio(2 * correct, samples + predictions)


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are not None; 0 of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def balance_figures(counts: Tensor) -> dict[str, float]:
    """balanced_accuracy, the mean recall of the classes with samples, and macro_f1, the mean F1 of those with samples or
    predictions; as scikit-learn's balanced_accuracy_score and f1_score(average="macro").
    """
    classes = counts_by_class(counts)
    return {
        "balanced_accuracy": mean(ratio(correct, samples) for samples, _, correct in classes),
        "macro_f1": mean(f1(*each) for each in classes),
    }


def class_figures(counts: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """per_class_accuracy by name, None for a class without samples; per_class with precision, recall, F1 and samples; and
    confusion_matrix where it was counted.
    """
    classes = counts_by_class(counts)
    per_class = {
        name: {
            "precision": ratio(correct, predictions),
            "recall": ratio(correct, samples),
            "f1": f1(samples, predictions, correct),
            "num_samples": samples,
        }
        for name, (samples, predictions, correct) in zip(class_names, classes)
    }
    matrix = {"confusion_matrix": counts.tolist()} if is_confusion(counts) else {}
    return {
        "per_class_accuracy": {name: values["recall"] for name, values in per_class.items()},
        "per_class": per_class,
        **matrix,
    }


def uneven_sizes(per_class: Mapping[str, Mapping[str, Any]]) -> tuple[int, int] | None:
    """The samples of the smallest and of the largest class, if they differ by more than UNEVEN times; else None.

    per_class: of class_figures. Classes without samples are not counted.
    """
    sizes = [values["num_samples"] for values in per_class.values() if values["num_samples"]]
    return (min(sizes), max(sizes)) if sizes and max(sizes) > UNEVEN * min(sizes) else None


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve: how often a sample of class 1 has a larger score than one of class 0; ties count half.

    scores: float [N]; labels: 0 or 1, [N]. NaN without samples of both classes.
    """
    values, places = scores.unique(return_inverse=True)
    zeros, ones = (places[labels == number].bincount(minlength=len(values)) for number in (0, 1))
    twice = (ones * (2 * (zeros.cumsum(0) - zeros) + zeros)).sum().item()  # in whole numbers, hence exact
    pairs = zeros.sum().item() * ones.sum().item()
    return twice / (2 * pairs) if pairs else math.nan


def zero_calibration(device: torch.device) -> Tensor:
    """Per confidence bin the number of samples, of correct ones, and the sum of confidences; [3, NUM_BINS]."""
    return torch.zeros(3, NUM_BINS, dtype=sum_dtype(device), device=device)


@torch.no_grad()
def add_calibration(bins: Tensor, logits: Tensor, labels: Tensor, loss: str = "cross_entropy") -> None:
    """Adds a batch to the bins in place. Confidence is the largest probability; bin m counts those in (m/15, (m+1)/15]."""
    confidence, predicted = probabilities(logits.to(bins.dtype), loss).amax(dim=1), predicted_classes(logits)
    places = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    bins.index_add_(
        1, places, torch.stack([torch.ones_like(confidence), (predicted == labels).to(bins.dtype), confidence])
    )


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error (ECE) over 15 bins of equal width, https://arxiv.org/abs/1706.04599, equation 3.

    The mean of |accuracy - mean confidence| over the bins, weighted by their samples: a fraction, 0 without samples.
    """
    counts, correct, confidences = bins
    return float((correct - confidences).abs().sum() / counts.sum().clamp(min=1))
