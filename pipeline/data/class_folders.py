"""Reads folders of class folders: lists the image files. The images are read when they are used and not copied."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.data.splits import Reading, Split, find_splits, is_split_name
from pipeline.images.files import EXTENSIONS, images_below, visible_entries

LAYOUTS = (
    "Expected: FOLDER/train/CLASS/*.jpg (with val/ and test/ beside train/), or FOLDER/CLASS/*.jpg, or a folder of "
    f"Parquet or Arrow files. Images end in {' '.join(EXTENSIONS)}."
)


def read_class_folders(folder: Path) -> Reading:
    """The splits (train, val, test), the class names (the folder names of train, sorted) and notes for the user.

    If the folder contains split folders (train/, val/, test/), each of them contains class folders. Otherwise the subfolders
    are the classes of a single split. Raises ValueError if there is no image, a class is empty, or val or test has a class
    that train lacks.
    """
    folder = Path(os.path.abspath(folder))
    split_folders, notes = _split_folders(folder)
    files = {
        split: {class_folder.name: images_below(class_folder) for class_folder in _subfolders(root)}
        for split, root in split_folders.items()
    }
    _check_classes(files, split_folders)
    class_names = list(files["train"])
    for root in split_folders.values():
        loose = _image_count(root)
        if loose:
            notes.append(f"{loose} images in {root} are in no class folder and are not used.")
    splits = {split: _to_split(split, classes, class_names) for split, classes in files.items()}
    return splits, class_names, notes


def _subfolders(folder: str | Path) -> list[Path]:
    return [Path(entry.path) for entry in visible_entries(folder) if entry.is_dir()]


def _image_count(folder: Path) -> int:
    return sum(entry.name.lower().endswith(EXTENSIONS) and entry.is_file() for entry in visible_entries(folder))


def _split_folders(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Maps train, val and test to folders; and notes. A folder named train without subfolders is a class, not a split."""
    children = [path.name for path in _subfolders(folder)]
    splits = [name for name in children if is_split_name(name) and _subfolders(folder / name)]
    if not splits:
        return {"train": folder}, []
    found = find_splits(splits, f"The folder {folder}")
    unused = [name for name in children if name not in found.values()]
    notes = [f"Not used, because they are not split folders: {', '.join(unused)}."] if unused else []
    return {split: folder / name for split, name in found.items()}, notes


def _check_classes(files: dict[str, dict[str, list[str]]], roots: dict[str, Path]) -> None:
    """Raises ValueError for a split without classes, a class without images, or a class that train lacks."""
    for split, classes in files.items():
        if not any(classes.values()):
            raise ValueError(f"Found no images in class folders in {roots[split]}. {LAYOUTS}")
        empty = [name for name, paths in classes.items() if not paths]
        if empty:
            listed = ", ".join(empty)
            raise ValueError(f"No image in the class folders {listed} of {roots[split]}. Fill or remove them.")
        unknown = sorted(set(classes) - set(files["train"]))
        if unknown:
            raise ValueError(
                f"{roots[split]} has classes that {roots['train']} lacks: {', '.join(unknown)}. "
                f"The training classes: {', '.join(files['train'])}."
            )


def _to_split(name: str, classes: dict[str, list[str]], class_names: list[str]) -> Split:
    import pyarrow as pa

    paths = pa.array([path for paths in classes.values() for path in paths], pa.large_string())
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], names=["bytes", "path"])
    ids = [class_names.index(class_name) for class_name in classes]
    labels = np.repeat(np.array(ids, np.int64), [len(paths) for paths in classes.values()])
    return Split(name, pa.table({"image": images}), "image", labels)
