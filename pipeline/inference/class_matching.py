"""Matching the classes of a dataset with those of a model: by name, or by number if no name matches."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from pipeline.data.splits import Split
from pipeline.images.files import first_of
from pipeline.inference.saved_model import SavedModel


@dataclasses.dataclass(frozen=True)
class ClassMatch:
    """The scored classes of a dataset, and the class of the model for each.

    order: the model's classes as the logits are arranged, a permutation of all; names: of these classes; numbers: for each class
    of the dataset its place in order, -1 if the model lacks it; by: name or number.
    """

    order: list[int]
    names: list[str]
    numbers: list[int]
    by: str
    not_in_model: list[str]
    not_in_dataset: list[str]

    @property
    def is_identity(self) -> bool:
        return self.order == list(range(len(self.order))) == self.numbers

    def scored(self, split: Split) -> Split:
        """The rows of the classes that the model has, with labels as places in order. Raises ValueError if there are none."""
        if self.is_identity:
            return split
        labels = np.array(self.numbers, np.int64)[split.labels]
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise ValueError(f"No image belongs to a class of the model. The model lacks {first_of(self.not_in_model)}.")
        return split.select(rows).with_labels(labels[rows])

    def warnings(self, saved: SavedModel, dataset: str) -> list[str]:
        """The warnings to print with the figures."""
        warnings = []
        if self.by == "number":
            pairs = zip(saved.shown_names, self.names)
            number, (ours, theirs) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
            warnings.append(
                f"No class of {dataset} has the name of a class of {saved.source} (class {number} is {theirs!r} and {ours!r}): "
                "they are matched by number."
            )
        if self.not_in_model:
            warnings.append(f"Not scored, because the model lacks these classes: {first_of(self.not_in_model)}.")
        if self.not_in_dataset:
            warnings.append(f"Classes of the model that are not in {dataset}: {first_of(self.not_in_dataset)}.")
        return warnings

    def facts(self, num_left_out: int) -> dict[str, Any]:
        """The keys of an evaluation's result. num_left_out: images of classes that the model lacks."""
        return {
            "matched_by": self.by,
            "not_in_model": self.not_in_model,
            "not_in_dataset": self.not_in_dataset,
            "images_left_out": num_left_out,
        }


def match_classes(saved: SavedModel, theirs: list[str], dataset: str) -> ClassMatch:
    """Matches names as they are, then in Unicode's normal form NFC, then ignoring case.

    The names of the model are its label names or their descriptions, whichever match more. If no name matches and the numbers
    of classes agree, classes are matched by number. Raises ValueError if they do not agree.
    """
    candidates = [saved.label_names or [], saved.shown_names]
    pairs = max((pairs_by_name(ours, theirs) for ours in candidates), key=len)
    by = "name" if pairs else "number"
    if not pairs:
        if saved.num_classes != len(theirs):
            raise ValueError(
                f"{saved.source} predicts {saved.num_classes} classes, but {dataset} has {len(theirs)} ({first_of(theirs)}), and "
                "no name is the same. Choose a dataset or a model with the same classes."
            )
        pairs = {number: number for number in range(len(theirs))}
    matched = [pairs[number] for number in range(len(theirs)) if number in pairs]
    places = {number: place for place, number in enumerate(matched)}
    rest = [number for number in range(saved.num_classes) if number not in places]
    unmatched = [saved.shown_names[number] for number in rest]
    return ClassMatch(
        order=[*matched, *rest],
        names=[theirs[number] for number in range(len(theirs)) if number in pairs] + unmatched,
        numbers=[places[pairs[number]] if number in pairs else -1 for number in range(len(theirs))],
        by=by,
        not_in_model=[name for number, name in enumerate(theirs) if number not in pairs],
        not_in_dataset=unmatched,
    )


def pairs_by_name(ours: list[str], theirs: list[str]) -> dict[int, int]:
    """Maps each class of the dataset to the number of the model's class of the same name, each used once."""
    pairs: dict[int, int] = {}
    used: set[int] = set()
    for form in (str, normalized, ignoring_case):
        free = [number for number in range(len(ours)) if number not in used]
        counts = Counter(form(ours[number]) for number in free)
        numbers = {form(ours[number]): number for number in free}
        for number, name in enumerate(theirs):
            key = form(name)
            if number not in pairs and counts[key] == 1 and numbers[key] not in used:
                pairs[number] = numbers[key]
                used.add(numbers[key])
    return pairs


def ignoring_case(name: str) -> str:
    return normalized(normalized(name).casefold())


def normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)
