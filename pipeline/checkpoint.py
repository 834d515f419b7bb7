"""Checkpoints: safetensors and JSON, written aside, synced and renamed; found, verified and pruned.

checkpoints/step-<8 digits>/   *.safetensors, state.json (facts, and each file's size and SHA-256)
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

Tensors = dict[str, Tensor]

FORMAT = 1  # raised when a checkpoint's content changes its meaning


class BadCheckpoint(ValueError):
    """A checkpoint that is incomplete, damaged or not one of ours."""


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run_dir: Path, step: int, tensors: Mapping[str, Tensors], facts: dict[str, Any]) -> Path:
    """Writes checkpoints/step-<step>: one safetensors file per entry of tensors, and the facts in state.json.

    Rank 0 calls it. Raises OSError (a full disk, a read-only folder) and leaves nothing but what was there before.
    """
    from safetensors.torch import save_file

    final = checkpoint_path(run_dir, step)
    aside = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, content in tensors.items():
            # safetensors refuses channels-last and shared tensors
            save_file(
                {key: value.detach().contiguous() for key, value in content.items()}, aside / f"{name}.safetensors"
            )
        files = {path.name: file_facts(path) for path in sorted(aside.iterdir())}
        write_json(aside / "state.json", {"format": FORMAT, "step": step, "files": files, **facts})
        for name in files:
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(aside)
        if final.exists():  # the same step saved again, by an interruption right after a checkpoint for example
            shutil.rmtree(final)
        os.rename(aside, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def file_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_facts(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json, after each file's size and SHA-256 were found right. Raises BadCheckpoint."""
    try:
        facts = json.loads((folder / "state.json").read_text())
        listed = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder}: state.json cannot be read ({error})") from error
    if facts.get("format") != FORMAT:
        raise BadCheckpoint(f"{folder}: has format {facts.get('format')}, this version reads {FORMAT}")
    for name, expected in listed.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise BadCheckpoint(f"{folder}: {name} is missing")
        if file_facts(folder / name) != expected:
            raise BadCheckpoint(f"{folder}: {name} is damaged (its size or SHA-256 is not what state.json says)")
    return facts


def read_tensors(folder: Path, name: str) -> Tensors:
    """The tensors of one safetensors file of a checkpoint, on the CPU. Raises BadCheckpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{folder}: {name}.safetensors cannot be read ({error})") from error


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, the newest first; not yet verified."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and a sentence for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in checkpoints(run_dir):
        try:
            read_facts(folder)
            return folder, passed_over
        except BadCheckpoint as error:
            passed_over.append(f"Passed over {error}.")
    return None, passed_over


def prune(run_dir: Path, keep: int, best: Path | None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one. Called after a new one is whole."""
    for folder in checkpoints(run_dir)[keep:]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def lock_run(run_dir: Path) -> IO[str]:
    """Takes the run's lock; it is held while the returned file is open, and the system frees it when the process ends.

    Raises ValueError when another process trains in this folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(
            f"{run_dir} is in use by {holder or 'another process'}. Wait for it, or choose another run_name."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
