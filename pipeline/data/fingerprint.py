"""The fingerprint of a dataset: class names, counts, and hashes of the names and sizes of the images in each split."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.image_dataset import ImageDataset
from pipeline.data.known_datasets import DATASETS
from pipeline.data.shards import StreamedSplit
from pipeline.data.splits import Split
from pipeline.settings.config import Config

MOST_CLASSES = 1000  # a dataset with more has no counts and hashes per class, which only serve messages
CHUNK = 512  # files whose size one thread reads in one go
COMMIT = re.compile(r"[/@]([0-9a-f]{40})(?=/)")  # in the names of files that come from the Hub


def dataset_folder(name: str) -> str | None:
    """The absolute path of the folder that a dataset name stands for; None for a known dataset or a Hub id."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name and name not in DATASETS and path.is_dir() else None


def with_absolute_paths(config: Config) -> Config:
    """The settings with absolute paths of the dataset's folder and of init_from, so that they hold from any folder."""
    init_from = config.init_from
    if init_from is not None and Path(init_from).expanduser().exists():
        init_from = os.path.abspath(Path(init_from).expanduser())
    return replace(config, dataset=dataset_folder(config.dataset) or config.dataset, init_from=init_from)


def fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """What identifies the images of a dataset, wherever they are, as JSON values; no image is read.

    path: the folder, null for other datasets. commit: that of a Hub dataset. splits: of each the number of images, a hash of
    the labels, and `images`, a hash of names and sizes: of files ("files", names below the folder), of rows of a table
    ("table"), or of places in shards ("shards"). Only hashes of the same kind can be compared.
    """
    root = dataset_folder(dataset.name)
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    num_classes = len(dataset.class_names)
    return {
        "path": root,
        "commit": commit_of(dataset.train) if dataset.source.startswith("Hub") else None,
        "class_names": dataset.class_names,
        "splits": {name: split_fingerprint(split, root, num_classes) for name, split in splits.items()},
    }


def split_fingerprint(split: Split, root: str | None, num_classes: int) -> dict[str, Any]:
    kind, lines = streamed_lines(split, root) if isinstance(split, StreamedSplit) else table_lines(split, root)
    whole, classes = hashlib.sha256(), [hashlib.sha256() for _ in range(num_classes)]
    for line, label in zip(lines, split.labels.tolist(), strict=True):
        whole.update(line)
        classes[label].update(line)
    found: dict[str, Any] = {
        "count": len(split),
        "labels": hashlib.sha256(split.labels.tobytes()).hexdigest(),
        "kind": kind,
        "images": whole.hexdigest(),
    }
    if num_classes <= MOST_CLASSES:
        found["class_counts"] = np.bincount(split.labels, minlength=num_classes).tolist()
        found["class_images"] = [digest.hexdigest()[:12] for digest in classes]
    return found


def table_lines(split: Split, root: str | None) -> tuple[str, Iterator[bytes]]:
    """The kind, and name and size of each image in order: of bytes in the table their length, of files that of the file."""
    import pyarrow.compute as pc

    data, path = split.image_fields()
    all_lengths, all_names = pc.binary_length(data).to_pylist(), path.to_pylist()  # to_numpy and take would import pandas
    lengths = [all_lengths[row] for row in split.table_rows.tolist()]
    names = [None if all_names[row] is None else os.fsdecode(all_names[row]) for row in split.table_rows.tolist()]
    files = [name for name, length in zip(names, lengths) if length is None and name is not None]
    sizes = iter(file_sizes(files))
    read = [next(sizes) if length is None and name is not None else length for name, length in zip(names, lengths)]
    return "files" if len(files) == len(names) else "table", as_lines(names, read, root)


def streamed_lines(split: StreamedSplit, root: str | None) -> tuple[str, Iterator[bytes]]:
    """As table_lines; of shards the file, the place within it and, if the file is on this machine, its size."""
    shards, rows = split.shards, split.table_rows
    chunks = np.searchsorted(shards.starts, rows, side="right") - 1
    files = shards.file_of[chunks].tolist()
    if shards.kind == "files":
        names = [shards.files[number] for number in files]
        return "files", as_lines(names, file_sizes(names), root)
    used = sorted(set(files))
    sizes = dict(zip(used, file_sizes([shards.files[number] for number in used])))
    places = (rows - shards.starts[chunks]).tolist() if shards.spans is None else shards.spans[rows].tolist()
    names = [f"{COMMIT.sub('', shards.files[number])}" for number in files]
    facts = [(sizes[number], part, place) for number, part, place in zip(files, shards.part[chunks].tolist(), places)]
    return "shards", as_lines(names, facts, root)


def as_lines(names: Sequence[str | None], sizes: Sequence[Any], root: str | None) -> Iterator[bytes]:
    """Names below the root, or without their folders: the same wherever the dataset is."""
    start = None if root is None else root + os.sep
    for name, size in zip(names, sizes, strict=True):
        name = name or ""
        short = name.removeprefix(start) if start and name.startswith(start) else os.path.basename(name)
        yield f"{short}\0{size}\n".encode(errors="surrogateescape")


def file_sizes(paths: Sequence[str]) -> list[int | None]:
    """The size of each file in bytes; None for a file that is missing or not on this machine."""

    def sizes(start: int) -> list[int | None]:
        return [file_size(path) for path in paths[start : start + CHUNK]]

    with ThreadPoolExecutor() as pool:
        return [size for part in pool.map(sizes, range(0, len(paths), CHUNK)) for size in part]


def file_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def commit_of(split: Split) -> str | None:
    """The commit in the file names of a split that comes from the Hub; None if they do not contain one."""
    if isinstance(split, StreamedSplit):
        paths = split.shards.files
    elif hasattr(split.table, "paths"):
        paths = split.table.paths
    else:
        from datasets.table import list_table_cache_files

        paths = list_table_cache_files(split.table)
    found = [match[1] for path in paths for match in [COMMIT.search(path)] if match]
    return found[0] if found else None
