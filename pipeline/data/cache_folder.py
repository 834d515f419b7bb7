"""The folder of this package in the cache of `datasets`: its path and its locks."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SMALLEST_KEPT = 4 * 2**20  # bytes of encoded images; fewer decode in a fraction of a second
OVERHEAD = 1024  # the constant cost of decoding an image, in bytes of equal decoding time


def is_worth_keeping(num_bytes: int, num_images: int) -> bool:
    """Whether to cache the result of decoding images of that number and total size."""
    return num_bytes + OVERHEAD * num_images >= SMALLEST_KEPT


def cache_folder() -> Path:
    """HF_DATASETS_CACHE/decoded, resolved as in `datasets` but without importing it. The folder may not exist yet."""
    datasets = sys.modules.get("datasets")
    if datasets is not None:  # a program may have changed it after the import
        return Path(datasets.config.HF_DATASETS_CACHE) / "decoded"
    general = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(general, "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))).expanduser() / "decoded"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process prepares this file. Creates its folder.

    Without support for locks (a read-only folder, some network folders) it does not wait. Files are complete in any case,
    because they are written aside and renamed.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
