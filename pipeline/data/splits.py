"""Splits of a dataset: encoded images and labels by row, and stratified selections of rows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.randomness import permutation
from pipeline.images.decode import BadImage

if TYPE_CHECKING:
    import pyarrow as pa

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing", "holdout"),
}
FILLERS = re.compile(r"(?:^(?:the|my|images?|imgs?|data)|(?:data|set|split|folder|images?|imgs?|photos?|pictures?|samples?)$)")
ACCEPTED_NAMES = (
    f"{'; '.join(', '.join(names) for names in SPLIT_NAMES.values())}; in any case, with or without set, data, images"
)


def split_role(name: str) -> str | None:
    """train, val or test for a name with that meaning, such as Train, training_set, test-images or valset; else None."""
    word = re.sub(r"[^a-z]", "", name.lower()) if not re.search(r"\d", name) else ""
    while True:
        role = next((ours for ours, theirs in SPLIT_NAMES.items() if word in theirs), None)
        shorter = FILLERS.sub("", word)
        if role or shorter == word:
            return role
        word = shorter


def role_within(name: str) -> str | None:
    """Like split_role, but also for names with one such word among others, such as seg_train or train2017."""
    roles = {split_role(word) for word in re.findall(r"[a-z]+", name.lower())} - {None}
    return split_role(name) or (roles.pop() if len(roles) == 1 else None)


def find_splits(names: Iterable[str], source: str) -> dict[str, str]:
    """Our names (train, val, test) to the set's own names, for those it has.

    Raises ValueError where two names mean the same.
    """
    found: dict[str, str] = {}
    for name in names:
        role = split_role(name)
        if role in found:
            raise ValueError(f"{source} has {found[role]} and {name}, which both mean {role}. Rename or remove one of them.")
        if role:
            found[role] = name
    return {role: found[role] for role in SPLIT_NAMES if role in found}


class Split:
    """One split: encoded images and labels, addressed by row.

    labels: int64 [N]. The images are not copied: they are in an Arrow table (memory-mapped, except for the small embedded
    dataset) as struct<bytes, path>, or in the files of the paths. A selection of rows shares the table and its column.
    A memory-mapped table pickles as its file name, without the images, for worker processes. Paths are strings, or the bytes of
    file names, which need not be UTF-8.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        column: str,
        labels: np.ndarray,
        rows: np.ndarray | None = None,
        origin: str | None = None,
    ) -> None:
        """table: a pyarrow.Table, or an object with one: reading_cache.MappedTable or datasets.table.Table.

        rows: int64 [N], the rows of the table that belong to this split; None for all.
        """
        self.name = name
        self.origin = origin or name
        self.labels = labels.astype(np.int64, copy=False)
        self.table = table
        self.column = column
        self._rows = np.arange(len(labels)) if rows is None else rows
        self._fields: tuple[pa.ChunkedArray, pa.ChunkedArray] | None = None
        self._fingerprint: dict[str, tuple[str, int]] = {}  # by column; shared by all selections of rows of the table

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fields": None}  # Arrow would copy the images into the pickle

    @property
    def table_rows(self) -> np.ndarray:
        """The row of the table for each row of the split; int64 [N]."""
        return self._rows

    @property
    def table_length(self) -> int:
        return int(self.table.num_rows)

    def whole_table(self) -> Split:
        """A split of all rows of the table; labels of rows outside this split are -1."""
        labels = np.full(self.table_length, -1, np.int64)
        labels[self._rows] = self.labels
        return Split(self.name, self.table, self.column, labels, origin=self.origin)

    def fingerprint(self) -> tuple[str, int]:
        """SHA-256 over the images of the whole table, and their total size in encoded bytes.

        The hash covers every byte of images in the table, but only path, size and modification time of image files.
        """
        if self.column not in self._fingerprint:
            self._fingerprint[self.column] = self._take_fingerprint()
        return self._fingerprint[self.column]

    def _take_fingerprint(self) -> tuple[str, int]:
        digest, num_bytes = hashlib.sha256(), 0
        data, path = self.image_fields()
        for chunk in data.chunks:
            for part in _logical_bytes(chunk):
                digest.update(part)
                num_bytes += len(part)
        for name in path.filter(data.is_null()).drop_null().to_pylist():
            facts = file_state(os.fsdecode(name))
            digest.update(repr(facts).encode())
            num_bytes += facts[1]
        return digest.hexdigest(), num_bytes

    def encoded(self, row: int) -> bytes:
        """The file bytes of the encoded image. Raises BadImage if there are none."""
        data, path = self._image(row)
        if data is not None:
            return data
        if path is None:
            raise BadImage(f"{self.where(row)} has no image: neither bytes nor a path.")
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"Cannot read {path}: {error.strerror}.") from error

    def some_rows(self, count: int) -> np.ndarray:
        """A sample of rows, evenly spaced over the split; int64 [count] or fewer."""
        return np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))

    def where(self, row: int) -> str:
        """The file path of the image, or a description such as "row 17 of train", for messages."""
        _, path = self._image(row)
        return path or f"row {self._rows[row]} of {self.origin}"

    def select(self, rows: np.ndarray, name: str | None = None) -> Split:
        """The given rows of this split, in that order, under the same or another name."""
        chosen = Split(name or self.name, self.table, self.column, self.labels[rows], self._rows[rows], self.origin)
        chosen._fingerprint = self._fingerprint
        return chosen

    def with_labels(self, labels: np.ndarray) -> Split:
        """The same images with other labels; int64 [N]."""
        relabelled = self.select(np.arange(len(self)))
        relabelled.labels = labels
        return relabelled

    def _image(self, row: int) -> tuple[bytes | None, str | None]:
        """The bytes of an image in the table, else the path of its file."""
        index = int(self._rows[row])
        data, path = self.image_fields()
        encoded = data[index].as_py()
        name = path[index].as_py() if encoded is None else None
        return encoded, None if name is None else os.fsdecode(name)

    def image_fields(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        if self._fields is None:
            images = getattr(self.table, "table", self.table).column(self.column)
            names = [field.name for field in images.type]
            fields = images.flatten()
            self._fields = fields[names.index("bytes")], fields[names.index("path")]
        return self._fields


def joined(splits: Sequence[Split], name: str) -> Split:
    """Concatenates splits whose image columns have the same type."""
    import pyarrow as pa

    tables = {id(split.table): split for split in splits}  # splits of one table share it
    starts = dict(zip(tables, np.cumsum([0, *(split.table_length for split in tables.values())]).tolist()))
    columns = [getattr(split.table, "table", split.table).column(split.column) for split in tables.values()]
    table = pa.table({"image": pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)})
    rows = np.concatenate([starts[id(split.table)] + split.table_rows for split in splits])
    return Split(name, table, "image", np.concatenate([split.labels for split in splits]), rows)


Reading = tuple[dict[str, Split], list[str], list[str]]  # splits (train, val, test), class names, notes for the user


def _logical_bytes(chunk: pa.Array) -> Iterator[memoryview]:
    """The content of a binary array, independent of its layout: validity of the values, their lengths, their bytes."""
    import pyarrow as pa

    valid = chunk.is_valid().cast(pa.uint8())  # its to_numpy would import pandas
    yield memoryview(valid.buffers()[1])[valid.offset : valid.offset + len(valid)]
    _, offsets, values = chunk.buffers()
    kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    ends = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1]
    yield memoryview(np.diff(ends).astype(np.int64).tobytes())
    if values is not None and len(ends):
        yield memoryview(values)[ends[0] : ends[-1]]


def file_state(path: str) -> tuple[str, int, int]:
    """Path, size in bytes and modification time in nanoseconds; zeros if the file does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def stratified_rows(
    labels: np.ndarray, size: int, *place: int, keep: int = 0, shuffled: np.ndarray | None = None
) -> np.ndarray:
    """Selects `size` rows, each class in proportion; sorted int64 [size]. `place` (seed, ...) is the address of the draw.

    The counts are apportioned by largest remainder (https://en.wikipedia.org/wiki/Quota_method), so the total is exact. The
    remaining rows go first to classes of two or more samples that would otherwise get none, and last to classes of one sample.
    keep: rows of each class that are not selected; where too few others are left, less than `size` rows are. shuffled: int64
    [N], the rows in the order in which they are selected; None draws it.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    most = np.maximum(counts - keep, 0)
    take, remainders = np.divmod(counts * size, len(labels))
    order = np.lexsort((-remainders, take > 0, (counts == 1) | (remainders == 0)))
    take = np.minimum(take, most)
    while take.sum() < min(size, most.sum()):
        order = order[take[order] < most[order]]
        take[order[: size - take.sum()]] += 1
    if shuffled is None:
        shuffled = permutation(len(labels), *place)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank < np.repeat(take, counts)])


def stratified_folds(labels: np.ndarray, number: int, *place: int) -> np.ndarray:
    """Divides the rows into `number` folds with about equal shares of each class; int64 [N]. `place` (seed, ...) as above."""
    shuffled = permutation(len(labels), *place)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[by_class] = np.arange(len(labels)) % number
    return folds
