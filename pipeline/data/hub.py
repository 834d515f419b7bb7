"""Reads Hub datasets and folders of Parquet or Arrow files with Hugging Face `datasets`; the tables are memory-mapped."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.data import reading_cache
from pipeline.data.known_datasets import DatasetRow
from pipeline.data.label_columns import describe, find_label_column, is_unlabelled, is_value, label_classes, label_ids
from pipeline.data.splits import Reading, Split, file_state, find_splits
from pipeline.images.files import first_of

PREFERRED_IMAGES = ("image", "img")
HUB_SECONDS = 10.0  # timeout of a request
OUT_OF_REACH = "The Hub was not reached ({}). The last version that was read is used."
TABLE_ENDINGS = (".parquet", ".arrow", ".tar")
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
            f"Could not load the Hub set {hub_id!r} from {endpoint}: {reason}. "
            f"Check the name (there is no folder {os.path.abspath(hub_id)} either); --dataset names another. "
            "--hub_config picks one of several configs; a private or gated set needs HF_TOKEN; "
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

    The output of save_to_disk is memory-mapped in place. Of other files, `datasets` keeps an Arrow copy in its cache. Raises
    ValueError if the files cannot be read or have no images and labels.
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
        unused = [] if saved else files_of_no_split(folder_builder(path), folder)
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, data_files=literal_files(path))
    except load_errors() as error:
        raise ValueError(f"Could not read the Parquet or Arrow files in {path}: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    splits, class_names, notes = _to_splits(loaded, f"The folder {path}", None, label_column, (path,))
    reading = splits, class_names, [*notes, *unused]
    reading_cache.store(request, state, reading)
    return reading


def folder_builder(path: str) -> Any:
    """The builder of `datasets` for a folder, given as an absolute path."""
    import datasets

    return datasets.load_dataset_builder(path, data_files=literal_files(path))


def literal_files(path: str) -> dict[str, list[str]] | None:
    """The files of each split, as patterns, for a path that `datasets` itself would read as a pattern (data[1]); else None.

    The splits are those that `datasets` finds, the files those of the most frequent ending that it can read.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    if not glob.has_magic(path):
        return None
    literal = glob.escape(path)
    files = DataFilesDict.from_patterns(get_data_patterns(literal), base_path=literal)
    endings = Counter(os.path.splitext(file)[1] for split in files.values() for file in split)
    ending = max(TABLE_ENDINGS, key=lambda ending: endings[ending])
    chosen = {name: [glob.escape(file) for file in split if file.endswith(ending)] for name, split in files.items()}
    return {name: split for name, split in chosen.items() if split}


def files_of_no_split(builder: Any, folder: Path) -> list[str]:
    """A note on the Parquet and Arrow files below the folder that `datasets` assigns to no split."""
    used = {os.path.realpath(path) for paths in builder.config.data_files.values() for path in paths}
    files = sorted(path for pattern in ("*.parquet", "*.arrow") for path in folder.rglob(pattern))
    unused = [str(path) for path in files if os.path.realpath(path) not in used]
    advice = "Name it after a split (train-2.parquet), or move it out of the folder"
    return [f"Not used, because they belong to no split: {first_of(unused)}. {advice}."] if unused else []


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
        f"{source} has {found}. Its columns: {describe(features)}. One column must hold images (type Image, binary, or "
        "a struct of bytes and path); if there are several, one must be named image."
    )


def _to_splits(
    loaded: Any, source: str, row: DatasetRow | None, label_column: str | None, roots: tuple[str, ...]
) -> Reading:
    import datasets

    names = list(loaded)
    found = row.splits if row else {"train": names[0]} if len(names) == 1 else find_splits(names, source)
    found = {ours: theirs for ours, theirs in found.items() if theirs in names}
    if not found:
        raise ValueError(f"{source} has no split that is train, val or test. Its splits: {', '.join(names)}.")
    first = loaded[next(iter(found.values()))]
    features = first.features
    image_column = find_image_column(features, source)
    label_column = find_label_column(features, source, label_column)
    known = row.label_columns.get(label_column) if row else None
    classes, class_names = label_classes(first, label_column, known)
    splits, notes = {}, unused_note(names, found, row)
    for ours, theirs in found.items():
        dataset = loaded[theirs]
        if dataset.features.get(label_column) != features[label_column]:
            raise ValueError(f"{source}: column {label_column} differs between {found[next(iter(found))]} and {theirs}.")
        if is_unlabelled(dataset, label_column):
            if ours == "train":
                raise ValueError(f"{source}: column {label_column} of {theirs} has no labels, only null, NaN or -1.")
            notes.append(f"The split {theirs} has no labels and is not used.")
            continue
        if not isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        where = f"{theirs} of {source[0].lower()}{source[1:]}"
        check_paths(dataset.data.column(image_column), roots, where)
        labels = label_ids(dataset, label_column, classes, where)
        splits[ours] = Split(ours, dataset.data, image_column, labels, origin=theirs)
    return splits, class_names, notes


def unused_note(names: list[str], found: dict[str, str], row: DatasetRow | None) -> list[str]:
    """A note on splits that are neither train, val nor test; none for a known dataset."""
    unused = [name for name in names if name not in found.values()]
    return [f"Not used, because they are neither train, val nor test: {', '.join(unused)}."] if unused and row is None else []


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


def _holds_encoded_images(feature: Any) -> bool:
    return is_value(feature, ("binary", "large_binary")) or isinstance(feature, dict) and "bytes" in feature
