"""Label columns of tables: finds the column, its classes and the label ids."""

from __future__ import annotations

from typing import Any

import numpy as np

PREFERRED_LABELS = ("label", "labels", "fine_label", "class", "target", "category")
TEXT_OR_WHOLE = ("bool", "int", "uint", "string", "large_string")  # types of labels; int means int8 to int64
FRACTIONS = ("float", "double")
ONE_LABEL = "Labels are one value for each image: ClassLabel, bool, whole numbers or text; lists (multi-label) are not supported."


def find_label_column(features: Any, source: str, given: str | None) -> str:
    """The label column: `given` if not None, else the only one or the one of PREFERRED_LABELS.

    Candidates are the ClassLabel columns, or if there is none, the bool, integer and string columns and float columns of
    PREFERRED_LABELS, or if there is none, all float columns. Raises ValueError, with a list of the columns, if `given` is no
    such column, or if none or several are candidates.
    """
    import datasets

    class_labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if is_value(feature, TEXT_OR_WHOLE) and not name.startswith("__")]
    floats = [name for name, feature in features.items() if is_value(feature, FRACTIONS)]
    if given is not None:
        if given not in features:
            raise ValueError(f"{source} has no column {given!r} for --label_column. Its columns: {describe(features)}.")
        if given not in class_labels + values + floats:
            raise ValueError(f"--label_column {given} cannot be the label. {ONE_LABEL} {source} has: {describe(features)}.")
        return given
    candidates = class_labels or [*values, *(name for name in floats if name in PREFERRED_LABELS)] or floats
    preferred = [name for name in PREFERRED_LABELS if name in candidates]
    if len(candidates) == 1 or preferred:
        return (preferred or candidates)[0]
    if not candidates:
        raise ValueError(f"{source} has no label column. {ONE_LABEL} Its columns: {describe(features)}.")
    raise ValueError(
        f"{source} has several columns that may be the label ({', '.join(candidates)}). Its columns: {describe(features)}. "
        "Name one with --label_column."
    )


def label_classes(train: Any, column: str, known: tuple[str, ...] | None) -> tuple[list[Any], list[str]]:
    """The values of the column in the order of their label ids, and the class names.

    The names are those of a ClassLabel column or, for an integer column of a known dataset, those of DATASETS. Otherwise the
    classes are the sorted distinct values of the training split. Raises ValueError if these are fractions, or another value
    for each image.
    """
    import pyarrow.compute as pc

    feature = train.features[column]
    names = getattr(feature, "names", None)
    if names is None and known is not None and is_value(feature, ("int", "uint")):
        names = list(known)
    if names is not None:
        return list(range(len(names))), list(names)
    # NaN, the missing value of pandas, is the only value that differs from itself
    values = sorted(value for value in pc.unique(train.data.column(column)).to_pylist() if value is not None and value == value)
    if len(values) == len(train) > 2:
        raise ValueError(
            f"Column {column} has a different value for each of {len(train):,} images ({values[0]!r}, {values[1]!r}, ...), so "
            "it cannot be the label. Choose another column with --label_column."
        )
    if values and not isinstance(values[0], str):
        values = [value for value in values if value >= 0]  # label_ids rejects negative labels
    fraction = next((value for value in values if isinstance(value, float) and not value.is_integer()), None)
    if fraction is not None:
        raise ValueError(f"Column {column} has fractions such as {fraction}, so it cannot be the label. {ONE_LABEL}")
    return values, [str(int(value) if isinstance(value, float) else value) for value in values]


def is_unlabelled(dataset: Any, column: str) -> bool:
    """Whether all labels of a split are missing: null, NaN or -1."""
    import pyarrow.compute as pc

    values = pc.unique(dataset.data.column(column)).to_pylist()
    return len(dataset) > 0 and all(value is None or value == -1 or value != value for value in values)


def label_ids(dataset: Any, column: str, classes: list[Any], where: str) -> np.ndarray:
    """Label ids, int64 [N]. Raises ValueError, with the first such row, if a label is missing or not a class."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = dataset.data.column(column)
    ids = pc.fill_null(pc.index_in(values, value_set=pa.array(classes, values.type)), -1).to_numpy()
    wrong = np.flatnonzero(ids < 0)
    if len(wrong):
        row = int(wrong[0])
        expected = f"0..{len(classes) - 1}" if classes == list(range(len(classes))) else f"one of {classes[:20]}"
        raise ValueError(
            f"Row {row} of {where} has {column} {values[row].as_py()!r}, expected {expected} "
            f"({len(wrong)} such rows). Repair or remove these rows, or name another column with --label_column."
        )
    return ids.astype(np.int64)


def is_value(feature: Any, kinds: tuple[str, ...]) -> bool:
    """Whether a feature is a plain column of one of the kinds, where int means int8 to int64."""
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in kinds and not hasattr(feature, "names")


def describe(features: Any) -> str:
    """The columns and their types, for error messages."""
    return ", ".join(f"{name} ({type_name(kind)})" for name, kind in features.items())


def type_name(feature: Any) -> str:
    if isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return "list, multi-label"
    return str(getattr(feature, "dtype", type(feature).__name__))
