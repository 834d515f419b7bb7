"""Shards: splits whose images are read chunk by chunk from Parquet, Arrow, tar or image files, local or on the Hub."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline.data.splits import Split
from pipeline.images.decode import BadImage

ATTEMPTS, FIRST_WAIT_SECONDS = 4, 0.5  # the wait doubles after each attempt: 3.5 s in all
SAMPLED_CHUNKS = 4  # chunks of which rows are sampled before training
THREADS = 4  # per worker, for reading ahead
ARROW_FILE_MAGIC = b"ARROW1"  # the first bytes of the IPC file format; the stream format has none

Encoded = Sequence[bytes | None]
Result = TypeVar("Result")


class LostShard(RuntimeError):
    """A shard cannot be read; the message contains its path."""


@dataclass(frozen=True)
class Shards:
    """The places of the images of a split. A chunk is the unit of reading.

    kind: a key of READERS. files: paths or hf:// URLs. column: the image column (parquet, arrow). file_of: the file of each
    chunk, int64 [chunks]. part: the row group (parquet), the number or byte offset (arrow), or 0 (tar, files) of each chunk,
    int64 [chunks]. starts: the first sample of each chunk, then the number of samples, int64 [chunks + 1]. spans: the first
    byte and the length of each image in its tar file, int64 [N, 2].
    """

    kind: str
    files: list[str]
    file_of: np.ndarray
    part: np.ndarray
    starts: np.ndarray
    column: str = ""
    spans: np.ndarray | None = None


def open_binary(path: str) -> Any:
    """Opens a local file, or a remote one of which exactly the requested byte ranges are fetched."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    filesystem, address = fsspec.core.url_to_fs(path)
    return filesystem.open(address, "rb", cache_type="none")


@functools.lru_cache(maxsize=256)
def parquet_footer(path: str) -> Any:
    """The pyarrow FileMetaData of a Parquet file: its row groups and columns."""
    import pyarrow.parquet as pq

    with open_binary(path) as file:
        return pq.read_metadata(file)


def _parquet_rows(shards: Shards, chunk: int) -> Encoded:
    import pyarrow.parquet as pq

    path = shards.files[shards.file_of[chunk]]
    footer = parquet_footer(path)
    names = {footer.schema.column(number).path for number in range(footer.num_columns)}
    leaf = f"{shards.column}.bytes" if f"{shards.column}.bytes" in names else shards.column
    with open_binary(path) as file:
        group = pq.ParquetFile(file, metadata=footer).read_row_group(
            int(shards.part[chunk]), columns=[leaf], use_threads=False
        )
    return ArrowRows(group.column(0))


def _arrow_rows(shards: Shards, chunk: int) -> Encoded:
    import pyarrow as pa

    with open_binary(shards.files[shards.file_of[chunk]]) as file:
        part = int(shards.part[chunk])
        if file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            batch = pa.ipc.open_file(file).get_batch(part)
        else:
            file.seek(0)
            schema = pa.ipc.read_schema(file)
            file.seek(part)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
    return ArrowRows(pa.chunked_array([batch.column(shards.column)]))


def _tar_members(shards: Shards, chunk: int) -> Encoded:
    assert shards.spans is not None
    spans = shards.spans[shards.starts[chunk] : shards.starts[chunk + 1]]
    first = int(spans[0, 0])
    length = int(spans[-1].sum()) - first
    with open_binary(shards.files[shards.file_of[chunk]]) as file:
        file.seek(first)
        data = file.read(length)
    if len(data) < length:
        raise EOFError(f"it ends {length - len(data)} bytes early")
    return [data[offset - first : offset - first + size] for offset, size in spans.tolist()]


def _whole_file(shards: Shards, chunk: int) -> Encoded:
    with open_binary(shards.files[shards.file_of[chunk]]) as file:
        return [file.read()]


READERS: dict[str, Callable[[Shards, int], Encoded]] = {
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "tar": _tar_members,
    "files": _whole_file,
}
CHUNK_NAMES = {"parquet": "row groups", "arrow": "record batches", "tar": "parts", "files": "images"}


class ArrowRows(Sequence):
    """The images of an Arrow column, binary or struct<bytes, path>, as bytes or None."""

    def __init__(self, column: Any):
        import pyarrow as pa
        import pyarrow.compute as pc

        self.values = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: Any) -> Any:
        return self.values[row].as_py()


def read_shard(path: str, read: Callable[[], Result]) -> Result:
    """Calls `read` up to ATTEMPTS times and returns its result. Raises LostShard, with the path, if no attempt succeeds."""
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS):
        try:
            return read()
        except Exception:  # the operating system, the network and four formats each raise their own types
            time.sleep(wait)
            wait *= 2
    try:
        return read()
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise LostShard(
            f"Cannot read the shard {path}: {reason} ({ATTEMPTS} attempts). Restore or repair it."
        ) from error


def read_chunk(shards: Shards, chunk: int) -> Encoded:
    """The encoded images of a chunk. Raises LostShard."""
    return read_shard(shards.files[shards.file_of[chunk]], lambda: READERS[shards.kind](shards, chunk))


class StreamedSplit(Split):
    """A split whose images are read from shards, chunk by chunk, on request; addressed by row like any Split.

    Labels and places are in memory; images only between `expect` and `release`. It pickles without images.
    """

    def __init__(self, name: str, shards: Shards, labels: np.ndarray, rows: np.ndarray | None, origin: str):
        self.name, self.origin, self.shards = name, origin, shards
        self.labels = labels.astype(np.int64, copy=False)
        self._rows = np.arange(len(labels)) if rows is None else rows
        self._held: dict[int, Future] = {}
        self._uses: Counter[int] = Counter()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "_uses": Counter(), "_pool": None}

    def select(self, rows: np.ndarray, name: str | None = None) -> StreamedSplit:
        return StreamedSplit(name or self.name, self.shards, self.labels[rows], self._rows[rows], self.origin)

    def some_rows(self, count: int) -> np.ndarray:
        """The first rows of a few chunks, evenly spaced, because the split may be sorted by class; int64 [count] or fewer."""
        chunks, starts = self.chunk_starts()
        number = min(len(chunks), count if self.shards.kind == "files" else SAMPLED_CHUNKS)
        sampled = np.unique(np.linspace(0, len(chunks) - 1, number).astype(np.int64))
        ends = np.minimum(starts[sampled + 1], starts[sampled] + -(-count // number))
        return np.concatenate([np.arange(start, end) for start, end in zip(starts[sampled], ends)])[:count]

    def chunk_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """The chunks with rows of this split, int64 [C]; their first rows, then the number of rows, int64 [C + 1]."""
        at = np.searchsorted(self._rows, self.shards.starts)
        chunks = np.flatnonzero(np.diff(at))
        return chunks, np.append(at[chunks], len(self))

    def expect(self, chunks: list[int]) -> None:
        """Starts to read chunks. A chunk is held until `release` was called for it as often as `expect`."""
        if self._process != os.getpid():  # a forked process does not inherit the threads
            self._held, self._uses, self._pool, self._process = {}, Counter(), None, os.getpid()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS)
        for chunk in chunks:
            self._uses[chunk] += 1
            if chunk not in self._held:
                self._held[chunk] = self._pool.submit(read_chunk, self.shards, chunk)

    def release(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self._uses[chunk] -= 1
            if not self._uses[chunk]:
                del self._held[chunk], self._uses[chunk]

    def release_all(self) -> None:
        """Releases all chunks, also those that were read without `expect`."""
        self._held, self._uses = {}, Counter()

    def encoded(self, row: int) -> bytes:
        """The file bytes of the encoded image. Raises LostShard, or BadImage if the bytes are null."""
        chunk, number = self._address(row)
        if chunk not in self._held or self._process != os.getpid():
            self.expect([chunk])
        encoded = self._held[chunk].result()[number]
        if encoded is None:
            raise BadImage("The image is missing: its bytes are null.")
        return encoded

    def where(self, row: int) -> str:
        chunk, number = self._address(row)
        path = self.shards.files[self.shards.file_of[chunk]]
        if self.shards.kind == "files":
            return path
        before = self.shards.starts[np.searchsorted(self.shards.file_of, self.shards.file_of[chunk])]
        return f"row {self.shards.starts[chunk] + number - before} of {path}"

    def _address(self, row: int) -> tuple[int, int]:
        """The chunk of a row, and the position of the row in it."""
        source_row = self._rows[row]
        chunk = int(np.searchsorted(self.shards.starts, source_row, side="right")) - 1
        return chunk, int(source_row - self.shards.starts[chunk])
