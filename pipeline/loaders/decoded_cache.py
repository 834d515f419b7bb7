"""Decodes a split once: caches its images as fixed-size uint8 in a memory-mapped array, which the first use writes.

images.npy       uint8 [rows of the whole table, *shape]; black where an image could not be decoded
is_decoded.npy   bool [rows of the whole table]
checksums.json   CRC-32 of the blocks of both files

Splits of one table (train and validation, for every seed) share one folder, and the processes of a machine share one copy in
memory.
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
from pipeline.common.files import folder_written_aside, write_json
from pipeline.common.system import decoding_threads
from pipeline.data.cache_folder import cache_folder, is_worth_keeping, locked
from pipeline.data.splits import Split
from pipeline.images.decode import BadImage

FORMAT = 2  # increase it when the content of the folder changes its meaning
IMAGES, IS_DECODED, CHECKSUMS = "images.npy", "is_decoded.npy", "checksums.json"
SMALLEST_SHARE = 0.25  # a split that is a smaller fraction of its table is decoded alone, without a cache folder
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
    folder = cache_folder() / f"{key[:32]}.decoded"
    is_useful = len(rows) >= SMALLEST_SHARE * num_rows or folder.is_dir()
    if not (is_useful and is_worth_keeping(num_bytes, num_rows)):
        return decode_rows(rows, rows, shape, fit, num_threads, shown)[0], np.arange(len(rows))
    with locked(folder):
        found = read_images(folder, num_rows, shape, num_threads, shown)
        if found is None:
            decoded = decode_rows(np.arange(num_rows), rows, shape, fit, num_threads, shown)
            found = keep_images(folder, *decoded, num_threads, shown)
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

    with progress_bar(len(rows), 0, "decoding", shown, unit="image") as bar, decoding_threads(num_threads) as pool:
        for count in pool.map(decode, range(0, len(rows), CHUNK)):  # iterating raises the exceptions of the threads
            bar.update(count)
    return images, is_decoded


def keep_images(
    folder: Path, images: Tensor, is_decoded: np.ndarray, num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray]:
    """Writes the folder and returns its memory-mapped content, or the given arrays if it cannot be written.

    images: uint8 [N, C, S, S]; is_decoded: bool [N].
    """
    try:
        write_images(folder, images, is_decoded, num_threads)
    except OSError as error:
        if shown:
            warn(f"The decoded images could not be cached in {folder.parent}: {error.strerror or error}. Training continues.")
        return images, is_decoded
    return read_images(folder, len(images), tuple(images.shape[1:]), num_threads, shown) or (images, is_decoded)


def write_images(folder: Path, images: Tensor, is_decoded: np.ndarray, num_threads: int) -> None:
    """Writes the cache folder. Raises OSError and leaves no partial folder."""
    with folder_written_aside(folder) as aside:
        np.save(aside / IMAGES, images.numpy())  # a full disk raises OSError; a memory map would get SIGBUS
        np.save(aside / IS_DECODED, is_decoded)
        write_json(aside / CHECKSUMS, checksums(aside, num_threads))


def read_images(
    folder: Path, num_rows: int, shape: tuple[int, ...], num_threads: int, shown: bool
) -> tuple[Tensor, np.ndarray] | None:
    """The images, uint8 [num_rows, *shape], memory-mapped copy-on-write, and which of them decoded, bool [num_rows].

    None if the folder is missing or, with a warning, if it is damaged.
    """
    if not folder.is_dir():
        return None
    try:
        return map_images(folder, num_rows, shape, num_threads)
    except (OSError, ValueError) as error:
        if shown:
            warn(f"The decoded images in {folder} are damaged ({error}). They are decoded again.")
        return None


def map_images(folder: Path, num_rows: int, shape: tuple[int, ...], num_threads: int) -> tuple[Tensor, np.ndarray]:
    """Like read_images, but raises OSError or ValueError for a damaged folder."""
    if json.loads((folder / CHECKSUMS).read_text()) != checksums(folder, num_threads):
        raise ValueError("the checksums differ")
    images, is_decoded = np.load(folder / IMAGES, mmap_mode="c"), np.load(folder / IS_DECODED)
    if images.shape != (num_rows, *shape) or is_decoded.shape != (num_rows,):
        raise ValueError(f"it contains an array of shape {images.shape}")
    return torch.from_numpy(images), is_decoded


def checksums(folder: Path, num_threads: int) -> dict[str, list[int]]:
    """CRC-32 of each block of the two arrays' files. Raises OSError or ValueError for a missing or empty file."""
    found = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for name in (IMAGES, IS_DECODED):
            content = np.memmap(folder / name, np.uint8, "r")
            blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
            found[name] = list(pool.map(zlib.crc32, blocks))
    return found
