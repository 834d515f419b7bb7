"""Skips images that cannot be decoded, before training. All counts are then exact, for every loader and number of processes.

A file beside the decoded images records which images decode: one byte for each row of the whole table.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from pipeline.common.console import progress_bar, warn
from pipeline.common.files import written_aside
from pipeline.common.system import decoding_threads
from pipeline.data.cache_folder import cache_folder, is_worth_keeping, locked
from pipeline.data.splits import Split
from pipeline.images.decode import BadImage, decode_pixels

FORMAT = b"1"  # increase it when the content of the file changes its meaning
UNKNOWN, GOOD = 0, 1
CHUNK = 64  # images per task of a thread
NUM_NAMED = 10  # images with a warning of their own; the rest is counted


@dataclasses.dataclass(frozen=True)
class Screened:
    """The splits without their bad images, and one message for each bad image."""

    splits: list[Split]
    messages: list[str]


def without_bad_images(splits: list[Split], channels: int, num_threads: int, shown: bool) -> Screened:
    """Decodes each image that is not recorded as good, and removes the bad ones. Raises BadImage if no image of a split decodes.

    An image that is in two splits counts once. shown: whether to show a progress bar and warnings.
    """
    kept: dict[Split, Split] = {}  # a split that is used twice is screened once
    messages: dict[tuple[str, int], str] = {}  # by table and row
    for split in dict.fromkeys(splits):
        bad = bad_images(split, channels, num_threads, shown)
        messages |= {(split.fingerprint()[0], int(split.table_rows[row])): message for row, message in bad.items()}
        good = np.delete(np.arange(len(split)), list(bad))
        if not len(good):
            raise BadImage(f"No image of the {split.name} split can be decoded. The first: {bad[0]}")
        kept[split] = split.select(good) if bad else split
    if shown:
        for message in list(messages.values())[:NUM_NAMED]:
            warn(f"{message} The image is skipped.")
        if len(messages) > NUM_NAMED:
            warn(f"{len(messages) - NUM_NAMED:,} more images cannot be decoded and are skipped.")
    return Screened([kept[split] for split in splits], list(messages.values()))


def bad_images(split: Split, channels: int, num_threads: int, shown: bool) -> dict[int, str]:
    """The rows of the split whose images cannot be decoded, each with its message."""
    import PIL

    fingerprint, num_bytes = split.fingerprint()
    if not is_worth_keeping(num_bytes, split.table_length):
        return check(split, np.arange(len(split)), channels, num_threads, shown)
    key = hashlib.sha256(f"{fingerprint} {channels} {PIL.__version__}".encode()).hexdigest()
    path = cache_folder() / f"{key[:32]}.checked"
    with locked(path):
        known = read_known(path, split.table_length)
        unknown = np.flatnonzero(known[split.table_rows] == UNKNOWN)
        bad = check(split, unknown, channels, num_threads, shown)
        known[split.table_rows[np.setdiff1d(unknown, list(bad))]] = GOOD
        if len(unknown) > len(bad):
            write_known(path, known, shown)
    return bad


def check(split: Split, rows: np.ndarray, channels: int, num_threads: int, shown: bool) -> dict[int, str]:
    """Decodes the images of the rows, int64 [N]; returns the rows that cannot be decoded, in order, each with its message."""

    def decode_chunk(start: int) -> dict[int, str]:
        found = {}
        for row in rows[start : start + CHUNK].tolist():
            try:
                decode_pixels(split.encoded(row), channels)
            except BadImage as error:
                found[row] = bad_image_message(split, row, error)
        return found

    bad: dict[int, str] = {}
    with decoding_threads(num_threads) as pool, progress_bar(len(rows), 0, "checking", shown, unit="image") as bar:
        for start, found in zip(range(0, len(rows), CHUNK), pool.map(decode_chunk, range(0, len(rows), CHUNK))):
            bad |= found
            bar.update(min(CHUNK, len(rows) - start))
    return bad


def bad_image_message(split: Split, row: int, error: BadImage) -> str:
    """The error with the place of the image: "row 17 of train: ..."."""
    where = split.where(row)
    return str(error) if where in str(error) else f"{where}: {error}"


def read_known(path: Path, num_rows: int) -> np.ndarray:
    """The record of each row of the table, UNKNOWN or GOOD; uint8 [num_rows]. All UNKNOWN if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    digest, known = content[:32], content[32:]
    is_whole = len(known) == num_rows and digest == hashlib.sha256(FORMAT + known).digest()
    return np.frombuffer(known if is_whole else bytes(num_rows), np.uint8).copy()


def write_known(path: Path, known: np.ndarray, shown: bool) -> None:
    """Writes the record; warns if it cannot be written, and the next run then checks all images again."""
    try:
        with written_aside(path) as aside:
            aside.write_bytes(hashlib.sha256(FORMAT + known.tobytes()).digest() + known.tobytes())
    except OSError as error:
        warn(f"{path.parent} could not be written ({error.strerror or error}). The next run checks all images again.")
