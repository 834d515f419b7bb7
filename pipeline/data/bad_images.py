"""Leaving out images that cannot be decoded, before training: so every count is exact, whatever loader and processes.

What was found good is remembered in a file beside the decoded images: a byte for each row of the whole table.
"""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.common.console import progress_bar, warn
from pipeline.common.files import written_aside
from pipeline.data.cache_folder import cache_folder, is_worth_keeping, locked
from pipeline.data.splits import Split
from pipeline.images.decode import BadImage, decode_pixels

FORMAT = b"1"  # raised when what a file holds changes its meaning
UNKNOWN, GOOD = 0, 1
CHUNK = 64  # images that a thread takes at a time
NUM_NAMED = 10  # images that are warned about one by one


@dataclasses.dataclass(frozen=True)
class Screened:
    """The splits without their bad images, and what is wrong with each of those, in words."""

    splits: list[Split]
    complaints: list[str]


def without_bad_images(splits: list[Split], channels: int, num_threads: int, shown: bool) -> Screened:
    """Decodes each image that is not known to be good. Raises BadImage where a split has no good image.

    An image that is in two of the splits counts once. shown: whether to show a bar and to warn.
    """
    kept: list[Split] = []
    complaints: dict[tuple[str, int], str] = {}  # by table and row
    for split in splits:
        bad = bad_images(split, channels, num_threads, shown)
        complaints |= {(split.fingerprint()[0], int(split.table_rows[row])): words for row, words in bad.items()}
        good = np.delete(np.arange(len(split)), list(bad))
        if not len(good):
            raise BadImage(f"No image of the {split.name} split can be decoded. The first: {bad[0]}")
        kept.append(split.select(good) if bad else split)
    if shown:
        for words in list(complaints.values())[:NUM_NAMED]:
            warn(f"{words} It is left out.")
        if len(complaints) > NUM_NAMED:
            warn(f"{len(complaints) - NUM_NAMED:,} more images cannot be decoded and are left out.")
    return Screened(kept, list(complaints.values()))


def bad_images(split: Split, channels: int, num_threads: int, shown: bool) -> dict[int, str]:
    """Rows of the split whose images cannot be decoded, and why."""
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
    """Those of the rows whose images cannot be decoded, in order, and why."""

    def complaints(start: int) -> dict[int, str]:
        found = {}
        for row in rows[start : start + CHUNK].tolist():
            try:
                decode_pixels(split.encoded(row), channels)
            except BadImage as error:
                found[row] = complaint(split, row, error)
        return found

    bad: dict[int, str] = {}
    with ThreadPoolExecutor(num_threads) as pool, progress_bar(len(rows), 0, "checking", shown, unit="image") as bar:
        for start, found in zip(range(0, len(rows), CHUNK), pool.map(complaints, range(0, len(rows), CHUNK))):
            bad |= found
            bar.update(min(CHUNK, len(rows) - start))
    return bad


def complaint(split: Split, row: int, error: BadImage) -> str:
    """What is wrong with an image, and which one it is: "row 17 of train: ..."."""
    where = split.where(row)
    return str(error) if where in str(error) else f"{where}: {error}"


def read_known(path: Path, num_rows: int) -> np.ndarray:
    """What is known of each row of the table; all UNKNOWN where there is no file, or a damaged one. uint8 [num_rows]."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    digest, known = content[:32], content[32:]
    is_whole = len(known) == num_rows and digest == hashlib.sha256(FORMAT + known).digest()
    return np.frombuffer(known if is_whole else bytes(num_rows), np.uint8).copy()


def write_known(path: Path, known: np.ndarray, shown: bool) -> None:
    """Writes the file if it can; the next run checks anew otherwise."""
    try:
        with written_aside(path) as aside:
            aside.write_bytes(hashlib.sha256(FORMAT + known.tobytes()).digest() + known.tobytes())
    except OSError as error:
        warn(f"{path.parent} could not be written ({error.strerror or error}): the next run checks all images anew.")
