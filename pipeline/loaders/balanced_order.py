"""The order of `sampler balanced`: every class equally often in an epoch, a pure function of (seed, epoch) and the labels."""

import numpy as np

from pipeline.common.randomness import permutation

WITHIN_CLASS, AMONG_CLASSES = 7, 8  # the purpose in the address of a draw


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many places as the split has samples, each class with samples in an equal part of them; int64 [N].

    labels: int64 [N]. A class goes through its samples in a new order each time, and continues in the next epoch where this one
    stopped, so over a run the samples of a class are drawn equally often, up to one. A value of N or more is a repetition: value
    % N is the row, and value // N how often it came before in this epoch, so that augmentation draws differently for each.
    """
    num_samples = len(labels)
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    ends = np.cumsum(counts)
    classes = np.flatnonzero(counts)
    drawn = []
    for place, number in enumerate(classes.tolist()):
        own = by_class[ends[number] - counts[number] : ends[number]]
        # over the classes, these parts add up to num_samples in every epoch (Hermite's identity)
        first, stop = ((e * num_samples + place) // len(classes) for e in (epoch, epoch + 1))
        passes = range(first // len(own), -(-stop // len(own)))
        rows = [own[permutation(len(own), seed, WITHIN_CLASS, number, each)] for each in passes]
        skipped = first - passes.start * len(own)
        drawn.append(np.concatenate([own[:0], *rows])[skipped : skipped + stop - first])
    order = np.concatenate(drawn)[permutation(num_samples, seed, epoch, AMONG_CLASSES)]
    return order + num_samples * earlier_occurrences(order)


def earlier_occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value of an array occurs before its place; int64 [N]."""
    by_value = np.argsort(values, kind="stable")
    is_first = np.ones(len(values), bool)
    is_first[1:] = np.diff(values[by_value]) != 0
    places = np.arange(len(values))
    occurrences = np.empty_like(places)
    occurrences[by_value] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return occurrences
