"""Reads Hub datasets and folders of Parquet or Arrow files with Hugging Face `datasets`; the tables are memory-mapped."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import reading_cache
from pipeline.data.known_datasets import DatasetRow
from pipeline.data.splits import Reading, Split, file_state, find_splits

PREFERRED_IMAGES = ("image", "img")
PREFERRED_LABELS = ("label", "labels", "fine_label", "class", "target", "category")
HUB_SECONDS = 10.0  # timeout of a request
OUT_OF_REACH = "The Hub was not reached ({}). The last version that was read is used."
SAVED_MARKS = ("dataset_dict.json", "state.json")  # written by save_to_disk: of a DatasetDict, of a Dataset


def read_hub_set(
    hub_id: str, config: str | None, row: DatasetRow | None, label_column: str | None
) -> Reading:
    """The splits (train, val, test), the class names and notes for the user. Downloads the dataset once and caches it.

    Raises ValueError if the dataset cannot be loaded or has no usable image and label columns.
    """
    request = ["hub", hub_id, config, label_column, repr(row)]
    commit, failure = commit_on_hub(hub_id)
    known = reading_cache.load(request, commit) if commit or failure else None
    if known is not None:
        splits, class_names, notes = known
        return splits, class_names, [*notes, OUT_OF_REACH.format(failure)] if failure else notes
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, config)
    except load_errors() as error:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = str(error).rstrip(".")
        raise ValueError(
            f"Could not load the Hub set {hub_id!r} from {endpoint}: {reason}. Check the name (no folder has that "
            "name either). --hub_config picks one of several configs; a private or gated set needs HF_TOKEN; "
            "HF_ENDPOINT names another Hub; without a network only a cached set (HF_HOME) can be used."
        ) from error
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
    reading = _to_splits(loaded, f"The Hub set {hub_id}", row, label_column, caches)
    if commit and all(commit in file["filename"] for split in loaded.values() for file in split.cache_files):
        reading_cache.store(request, commit, reading)
    return reading


def commit_on_hub(hub_id: str) -> tuple[str | None, str]:
    """The newest commit of the dataset, or None; and why the Hub could not be reached, empty if it answered."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(hub_id, timeout=HUB_SECONDS).sha, ""
    except HfHubHTTPError:  # the Hub answered with an error; `datasets` raises it with a better message
        return None, ""
    except Exception as error:  # the type depends on the HTTP client of huggingface_hub
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        return None, reason or type(error).__name__


def load_errors() -> tuple[type[Exception], ...]:
    """The exceptions that `datasets` raises if a dataset cannot be found or read."""
    import datasets

    return (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def is_table_folder(folder: Path) -> bool:
    """Whether the folder, or a folder one level below, contains Parquet or Arrow files."""
    patterns = ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def read_table_folder(folder: Path, label_column: str | None) -> Reading:
    """Like read_hub_set, for a folder of Parquet or Arrow files or the output of `save_to_disk`.

    The output of save_to_disk is memory-mapped in place. Of other files, `datasets` keeps an Arrow copy in its cache.
    """
    path = os.path.abspath(folder)
    request = ["folder", path, label_column]
    state = sorted(file_state(os.path.join(parent, name)) for parent, _, names in os.walk(path) for name in names)
    known = reading_cache.load(request, state)
    if known is not None:
        return known
    import datasets

    saved = any((folder / mark).exists() for mark in SAVED_MARKS)
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except load_errors() as error:
        raise ValueError(f"Could not read the Parquet or Arrow files in {path}: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    reading = _to_splits(loaded, f"The folder {path}", None, label_column, (path,))
    reading_cache.store(request, state, reading)
    return reading


def find_image_column(features: Any, source: str) -> str:
    """The image column: the one of type Image, else struct<bytes, path> or binary. Raises ValueError if none or several fit."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if _holds_encoded_images(feature)]
    preferred = [name for name in PREFERRED_IMAGES if name in images]
    if len(images) == 1 or preferred:
        return (preferred or images)[0]
    found = f"several image columns ({', '.join(images)})" if images else "no image column"
    raise ValueError(
        f"{source} has {found}. Its columns: {_describe(features)}. One column must hold images (type Image, binary, or "
        "a struct of bytes and path); if there are several, one must be named image."
    )


def find_label_column(features: Any, source: str, given: str | None) -> str:
    """The label column: `given` if not None, else the only one or the one of PREFERRED_LABELS.

    Candidates are the ClassLabel columns, or if there is none, the integer and string columns. Raises ValueError, with a list
    of the columns, if `given` is no such column, or if none or several are candidates.
    """
    import datasets

    class_labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    kinds = ("int", "uint", "string", "large_string")
    values = [name for name, feature in features.items() if _is_value(feature, kinds)]
    if given is not None:
        if given not in class_labels + values:
            raise ValueError(f"--label_column {given} is not a label column. {source} has: {_describe(features)}.")
        return given
    candidates = class_labels or values
    preferred = [name for name in PREFERRED_LABELS if name in candidates]
    if len(candidates) == 1 or preferred:
        return (preferred or candidates)[0]
    found = f"several columns that may be the label ({', '.join(candidates)})" if candidates else "no label column"
    raise ValueError(f"{source} has {found}. Its columns: {_describe(features)}. Name one with --label_column.")


def _to_splits(
    loaded: Any, source: str, row: DatasetRow | None, label_column: str | None, roots: tuple[str, ...]
) -> Reading:
    import datasets

    names = list(loaded)
    found = row.splits if row else {"train": names[0]} if len(names) == 1 else find_splits(names, source)
    found = {ours: theirs for ours, theirs in found.items() if theirs in names}
    if "train" not in found:
        raise ValueError(f"{source} has no training split. Its splits: {', '.join(names)}.")
    features = loaded[found["train"]].features
    image_column = find_image_column(features, source)
    label_column = find_label_column(features, source, label_column)
    known = row.label_columns.get(label_column) if row else None
    classes, class_names = label_classes(loaded[found["train"]], label_column, known)
    splits, notes = {}, []
    for ours, theirs in found.items():
        dataset = loaded[theirs]
        if dataset.features.get(label_column) != features[label_column]:
            raise ValueError(f"{source}: column {label_column} differs between {found['train']} and {theirs}.")
        if is_unlabelled(dataset, label_column):
            if ours == "train":
                raise ValueError(f"{source}: column {label_column} of {theirs} holds no label, only -1 or null.")
            notes.append(f"The split {theirs} has no labels and is not used.")
            continue
        if not isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        where = f"{theirs} of {source[0].lower()}{source[1:]}"
        check_paths(dataset.data.column(image_column), roots, where)
        labels = label_ids(dataset, label_column, classes, where)
        splits[ours] = Split(ours, dataset.data, image_column, labels, origin=theirs)
    return splits, class_names, notes


def check_paths(images: Any, roots: tuple[str, ...], where: str) -> None:
    """Raises ValueError if an image is stored as the path of a file outside the folders of the dataset."""
    import pyarrow.compute as pc

    named = images.filter(pc.is_null(pc.struct_field(images, "bytes")))
    for path in pc.struct_field(named, "path").drop_null().to_pylist():
        if not any(os.path.abspath(path).startswith(os.path.abspath(root) + os.sep) for root in roots):
            raise ValueError(
                f"{where[0].upper()}{where[1:]} names the image file {path!r}, which is outside {' and '.join(roots)}. "
                "Move it there, or write the images' bytes into the table."
            )


def label_classes(train: Any, column: str, known: tuple[str, ...] | None) -> tuple[list[Any], list[str]]:
    """The values of the column in the order of their label ids, and the class names.

    The names are those of a ClassLabel column or, for an integer column of a known dataset, those of DATASETS. Otherwise the
    classes are the sorted distinct values of the training split.
    """
    import pyarrow.compute as pc

    feature = train.features[column]
    names = getattr(feature, "names", None)
    if names is None and known is not None and _is_value(feature, ("int", "uint")):
        names = list(known)
    if names is not None:
        return list(range(len(names))), list(names)
    values = sorted(value for value in pc.unique(train.data.column(column)).to_pylist() if value is not None)
    if values and not isinstance(values[0], str):
        values = [value for value in values if value >= 0]  # label_ids rejects negative labels
    return values, [str(value) for value in values]


def is_unlabelled(dataset: Any, column: str) -> bool:
    import pyarrow.compute as pc

    return set(pc.unique(dataset.data.column(column)).to_pylist()) <= {-1, None} and len(dataset) > 0


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


def _is_value(feature: Any, kinds: tuple[str, ...]) -> bool:
    """Whether a feature is a plain column of one of the kinds, where int means int8 to int64."""
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in kinds and not hasattr(feature, "names")


def _holds_encoded_images(feature: Any) -> bool:
    return _is_value(feature, ("binary", "large_binary")) or isinstance(feature, dict) and "bytes" in feature


def _describe(features: Any) -> str:
    """The columns and their types, for error messages."""
    return ", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())
