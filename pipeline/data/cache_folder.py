"""Our folder in the cache of `datasets`: where it lies, and one writer at a time."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SMALLEST_KEPT = 4 * 2**20  # bytes of encoded images; to decode fewer takes a fraction of a second
OVERHEAD = 1024  # bytes that take as long to decode as an image takes besides its bytes


def is_worth_keeping(num_bytes: int, num_images: int) -> bool:
    """Whether what is learned by decoding so many images of so many bytes is kept in a file."""
    return num_bytes + OVERHEAD * num_images >= SMALLEST_KEPT


def cache_folder() -> Path:
    """HF_DATASETS_CACHE/decoded, found as `datasets` finds it but without importing that; it may not exist yet."""
    datasets = sys.modules.get("datasets")
    if datasets is not None:  # a program may have set it after the import
        return Path(datasets.config.HF_DATASETS_CACHE) / "decoded"
    general = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(general, "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))).expanduser() / "decoded"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process prepares this file; makes its folder.

    Where the system gives no lock (a read-only or some network folder) there is none: files are whole all the same.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
