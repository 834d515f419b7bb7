"""Names of runs and paths of their files."""

import contextlib
import dataclasses
import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.settings.config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator  # it imports torch, which is not needed to read a run

MOST_BYTES = 80  # of each word of a new name; file systems allow 255 for all of it


@contextlib.contextmanager
def named_run(config: Config, accelerator: "Accelerator") -> Iterator[Config]:
    """Yields the settings with run_name filled in, the same on every rank.

    A new name is reserved by creating its folder, so that runs that start at the same time get different names. The folder is
    removed at the end if it is still empty. Raises ValueError if it cannot be created.
    """
    named = given_name(config)
    if named is not None:
        yield named
        return
    named = dataclasses.replace(config, run_name=new_name(config, accelerator))
    try:
        yield named
    finally:
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # it is not empty, or does not exist
                named.run_dir.rmdir()


def given_name(config: Config) -> Config | None:
    """The settings with the run_name that they, W&B or a checkpoint give; None if a new name is needed.

    If `resume` is a checkpoint, name and folder are those of its run. Under `wandb agent` the name consists of W&B's ids, so
    that a requeued trial resumes in its own folder. Raises ValueError for a launcher that restarts processes (max_restarts),
    because without a run_name the restarted processes would start a new run.
    """
    if config.run_name is not None:
        return config
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return dataclasses.replace(config, run_name=f"{os.environ['WANDB_SWEEP_ID']}-{os.environ['WANDB_RUN_ID']}")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and config.resume == "auto":
        raise ValueError("max_restarts needs a --run_name: the restarted processes resume the run of that name.")
    if config.resume not in ("auto", "never"):
        run_dir = Path(config.resume).resolve().parent.parent
        return dataclasses.replace(config, run_name=run_dir.name, output_dir=str(run_dir.parent))
    return None


def new_name(config: Config, accelerator: "Accelerator") -> str:
    """A name of dataset, model and start time, whose folder rank 0 has created. Every rank must call it.

    With dry_run no folder is created. Raises ValueError if it cannot be created.
    """
    words = [os.path.basename(os.path.abspath(config.dataset)), config.model_name, time.strftime("%Y%m%d-%H%M%S")]
    name = base = "-".join(map(plain, words))
    if accelerator.is_main_process:
        for number in itertools.count(2):
            if take_folder(Path(config.output_dir) / name, config.dry_run):
                break
            name = f"{base}-{number}"
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (name,) = broadcast_object_list([name])
    return name


def plain(word: str) -> str:
    """The word with `_` instead of what is not a letter, a digit, a dot or `_`, cut off after MOST_BYTES bytes of UTF-8."""
    safe = "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in word)
    return safe.encode()[:MOST_BYTES].decode(errors="ignore")


def take_folder(folder: Path, dry_run: bool) -> bool:
    """Creates the folder; False if it exists already. Raises ValueError if it cannot be created."""
    if dry_run:
        return not folder.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        return True
    except FileExistsError as error:
        if folder.exists():
            return False
        raise cannot_write(folder, error) from error
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> ValueError:
    is_long = error.errno == errno.ENAMETOOLONG
    advice = "Choose a shorter run_name" if is_long else "Make it writable, or choose another output_dir"
    return ValueError(f"Cannot write into {folder} ({error.strerror}). {advice}.")


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"
