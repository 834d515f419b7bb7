"""Indexes shards: a folder or a Hub id becomes streamed splits. Reads labels and the places of images, but no image."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.hub import (
    files_of_no_split,
    find_image_column,
    folder_builder,
    is_table_folder,
    load_errors,
    unused_note,
)
from pipeline.data.image_folder import read_image_folder
from pipeline.data.known_datasets import DatasetRow
from pipeline.data.label_columns import (
    ONE_LABEL,
    PREFERRED_LABELS,
    find_label_column,
    is_unlabelled,
    label_classes,
    label_ids,
)
from pipeline.data.shards import (
    ARROW_FILE_MAGIC,
    CHUNK_NAMES,
    LostShard,
    Shards,
    StreamedSplit,
    open_binary,
    parquet_footer,
    read_shard,
)
from pipeline.data.splits import Reading, Split, find_splits
from pipeline.images.files import EXTENSIONS

THREADS = 16  # files that are indexed concurrently
TAR_PART_SAMPLES, TAR_PART_BYTES = 256, 32 * 2**20  # limits of a part of a tar file, which is read at once


@dataclass
class Index:
    """The index of a split: the places of its chunks, and its labels as a datasets.Dataset of one column."""

    shards: Shards
    labels: Any
    column: str


def stream_hub_set(hub_id: str, config: str | None, row: DatasetRow | None, label_column: str | None) -> Reading:
    """Like hub.read_hub_set, but downloads only labels and indexes. Raises ValueError likewise."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(hub_id, config)
    except load_errors() as error:
        raise ValueError(
            f"Could not find the Hub set {hub_id!r}: {str(error).rstrip('.')}. Check the name (there is no folder "
            f"{os.path.abspath(hub_id)} either); --dataset names another."
        ) from error
    return _stream_files(builder, f"The Hub set {hub_id}", row, label_column)


def stream_folder(folder: Path, label_column: str | None) -> Reading:
    """The splits of a folder of Parquet, Arrow or tar files, of save_to_disk, or of class folders. Raises ValueError likewise."""
    path = os.path.abspath(folder)
    if (Path(path) / "dataset_dict.json").exists():
        names = json.loads((Path(path) / "dataset_dict.json").read_text())["splits"]
        files = {name: sorted(map(str, (Path(path) / name).glob("*.arrow"))) for name in names}
        return _to_splits("arrow", files, None, f"The folder {path}", None, label_column)
    if not is_table_folder(folder) and not is_tar_folder(folder):
        splits, class_names, notes = read_image_folder(folder, label_column)
        streamed = {name: _stream_paths(split) for name, split in splits.items()}
        return {**streamed}, class_names, [*notes, _stream_note(streamed)]
    try:
        builder = folder_builder(path)
    except load_errors() as error:
        raise ValueError(f"Could not read the files in {path}: {str(error).rstrip('.')}.") from error
    splits, class_names, notes = _stream_files(builder, f"The folder {path}", None, label_column)
    return splits, class_names, [*notes, *files_of_no_split(builder, folder)]


def stream_parquet_files(files: dict[str, str], row: DatasetRow) -> Reading:
    """The splits of a known dataset in local Parquet files."""
    return _to_splits("parquet", {name: [file] for name, file in files.items()}, None, "The embedded set", row, None)


def is_tar_folder(folder: Path) -> bool:
    """Whether the folder, or a folder one level below, contains tar files."""
    return any(next(folder.glob(pattern), None) is not None for pattern in ("*.tar", "*/*.tar"))


def _stream_files(builder: Any, source: str, row: DatasetRow | None, label_column: str | None) -> Reading:
    names = {kind.__name__ for kind in type(builder).__mro__} & BUILDERS.keys()
    if not names:
        raise ValueError(
            f"{source} is read by {type(builder).__mro__[1].__name__}, which cannot be streamed. Only Parquet, Arrow and tar "
            "(webdataset) files and class folders can be streamed. Use --loader workers or auto."
        )
    files = {str(name): list(map(str, paths)) for name, paths in builder.config.data_files.items()}
    return _to_splits(BUILDERS[names.pop()], files, builder.info.features, source, row, label_column)


def _to_splits(
    kind: str, files: dict[str, list[str]], features: Any, source: str, row: DatasetRow | None, label_column: str | None
) -> Reading:
    """The splits (train, val, test), the class names and notes. Raises ValueError for unreadable or inconsistent files."""
    names = list(files)
    found = row.splits if row else {"train": names[0]} if len(names) == 1 else find_splits(names, source)
    found = {ours: theirs for ours, theirs in found.items() if theirs in names}
    if not found:
        raise ValueError(f"{source} has no split that is train, val or test. Its splits: {', '.join(names)}.")
    indexes = {}
    for ours, theirs in found.items():
        try:
            indexes[ours] = INDEXERS[kind](files[theirs], features, label_column, source)
        except LostShard as error:
            raise ValueError(str(error)) from error
    train = next(iter(indexes.values()))
    known = row.label_columns.get(train.column) if row else None
    classes, class_names = label_classes(train.labels, train.column, known)
    splits: dict[str, StreamedSplit] = {}
    notes = unused_note(names, found, row)
    for ours, theirs in found.items():
        index = indexes[ours]
        if (index.column, index.labels.features) != (train.column, train.labels.features):
            raise ValueError(f"{source}: column {train.column} differs between {next(iter(found.values()))} and {theirs}.")
        if is_unlabelled(index.labels, index.column):
            if ours == "train":
                raise ValueError(f"{source}: column {index.column} of {theirs} has no labels, only null, NaN or -1.")
            notes.append(f"The split {theirs} has no labels and is not used.")
            continue
        ids = label_ids(index.labels, index.column, classes, f"{theirs} of {source[0].lower()}{source[1:]}")
        splits[ours] = StreamedSplit(ours, index.shards, ids, None, theirs)
    return {**splits}, class_names, [*notes, _stream_note(splits)]


def _stream_note(splits: dict[str, StreamedSplit]) -> str:
    """The number of chunks and files of each split, for the user."""
    parts = [
        f"{name} {len(split.shards.part):,} {CHUNK_NAMES[split.shards.kind]} in {len(split.shards.files):,} files"
        for name, split in splits.items()
    ]
    return f"Streamed: {', '.join(parts)}."


def _labels_of(values: Any, column: str, feature: Any) -> Any:
    """A datasets.Dataset of the labels only."""
    import datasets
    import pyarrow as pa

    features = datasets.Features({column: feature})
    return datasets.Dataset(
        datasets.table.InMemoryTable(pa.table({column: values})), datasets.DatasetInfo(features=features)
    )


def _index_parquet(files: list[str], features: Any, label_column: str | None, source: str) -> Index:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ThreadPoolExecutor(THREADS) as pool:
        footers = list(pool.map(lambda path: read_shard(path, lambda: parquet_footer(path)), files))
        features = features or datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
        images = find_image_column(features, source)
        column = find_label_column(features, source, label_column)

        def labels(path: str, footer: Any) -> Any:
            with open_binary(path) as file:
                return pq.ParquetFile(file, metadata=footer).read([column], use_threads=False).column(0)

        values = list(pool.map(lambda path, footer: read_shard(path, lambda: labels(path, footer)), files, footers))
    groups = [(footer.num_row_groups, number) for number, footer in enumerate(footers)]
    file_of = [number for count, number in groups for _ in range(count)]
    part = [group for count, _ in groups for group in range(count)]
    sizes = [footers[number].row_group(group).num_rows for number, group in zip(file_of, part)]
    shards = _shards("parquet", files, file_of, part, sizes, images)
    chunks = [chunk for value in values for chunk in value.chunks]
    return Index(shards, _labels_of(pa.chunked_array(chunks, values[0].type), column, features[column]), column)


def _shards(kind: str, files: list[str], file_of: Any, part: Any, sizes: Any, column: str = "", **more: Any) -> Shards:
    """The Shards of chunks with these sizes, without empty chunks."""
    file_of, part, sizes = (np.asarray(values, np.int64) for values in (file_of, part, sizes))
    used = sizes > 0
    starts = np.concatenate([[0], np.cumsum(sizes[used])])
    return Shards(kind, files, file_of[used], part[used], starts, column, **more)


def _index_arrow(files: list[str], features: Any, label_column: str | None, source: str) -> Index:
    import datasets
    import pyarrow as pa

    schema = read_shard(files[0], lambda: _arrow_schema(files[0]))
    features = features or datasets.Features.from_arrow_schema(schema)
    images, column = find_image_column(features, source), find_label_column(features, source, label_column)
    kind = schema.field(column).type

    def places_and_labels(path: str) -> list[tuple[int, Any]]:
        with pa.memory_map(path) if "://" not in path else open_binary(path) as file:
            # copies: views would keep the file mapped
            batches = _arrow_batches(file)
            return [(place, pa.array(batch.column(column).to_pylist(), kind)) for place, batch in batches]

    found = [read_shard(path, lambda: places_and_labels(path)) for path in files]
    file_of = [number for number, batches in enumerate(found) for _ in batches]
    part = [place for batches in found for place, _ in batches]
    values = [labels for batches in found for _, labels in batches]
    shards = _shards("arrow", files, file_of, part, list(map(len, values)), images)
    return Index(shards, _labels_of(pa.chunked_array(values, kind), column, features[column]), column)


def _arrow_schema(path: str) -> Any:
    import pyarrow as pa

    with open_binary(path) as file:
        if file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            return pa.ipc.open_file(file).schema
        file.seek(0)
        return pa.ipc.read_schema(file)


def _arrow_batches(file: Any) -> Iterator[tuple[int, Any]]:
    """The record batches, each with its number (file format) or byte offset (stream format)."""
    import pyarrow as pa

    if file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        yield from ((number, reader.get_batch(number)) for number in range(reader.num_record_batches))
        return
    file.seek(0)
    schema = pa.ipc.read_schema(file)
    while True:
        place = file.tell()
        try:
            message = pa.ipc.read_message(file)
        except EOFError:
            return
        yield place, pa.ipc.read_record_batch(message, schema)


TAR_LAYOUT = (
    "Expected: NAME.jpg (or another image ending) and NAME.cls, or NAME.json with a label, one after the other."
)


def _index_tar(files: list[str], features: Any, label_column: str | None, source: str) -> Index:
    import datasets
    import pyarrow as pa

    names = [label_column] if label_column else list(PREFERRED_LABELS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda path: read_shard(path, lambda: _tar_members(path, names)), files))
    spans: list[tuple[int, int]] = []
    labels: list[int | str] = []
    sizes: list[int] = []
    file_of: list[int] = []
    for number, (images, label_of) in enumerate(found):
        without = sorted(images.keys() - label_of.keys())
        listed = next((key for key, label in label_of.items() if isinstance(label, (list, dict))), None)
        if listed is not None:
            raise ValueError(f"{files[number]}: the label of {listed} is a list or an object. {ONE_LABEL}")
        if without:
            raise ValueError(f"{files[number]}: {without[0]} has no label ({len(without)} such images). {TAR_LAYOUT}")
        spans += images.values()
        labels += [label_of[key] for key in images]
        parts = _tar_parts(list(images.values()))
        sizes += parts
        file_of += [number] * len(parts)
    if not labels:
        raise ValueError(f"{source} has no images in its tar files. {TAR_LAYOUT}")
    values = pa.chunked_array(
        [pa.array(map(str, labels) if any(isinstance(label, str) for label in labels) else labels)]
    )
    shards = _shards("tar", files, file_of, np.zeros(len(sizes)), sizes, spans=np.array(spans, np.int64))
    column = label_column or "label"
    return Index(shards, _labels_of(values, column, datasets.Value(str(values.type))), column)


def _tar_members(path: str, names: list[str]) -> tuple[dict[str, tuple[int, int]], dict[str, int | str]]:
    """The images of a tar file (first byte and length; the bytes are not read) and its labels, both by sample.

    names: accepted names of a label, as a file ending besides .cls or as a key of the sample's JSON.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}
    with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # tarfile would keep all members in memory
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key, ending = f"{folder}/{stem}".lstrip("/"), ending.lower()
            if f".{ending}" in EXTENSIONS:
                images[key] = (member.offset_data, member.size)
            elif ending in ("cls", "json", *names):
                file.seek(member.offset_data)
                text = file.read(member.size).decode().strip()
                if ending != "json":
                    labels[key] = int(text) if text.lstrip("-").isdigit() else text
                else:
                    facts = json.loads(text)
                    labels |= {key: facts[name] for name in names[::-1] if name in facts}
    return images, labels


def _tar_parts(spans: list[tuple[int, int]]) -> list[int]:
    """The number of images in each part of a tar file; a part is read at once."""
    sizes, first = [], 0
    for number, (offset, size) in enumerate(spans):
        if number - first == TAR_PART_SAMPLES or offset + size - spans[first][0] > TAR_PART_BYTES and number > first:
            sizes.append(number - first)
            first = number
    return [*sizes, len(spans) - first] if spans else []


def _index_files(files: list[str], features: Any, label_column: str | None, source: str) -> Index:
    """Images in class folders, one per chunk; the folder name is the label."""
    import datasets
    import pyarrow as pa

    other = [path for path in files if not path.lower().endswith(EXTENSIONS)]
    if other:
        raise ValueError(
            f"{source} contains {other[0]}; only images in class folders can be streamed. Use --loader workers or auto."
        )
    labels = pa.chunked_array([pa.array([path.split("/")[-2] for path in files])])
    count = len(files)
    shards = _shards("files", files, np.arange(count), np.zeros(count), np.ones(count))
    return Index(shards, _labels_of(labels, "label", datasets.Value("string")), "label")


def _stream_paths(split: Split) -> StreamedSplit:
    """A streamed split of image files, one per chunk."""
    count = len(split)
    files = [split.where(row) for row in range(count)]
    shards = _shards("files", files, np.arange(count), np.zeros(count), np.ones(count))
    return StreamedSplit(split.name, shards, split.labels, None, split.origin)


BUILDERS = {"Parquet": "parquet", "Arrow": "arrow", "WebDataset": "tar", "ImageFolder": "files"}  # classes of datasets
INDEXERS = {"parquet": _index_parquet, "arrow": _index_arrow, "tar": _index_tar, "files": _index_files}
