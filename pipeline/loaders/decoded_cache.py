"""Decodes a split once: caches its images as fixed-size uint8 in a memory-mapped file, which the first use writes.

It is an Arrow file with one column of fixed-size binary and one row for each row of the whole table, null for an image that
cannot be decoded. Splits of one table (train and validation, for every seed) therefore share one file, and the processes of a
machine share one copy in memory.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.common.console import progress_bar, warn
from pipeline.common.files import written_aside
from pipeline.data.cache_folder import cache_folder, is_worth_keeping, locked
from pipeline.data.splits import Split
from pipeline.images.decode import BadImage

FORMAT = 1  # increase it when the content of the file changes its meaning
SMALLEST_SHARE = 0.25  # a split that is a smaller fraction of its table is decoded alone, without a cache file
BLOCK = 2**24  # bytes per checksum
CHUNK = 64  # images per task of a thread

Fit = Callable[[int], Tensor]


def resident_images(
    split: Split, shape: tuple[int, ...], edition: str, fit: Fit, num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray]:
    """Decoded images, uint8 [M, *shape], and the index of each row of the split in them, int64 [N].

    fit: maps a row of the split's table to its image, uint8 [*shape]. edition: names everything besides the encoded images on
    which the result of fit depends. shown: whether to show a progress bar and warnings. Raises BadImage for the first image of
    the split that cannot be decoded. Only warns about a cache that cannot be read or written.
    """
    rows, num_rows = split.table_rows, split.table_length
    fingerprint, num_bytes = split.fingerprint()
    key = hashlib.sha256(json.dumps([FORMAT, fingerprint, shape, edition]).encode()).hexdigest()
    path = cache_folder() / f"{key[:32]}.arrow"
    is_useful = len(rows) >= SMALLEST_SHARE * num_rows or path.is_file()
    if not (is_useful and is_worth_keeping(num_bytes, num_rows)):
        return decode_rows(rows, rows, shape, fit, num_threads, shown)[0], np.arange(len(rows))
    with locked(path):
        found = read_images(path, num_rows, shape, num_threads, shown)
        if found is None:
            decoded = decode_rows(np.arange(num_rows), rows, shape, fit, num_threads, shown)
            found = keep_images(path, *decoded, num_threads, shown)
    images, is_decoded = found
    for row in rows[~is_decoded[rows]]:  # its file may have become readable
        images[row] = fit(row)
    return images, rows


def decode_rows(
    rows: np.ndarray, needed: np.ndarray, shape: tuple[int, ...], fit: Fit, num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray]:
    """The images of these rows of a table, uint8 [len(rows), *shape], and which of them decoded, bool [len(rows)].

    Raises BadImage for the first image that cannot be decoded and is in `needed`. Other such images stay black.
    """
    images = torch.zeros(len(rows), *shape, dtype=torch.uint8)
    is_decoded, is_needed = np.ones(len(rows), bool), np.isin(rows, needed)

    def decode(start: int) -> int:
        stop = min(start + CHUNK, len(rows))
        for place in range(start, stop):
            try:
                images[place] = fit(rows[place])
            except BadImage:
                if is_needed[place]:
                    raise
                is_decoded[place] = False
        return stop - start

    pool = ThreadPoolExecutor(num_threads)
    with progress_bar(len(rows), 0, "decoding", shown, unit="image") as bar:
        try:
            for count in pool.map(decode, range(0, len(rows), CHUNK)):  # iterating raises the exceptions of the threads
                bar.update(count)
        finally:
            pool.shutdown(cancel_futures=True)
    return images, is_decoded


def keep_images(
    path: Path, images: Tensor, is_decoded: np.ndarray, num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray]:
    """Writes the file and returns its memory-mapped content, or the given arrays if it cannot be written."""
    try:
        write_images(path, images, is_decoded, num_threads)
    except OSError as error:
        if shown:
            warn(f"The decoded images could not be cached in {path.parent}: {error.strerror or error}. Training continues.")
        return images, is_decoded
    return read_images(path, len(images), tuple(images.shape[1:]), num_threads, shown) or (images, is_decoded)


def write_images(path: Path, images: Tensor, is_decoded: np.ndarray, num_threads: int) -> None:
    """Writes the cache file. Raises OSError and leaves no partial file."""
    import pyarrow as pa

    width = images[0].numel()
    sums = checksums(images.numpy().reshape(-1), is_decoded, num_threads)
    schema = pa.schema([pa.field("image", pa.binary(width))], metadata={"checksums": json.dumps(sums)})
    buffers = [pa.py_buffer(np.packbits(is_decoded, bitorder="little")), pa.py_buffer(images.numpy().reshape(-1))]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(images), buffers)
    with written_aside(path) as aside:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))


def read_images(
    path: Path, num_rows: int, shape: tuple[int, ...], num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray] | None:
    """The images, memory-mapped copy-on-write, and which of them decoded.

    None if the file is missing or, with a warning, if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return map_images(path, num_rows, shape, num_threads)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pa.ArrowInvalid is a ValueError
        if shown:
            warn(f"The decoded images in {path} are damaged ({error}). They are decoded again.")
        return None


def map_images(path: Path, num_rows: int, shape: tuple[int, ...], num_threads: int) -> tuple[Tensor, np.ndarray]:
    """Like read_images, but raises OSError, ValueError, KeyError or TypeError for a damaged file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        address = file.read_buffer(1).address
        with pa.ipc.open_file(file) as reader:
            batch = reader.get_batch(0)
    column, sums = batch.column(0), json.loads(batch.schema.metadata[b"checksums"])
    bits, values = column.buffers()
    if len(column) != num_rows or column.type.byte_width != int(np.prod(shape)):
        raise ValueError(f"it contains {len(column)} images of {column.type}")
    pixels = np.memmap(path, np.uint8, "c", values.address - address, (num_rows, *shape))
    is_decoded = np.ones(num_rows, bool)
    if column.null_count:
        is_decoded = np.unpackbits(np.frombuffer(bits, np.uint8), count=num_rows, bitorder="little").astype(bool)
    if checksums(pixels.reshape(-1), is_decoded, num_threads) != sums:
        raise ValueError("its checksums differ")
    return torch.from_numpy(pixels), is_decoded


def checksums(pixels: np.ndarray, is_decoded: np.ndarray, num_threads: int) -> list[int]:
    """CRC-32 of is_decoded, then of each block of the pixels."""
    blocks = [pixels[start : start + BLOCK] for start in range(0, len(pixels), BLOCK)]
    with ThreadPoolExecutor(num_threads) as pool:
        return [zlib.crc32(is_decoded.tobytes()), *pool.map(zlib.crc32, blocks)]
