"""What an inspection has found: the parts of the run, the examined images, duplicates and doubtful labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.image_dataset import ImageDataset
from pipeline.data.splits import Split
from pipeline.inspect.duplicates import Found, Pair, disagrees
from pipeline.inspect.examine import Examined, ImageFacts, splits_of
from pipeline.inspect.features import Contradiction
from pipeline.training.build import Parts

MOST_LISTED = 1000  # entries of a list of the JSON object, and unreadable images on the page


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows. doubtful: contradicted labels and leave-one-out accuracy, or why there are none."""

    parts: Parts
    examined: Examined
    duplicates: list[Found]
    doubtful: tuple[list[Contradiction], float] | str | None

    @property
    def dataset(self) -> ImageDataset:
        return self.parts.dataset

    @property
    def images(self) -> list[ImageFacts]:
        return self.examined.images

    @cached_property
    def splits(self) -> dict[str, Split]:
        return splits_of(self.dataset)

    @cached_property
    def counts(self) -> Mapping[str, np.ndarray]:
        """The images of each class by split, of the whole dataset; int64 [num_classes]."""
        number = len(self.dataset.class_names)
        return {name: np.bincount(split.labels, minlength=number) for name, split in self.splits.items()}

    @property
    def imbalance(self) -> float | None:
        """The largest class of the training split over the smallest; None if a class has no image."""
        train = self.counts["train"]
        return float(train.max() / train.min()) if train.min() else None

    @cached_property
    def pairs(self) -> dict[tuple[str, tuple[str, str]], list[Pair]]:
        """The pairs by kind and splits: those with different labels first, then by similarity."""
        found: dict[tuple[str, tuple[str, str]], list[Pair]] = {}
        for kind in self.duplicates:
            for pair in kind.pairs:
                splits = self.images[pair.first].split, self.images[pair.second].split
                found.setdefault((kind.kind, splits), []).append(pair)
        for pairs in found.values():
            pairs.sort(key=lambda pair: (not disagrees(pair, self.images), -pair.similarity))
        return found

    def pairs_between(self, kind: Found, splits: tuple[str, str]) -> list[Pair]:
        return self.pairs.get((kind.kind, splits), [])

    def class_name(self, label: int) -> str:
        return self.dataset.class_names[label]
