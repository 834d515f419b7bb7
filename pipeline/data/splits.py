"""Splits of an image set: encoded images and labels by row, and stratified choices of rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.randomness import permutation
from pipeline.images.decode import BadImage

if TYPE_CHECKING:
    import pyarrow as pa

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def find_splits(names: list[str], source: str) -> dict[str, str]:
    """Our names (train, val, test) to the set's own names, for those it has.

    Raises ValueError where no name means train, or two names mean the same.
    """
    found = {}
    for ours, theirs in SPLIT_NAMES.items():
        matching = [name for name in names if name.lower() in theirs]
        if len(matching) > 1:
            raise ValueError(f"{source} has {' and '.join(matching)}, which both mean {ours}. Keep one of them.")
        if matching:
            found[ours] = matching[0]
    if "train" not in found:
        raise ValueError(f"{source} has no training split. Its splits: {', '.join(sorted(names))}. Name one 'train'.")
    return found


def is_split_name(name: str) -> bool:
    return any(name.lower() in theirs for theirs in SPLIT_NAMES.values())


class Split:
    """One split: encoded images and labels, addressed by row.

    labels: int64 [N]. The images stay where they are: in an Arrow table (memory-mapped, except for the small embedded
    set) as struct<bytes, path>, or in the files that the paths name. A choice of rows shares the table and its column.
    Pickled for a worker process, a memory-mapped table is its file name, not its images.
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
        """table: a pyarrow.Table, or what holds one: known_sets.MappedTable or datasets.table.Table.

        rows: int64 [N], its rows that belong to this split.
        """
        self.name = name
        self.origin = origin or name
        self.labels = labels.astype(np.int64, copy=False)
        self.table = table
        self.column = column
        self._rows = np.arange(len(labels)) if rows is None else rows
        self._fields: tuple[pa.ChunkedArray, pa.ChunkedArray] | None = None
        self._fingerprint: dict[str, tuple[str, int]] = {}  # by column; shared by all choices of rows of the table

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fields": None}  # Arrow would copy the images into the pickle

    @property
    def table_rows(self) -> np.ndarray:
        """The rows of the table that the split's rows are; int64 [N]."""
        return self._rows

    @property
    def table_length(self) -> int:
        return int(self.table.num_rows)

    def whole_table(self) -> Split:
        """All rows of the table that this split is a part of; labels that are not the split's are -1."""
        labels = np.full(self.table_length, -1, np.int64)
        labels[self._rows] = self.labels
        return Split(self.name, self.table, self.column, labels, origin=self.origin)

    def fingerprint(self) -> tuple[str, int]:
        """SHA-256 of the images of the whole table, and the bytes that they take encoded.

        Of images in the table every byte counts, of files the path, size and time of change.
        """
        if self.column not in self._fingerprint:
            self._fingerprint[self.column] = self._take_fingerprint()
        return self._fingerprint[self.column]

    def _take_fingerprint(self) -> tuple[str, int]:
        digest, num_bytes = hashlib.sha256(), 0
        data, path = self._image_fields()
        for chunk in data.chunks:
            for part in _logical_bytes(chunk):
                digest.update(part)
                num_bytes += len(part)
        for name in path.filter(data.is_null()).drop_null().to_pylist():
            facts = file_state(name)
            digest.update(repr(facts).encode())
            num_bytes += facts[1]
        return digest.hexdigest(), num_bytes

    def encoded(self, row: int) -> bytes:
        """The file bytes of the encoded image. Raises BadImage where there are none."""
        data, path = self._image(row)
        if data is not None:
            return data
        if path is None:
            raise BadImage(f"{self.where(row)} holds no image: neither bytes nor a path.")
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"Cannot read {path}: {error.strerror}.") from error

    def some_rows(self, count: int) -> np.ndarray:
        """Rows to look at, spread over the split; int64 [count] or fewer."""
        return np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))

    def where(self, row: int) -> str:
        """The image's file path, or words such as "row 17 of train", for messages."""
        _, path = self._image(row)
        return path or f"row {self._rows[row]} of {self.origin}"

    def select(self, rows: np.ndarray, name: str | None = None) -> Split:
        """The given rows of this split, in that order, under the same or another name."""
        chosen = Split(name or self.name, self.table, self.column, self.labels[rows], self._rows[rows], self.origin)
        chosen._fingerprint = self._fingerprint
        return chosen

    def _image(self, row: int) -> tuple[bytes | None, str | None]:
        """The bytes of an image that lies in the table, else the path of its file."""
        index = int(self._rows[row])
        data, path = self._image_fields()
        encoded = data[index].as_py()
        return (encoded, None) if encoded is not None else (None, path[index].as_py())

    def _image_fields(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        if self._fields is None:
            images = getattr(self.table, "table", self.table).column(self.column)
            names = [field.name for field in images.type]
            fields = images.flatten()
            self._fields = fields[names.index("bytes")], fields[names.index("path")]
        return self._fields


Reading = tuple[dict[str, Split], list[str], list[str]]  # splits under our names, class names, notes for the user


def _logical_bytes(chunk: pa.Array) -> Iterator[memoryview]:
    """What a binary array says: which values are null, how long each is, and all of them, one after another."""
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
    """Path, bytes, and the time of change in nanoseconds; zeros for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def stratified_rows(labels: np.ndarray, size: int, *place: int) -> np.ndarray:
    """`size` rows, each class in its share; sorted int64 [size]. The place (seed, ...) decides which.

    Shares are apportioned by largest remainder (https://en.wikipedia.org/wiki/Quota_method), so the total is exact;
    what is left over goes first to classes of two or more samples that would get none, and last to classes of one.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    take, remainders = np.divmod(counts * size, len(labels))
    order = np.lexsort((-remainders, take > 0, (counts == 1) | (remainders == 0)))
    take[order[: size - take.sum()]] += 1
    shuffled = permutation(len(labels), *place)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank < np.repeat(take, counts)])
