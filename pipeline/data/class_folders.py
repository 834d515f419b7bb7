"""Reads folders of class folders: lists the image files. The images are read when they are used and not copied."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np

from pipeline.data.splits import ACCEPTED_NAMES, Reading, Split, find_splits, role_within, split_role
from pipeline.images.files import EXTENSIONS, FolderWalk, LeftOut, first_of, is_folder

LAYOUTS = (
    "Expected: FOLDER/train/CLASS/*.jpg (with val/ and test/ beside train/), FOLDER/CLASS/*.jpg, images and a CSV file with "
    "a column of file names and one of labels, or Parquet or Arrow files."
)
RUN_FILES = ("summary.json", "metrics.jsonl", "checkpoints")  # every run folder has one of them, beside config.yaml
MOST_LOOKED_AT = 100  # entries of a folder that are checked for runs


@dataclasses.dataclass
class ClassFolders:
    """The image files of a folder by split and class folder.

    roots: the folder of each split. files: the sorted class names of each split, with their image paths.
    """

    folder: Path
    roots: dict[str, Path]
    files: dict[str, dict[str, list[str]]]
    inner: dict[str, list[str]]  # the names of the subfolders of each listed folder
    notes: list[str]


def read_class_folders(folder: Path, for_training: bool = True) -> Reading:
    """The splits (train, val, test), the class names (sorted folder names) and notes for the user.

    If the folder contains split folders (train/, val/, test/), each of them contains class folders. Otherwise the subfolders are
    the classes of a single split. for_training: the classes are those of train; otherwise those of all splits, and train may be
    missing. Raises ValueError if there is no image; for training also if a training class is empty, there are fewer than two
    classes, or val or test has a class that train lacks.
    """
    found = find_class_folders(folder)
    if for_training and "train" in found.files:
        check_classes(found)
        return to_reading(found, list(found.files["train"]))
    return to_reading(found, sorted({name for classes in found.files.values() for name in classes}))


def find_class_folders(folder: Path) -> ClassFolders:
    """Finds splits, classes and images. Raises ValueError if class folders have no images or the splits are ambiguous."""
    folder = Path(os.path.abspath(folder))
    children, notes = class_candidates(folder)
    names = split_folders(folder, children)
    found = list_classes(folder, names, children, notes)
    if not names:
        names = splits_of_siblings(found)
        if names:
            found = list_classes(folder, names, children, notes)
    for split, classes in found.files.items():
        if not any(classes.values()):
            raise ValueError(f"Found no images in class folders in {found.roots[split]}.{loose_images(found)} {LAYOUTS}")
    return found


def class_candidates(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the subfolders that may contain images, and notes on those that are output of this program or W&B."""
    children = FolderWalk(folder).subfolders()
    outputs = [name for name in children if is_output(folder / name)]
    notes = [f"Not used, because this program or W&B wrote them: {', '.join(outputs)}."] if outputs else []
    return [name for name in children if name not in outputs], notes


def is_output(folder: Path, depth: int = 2) -> bool:
    """Whether the folder is, or contains down to this depth, a run, a report or W&B files. Stops at the first image."""
    if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in RUN_FILES):
        return True
    if (folder / "results.csv").is_file() and (folder / "report.md").is_file():
        return True
    if folder.name == "wandb" and any(next(folder.glob(pattern), None) for pattern in ("*run-*", "latest-run")):
        return True
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MOST_LOOKED_AT):
            if is_folder(entry):
                if depth and is_output(Path(entry.path), depth - 1):
                    return True
            elif entry.name.lower().endswith(EXTENSIONS):
                return False
    return False


def split_folders(folder: Path, children: list[str]) -> dict[str, str]:
    """Maps train, val and test to folder names. A folder named train without subfolders is a class, not a split."""

    def holds_folders(name: str) -> bool:
        return bool(FolderWalk(folder / name).subfolders())

    names = [name for name in children if split_role(name) and holds_folders(name)]
    if names and not any(split_role(name) == "train" for name in names):
        names += [name for name in children if role_within(name) == "train" and holds_folders(name)][:1]
        return {role_within(name) or "": name for name in names}
    return find_splits(names, f"The folder {folder}")


def list_classes(folder: Path, names: dict[str, str], children: list[str], notes: list[str]) -> ClassFolders:
    """Lists the images of each split, or of the folder as one split if `names` is empty."""
    left_out = LeftOut()
    roots = {split: unwrapped(folder / name) for split, name in names.items()} if names else {"train": folder}
    files: dict[str, dict[str, list[str]]] = {}
    inner: dict[str, list[str]] = {}
    notes = list(notes)
    for split, root in roots.items():
        walk = FolderWalk(root, left_out)
        classes = [name for name in walk.subfolders() if names or name in children]
        files[split] = {name: walk.images(name) for name in classes}
        inner |= walk.folders
    unused = [name for name in children if names and name not in names.values()]
    if unused:
        notes.append(f"Not used, because they are not split folders: {first_of(unused)}.")
    for root in roots.values():
        loose = len(FolderWalk(root, left_out).images_beside())
        if loose:
            notes.append(f"{loose:,} images in {root} are in no class folder and are not used.")
    return ClassFolders(folder, roots, files, inner, [*notes, *left_out.notes()])


def unwrapped(root: Path) -> Path:
    """The only subfolder of a split folder if it has the same role, as in seg_train/seg_train; otherwise the split folder."""
    inner = FolderWalk(root).subfolders()
    return root / inner[0] if len(inner) == 1 and role_within(inner[0]) == role_within(root.name) else root


def splits_of_siblings(found: ClassFolders) -> dict[str, str]:
    """Maps train, val and test to sibling folders whose names mean splits and that contain class folders; empty for classes.

    Raises ValueError if siblings contain folders of the same names, as splits do, but have other names; and if their names mean
    splits but they contain images without class folders.
    """
    used = {name: paths for name, paths in found.files["train"].items() if paths}
    roles = {name: role_within(name) for name in used}
    are_splits = len(used) > 1 and None not in roles.values() and len(set(roles.values())) == len(used)
    inner = {name: found.inner[str(found.folder / name)] for name in used}
    are_flat = any(not inner[name] or holds_directly(found.folder / name, paths) for name, paths in used.items())
    if are_splits and not are_flat and "train" in roles.values():
        return {role: name for name, role in roles.items() if role}
    flat = [name for name, role in roles.items() if role]
    if len({roles[name] for name in flat}) > 1:
        raise ValueError(
            f"The folders {first_of(flat)} of {found.folder} have names of splits, but contain images without class "
            f"folders, and no table beside them has labels. {LAYOUTS}"
        )
    if len(used) < 2 or are_flat:
        return {}
    common = sorted(set.intersection(*map(set, inner.values())))
    largest: set[str] = max(map(set, inner.values()), key=len)
    # one common folder is not enough: each class of Tiny ImageNet has its images in images/
    if len(common) < 2 or any(set(names) - largest for names in inner.values()):
        return {}
    names, first = first_of(list(used)), next(iter(used))
    if all(map(split_role, common)):
        raise ValueError(
            f"The class folders {names} of {found.folder} contain splits ({first_of(common)}). Move the classes into the splits: "
            f"{common[0]}/{first} instead of {first}/{common[0]}."
        )
    raise ValueError(
        f"The folders {names} of {found.folder} contain folders of the same names ({first_of(common)}), as splits do. If they "
        f"are splits, rename them ({ACCEPTED_NAMES}). If they are classes, move them into a folder train."
    )


def holds_directly(folder: Path, paths: list[str]) -> bool:
    return any(os.path.dirname(path) == str(folder) for path in paths)


def check_classes(found: ClassFolders) -> None:
    """Raises ValueError for a training class without images, fewer than two classes, or a class that train lacks."""
    if "train" not in found.files:
        return  # image_dataset raises the error
    train, root = found.files["train"], found.roots["train"]
    used = [name for name, paths in train.items() if paths]
    if len(used) < 2:
        raise ValueError(f"{root} has only one class folder with images, {used[0]}.{classes_below(found, used[0])} {LAYOUTS}")
    if len(used) < len(train):
        empty = first_of([name for name in train if name not in used])
        raise ValueError(f"No image in the class folders {empty} of {root}. Fill or remove them.")
    for split, classes in found.files.items():
        unknown = sorted(name for name in set(classes) - set(train) if classes[name])
        if unknown:
            raise ValueError(
                f"{found.roots[split]} has classes that {root} lacks: {first_of(unknown)}. "
                f"The training classes: {first_of(list(train))}."
            )


def classes_below(found: ClassFolders, name: str) -> str:
    """Advice if the classes are below a single class folder; otherwise an empty string."""
    root = found.roots["train"]
    folder = root / name
    while len(inner := found.inner[str(folder)]) == 1:
        folder /= inner[0]
    if not inner:
        return ""
    if root == found.folder:
        return f" The classes seem to be in {folder} ({first_of(inner)}): use --dataset {folder}."
    return f" The classes seem to be in {folder} ({first_of(inner)}): move them up into {root}."


def loose_images(found: ClassFolders) -> str:
    loose = len(FolderWalk(found.folder).images_beside())
    return f" {loose:,} images are in {found.folder} itself." if loose else ""


def to_reading(found: ClassFolders, class_names: list[str]) -> Reading:
    """The splits of the files in class folders, the class names and the notes."""
    numbers = {name: number for number, name in enumerate(class_names)}
    splits = {}
    for split, classes in found.files.items():
        paths = [path for files in classes.values() for path in files]
        counts = [len(files) for files in classes.values()]
        known = [numbers.get(name, -1) for name in classes]  # -1: an empty folder of a class that is not in train
        splits[split] = split_of_files(split, paths, np.repeat(np.array(known, np.int64), counts))
    return splits, [printable(name) for name in class_names], found.notes


def printable(name: str) -> str:
    """The name with bytes that are not UTF-8 as escapes, so that any file or terminal can contain it."""
    return name.encode("utf-8", "backslashreplace").decode()


def split_of_files(name: str, paths: list[str], labels: np.ndarray) -> Split:
    """A split of image files. labels: int64 [N]."""
    import pyarrow as pa

    column = pa.array(map(os.fsencode, paths), pa.large_binary())  # not strings: names on disk need not be UTF-8
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), column], names=["bytes", "path"])
    return Split(name, pa.table({"image": images}), "image", labels)
