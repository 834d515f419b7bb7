"""Writes, finds, verifies and prunes checkpoints: safetensors and JSON, written aside, synced and renamed.

checkpoints/step-<8 digits>/   *.safetensors, state.json (facts, and the size and SHA-256 of each file)
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.common.files import finite, folder_written_aside, remove_folder, tidy, write_json

Tensors = dict[str, Tensor]

FORMAT = 2  # increase it when the content of a checkpoint changes its meaning


class BadCheckpoint(ValueError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Tensors], facts: dict[str, Any], same_tensors: bool = False
) -> Path:
    """Writes checkpoints/step-<step>: one safetensors file per entry of `tensors`, and `facts` in state.json.

    It replaces a checkpoint of this step. same_tensors: that checkpoint contains the same tensors, and its files are linked
    instead of written, if the file system has hard links. Returns the folder. Raises OSError (a full disk, a read-only or
    missing folder) and then leaves the previous files unchanged.
    """
    from safetensors import SafetensorError

    final = checkpoint_path(run_dir, step)
    final.parent.mkdir(exist_ok=True)  # without parents: if run_dir is missing, a network drive may be unmounted
    tidy(final.parent, alone=True)
    try:
        # each epoch's last step is saved twice: before and after the validation
        with folder_written_aside(final, alone=True) as aside:
            files = (link_files(final, aside) if same_tensors else None) or write_files(aside, tensors)
            state = finite({"format": FORMAT, "step": step, "files": files, **facts})
            write_json(aside / "state.json", {**state, "sha256": own_sha256(state)})
    except SafetensorError as error:  # safetensors raises it for a full disk
        raise OSError(str(error)) from error
    return final


def write_files(folder: Path, tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """Writes a safetensors file for each entry; returns the size and SHA-256 of each file."""
    from safetensors.torch import save_file

    for name, content in tensors.items():
        # safetensors refuses channels-last and shared tensors
        save_file({key: value.detach().contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
    return {path.name: file_facts(path) for path in sorted(folder.iterdir())}


def link_files(source: Path, folder: Path) -> dict[str, Any] | None:
    """Links the files of a checkpoint into a folder. Returns their sizes and hashes in its state.json; None on failure."""
    try:
        files: dict[str, Any] = json.loads((source / "state.json").read_text())["files"]
        for name in files:
            os.link(source / name, folder / name)
        return files
    except (OSError, ValueError, KeyError):  # the file system has no hard links, or the folder is missing
        for path in folder.iterdir():
            path.unlink()
        return None


def recover(run_dir: Path) -> None:
    """Cleans up after a killed process: restores what it was replacing and deletes what is incomplete.

    Call it only in the process that holds the run's lock, while it writes nothing else there.
    """
    for folder in (run_dir, run_dir / "checkpoints"):
        if folder.is_dir():
            tidy(folder, alone=True)


def file_facts(path: Path) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def own_sha256(state: dict[str, Any]) -> str:
    """The SHA-256 of the content of state.json, independent of whitespace."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of state.json, after verifying it and the size and SHA-256 of each file. Raises BadCheckpoint."""
    try:
        facts = json.loads((folder / "state.json").read_text())
        listed, sha256 = dict(facts["files"]), facts.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder}: state.json cannot be read ({error})") from error
    if facts.get("format") != FORMAT:
        raise BadCheckpoint(f"{folder}: format {facts.get('format')} is not supported, this version reads format {FORMAT}")
    if sha256 != own_sha256(facts):
        raise BadCheckpoint(f"{folder}: state.json is damaged (SHA-256 mismatch)")
    for name, expected in listed.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise BadCheckpoint(f"{folder}: {name} is missing")
        if file_facts(folder / name) != expected:
            raise BadCheckpoint(f"{folder}: {name} is damaged (size or SHA-256 mismatch)")
    return facts


def recorded_dataset(folder: Path) -> dict[str, Any] | None:
    """The record of the dataset in a checkpoint that has been verified; None in one of an earlier version."""
    record = json.loads((folder / "state.json").read_text()).get("dataset")
    return record if isinstance(record, dict) else None


def read_tensors(folder: Path, name: str) -> Tensors:
    """Loads the tensors of one safetensors file of a checkpoint to the CPU. Raises BadCheckpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{folder}: {name}.safetensors cannot be read ({error})") from error


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of the run, newest first, not verified."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def prune(run_dir: Path, keep: int, best: Path | None) -> None:
    """Deletes all checkpoints except the newest `keep` and `best`. Call it only after a new checkpoint is complete."""
    for folder in checkpoints(run_dir)[keep:]:
        if folder != best:
            remove_folder(folder)
