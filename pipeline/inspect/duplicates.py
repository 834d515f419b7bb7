"""Duplicates within and across splits: exact copies by content, near-duplicates by perceptual hash or by features."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.inspect.examine import ImageFacts

# across train and test first, since these falsify the test accuracy
SPLIT_PAIRS = (("train", "test"), ("train", "val"), ("val", "test"), ("train", "train"), ("val", "val"), ("test", "test"))
FARTHEST = 6  # bits of 64 in which the hashes of near-duplicates may differ
LEAST_CORRELATION = 0.95  # of their thumbnails: equal hashes are frequent among plain images
LEAST_COSINE = 0.9  # of the features of near-duplicates
MOST_PAIRS = 100_000  # kept of near-duplicates, the first found
BLOCK = 1024  # images that are compared with all others at once

Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]  # places of the first and the second images, similarities


@dataclass(frozen=True)
class Pair:
    """Two images by their place among the examined ones, first < second. similarity: 1 of exact copies, else a correlation of
    thumbnails or a cosine of features."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class Found:
    """Pairs of one kind of duplicates. kind: in words; complete: whether all pairs are kept."""

    kind: str
    pairs: list[Pair]
    complete: bool = True


def exact_copies(images: Sequence[ImageFacts]) -> Found:
    """Each image with the first image of every split that has the same content and comes before it."""
    pairs = []
    first_of_split: dict[bytes, dict[str, int]] = {}  # by content
    for place, image in enumerate(images):
        earlier = first_of_split.setdefault(image.digest, {})
        pairs += [Pair(first, place, 1.0) for first in earlier.values()]
        earlier.setdefault(image.split, place)
    return Found("exact copies", pairs)


def near_duplicates(images: Sequence[ImageFacts]) -> Found:
    """Pairs of images whose perceptual hashes differ in at most FARTHEST bits and whose thumbnails correlate; no exact copies."""
    hashes = np.array([image.phash for image in images], np.uint64)
    thumbnails = standardised(np.array([image.thumbnail for image in images], np.float32).reshape(len(images), -1))

    def blocks() -> Iterator[Candidates]:
        for start in range(0, len(images), BLOCK):
            distances = np.bitwise_count(hashes[start : start + BLOCK, None] ^ hashes[None, start:])
            firsts, seconds = later_places(distances <= FARTHEST, start)
            for part in range(0, len(firsts), BLOCK):
                first, second = firsts[part : part + BLOCK], seconds[part : part + BLOCK]
                yield first, second, np.einsum("nd,nd->n", thumbnails[first], thumbnails[second])

    return kept("near-duplicates by hash", images, blocks(), LEAST_CORRELATION)


def similar_features(images: Sequence[ImageFacts], features: np.ndarray) -> Found:
    """Pairs of images whose features have a cosine of at least LEAST_COSINE; no exact copies. features: float32 [N, D]."""
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def blocks() -> Iterator[Candidates]:
        for start in range(0, len(images), BLOCK):
            cosines = units[start : start + BLOCK] @ units[start:].T
            firsts, seconds = later_places(cosines >= LEAST_COSINE, start)
            yield firsts, seconds, cosines[firsts - start, seconds - start]

    return kept("near-duplicates by features", images, blocks(), LEAST_COSINE)


def kept(kind: str, images: Sequence[ImageFacts], blocks: Iterable[Candidates], least: float) -> Found:
    """The candidates of at least this similarity that are no exact copies, up to MOST_PAIRS."""
    numbers: dict[bytes, int] = {}
    content = np.array([numbers.setdefault(image.digest, len(numbers)) for image in images])  # equal for exact copies
    pairs: list[Pair] = []
    for firsts, seconds, similarities in blocks:
        near = np.flatnonzero((similarities >= least) & (content[firsts] != content[seconds]))
        chosen = near[: MOST_PAIRS - len(pairs)]
        rows = zip(*(part[chosen].tolist() for part in (firsts, seconds, similarities)))
        pairs += [Pair(first, second, min(similarity, 1.0)) for first, second, similarity in rows]
        if len(pairs) == MOST_PAIRS:
            return Found(kind, pairs, complete=False)
    return Found(kind, pairs)


def later_places(is_pair: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the pairs, first < second; int64 [P] each. is_pair: bool [B, N - start], rows and columns from start."""
    firsts, seconds = np.nonzero(np.triu(is_pair, 1))
    return firsts + start, seconds + start


def standardised(values: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1, whose scalar products are correlations; 0 for a constant row, as of a blank image."""
    centred = values - values.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def disagrees(pair: Pair, images: Sequence[ImageFacts]) -> bool:
    """Whether the two images have different labels."""
    return images[pair.first].label != images[pair.second].label


def num_second(pairs: Sequence[Pair]) -> int:
    """The number of images that repeat an earlier one."""
    return len({pair.second for pair in pairs})
