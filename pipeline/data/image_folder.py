"""Reads a folder of image files: labels come from a table beside the images, or from the names of class folders."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.data.class_folders import class_candidates, read_class_folders, split_of_files
from pipeline.data.label_tables import (
    METADATA,
    MISSING,
    UNLABELLED,
    FileIndex,
    LabelTable,
    file_column,
    is_preferred,
    label_candidates,
    label_text,
    read_table,
    role_of,
    tables_in,
)
from pipeline.data.splits import Reading, Split, find_splits
from pipeline.images.files import FolderWalk, LeftOut, first_of

SMALLEST_SHARE = 0.2  # the smallest fraction of the images in a table that takes precedence over class folders
Rows = dict[str, list[tuple[str, str, str]]]  # by split: path of the image, label, and a description of the row


@dataclasses.dataclass
class Tables:
    """The label tables of a folder and its images. files: the column of file names of each table."""

    folder: Path
    index: FileIndex
    tables: list[LabelTable]
    files: dict[Path, str]
    notes: list[str]

    @property
    def main(self) -> LabelTable:
        """The table of the training split, or the only one."""
        return next((table for table in self.tables if table.role == "train"), self.tables[0])


def read_image_folder(folder: Path, label_column: str | None, for_training: bool = True) -> Reading:
    """The splits (train, val, test), the class names and notes for the user.

    A table with a column of file names and a column of labels takes precedence, unless the class folders have the same labels.
    label_column: the column of labels, which a table must have. Raises ValueError for unreadable files, and if table and
    folders give ambiguous labels.
    """
    folder = Path(os.path.abspath(folder))
    found = find_tables(folder)
    if found is None:
        if label_column is not None:
            raise ValueError(
                f"--label_column {label_column} has no effect on {folder}: its folder names are the classes, and no table (CSV, "
                "JSON Lines) contains its file names. Remove it."
            )
        return read_class_folders(folder, for_training)
    if label_column is not None:
        return read_tables(found, check_label_column(found, label_column), for_training)
    candidates = label_candidates(found.main, found.files[found.main.path])
    is_clear = len(candidates) == 1 or bool(candidates) and is_preferred(candidates[0])
    choice = ", ".join(candidates)
    try:
        reading = read_class_folders(folder, for_training)
    except ValueError as error:
        if is_clear:
            return read_tables(found, candidates[0], for_training)
        several = f"several columns that may be the label ({choice}). Choose one with --label_column."
        raise ValueError(
            f"{found.main.path} contains the file names, but has {several if candidates else f'no label column. {error}'}"
        ) from error
    if is_confirmed(found):
        return reading
    splits, class_names, notes = reading
    has_few = len(found.main) < SMALLEST_SHARE * len(found.index.paths)  # such as a list of the classes
    is_numbered = len({re.sub(r"\d+", "", name) for name in class_names}) == 1 and re.search("[A-Za-z]", class_names[0])
    if is_clear and not has_few and (is_numbered or found.main.path.name in METADATA or is_preferred(candidates[0])):
        return read_tables(found, candidates[0], for_training)
    if candidates and not has_few and (is_clear or is_numbered):
        raise ValueError(
            f"The folders of {folder} ({first_of(class_names)}) and the table {found.main.path} ({choice}) may both name the "
            f"classes, and they differ. Choose a column with --label_column, or move the table out of the folder."
        )
    note = f"Classes are the folders' names; {found.main.path.name} is not used (--label_column takes a column: {choice})."
    return splits, class_names, [*notes, note] if candidates else notes


def find_tables(folder: Path) -> Tables | None:
    """The tables with file names of the folder's images; None if there are none. Raises ValueError if two are ambiguous."""
    tables, unreadable = readable_tables(folder)
    if not tables:
        return None
    left_out = LeftOut()
    children, notes = class_candidates(folder)
    notes += unreadable
    walk = FolderWalk(folder, left_out)
    paths = [path for name in walk.subfolders() if name in children for path in walk.images(name)] + walk.images_beside()
    index = FileIndex(folder, paths)
    files = {table.path: column for table in tables if (column := file_column(table, index)) is not None}
    usable = [table for table in tables if table.path in files]
    with_role = [table for table in usable if table.role]
    if any(table.role == "train" for table in with_role):
        usable = with_role
    labelled = [table for table in usable if label_candidates(table, files[table.path])] or usable
    for role in {table.role for table in labelled}:
        same = [str(table.path) for table in labelled if table.role == role]
        if len(same) > 1:
            raise ValueError(f"The tables {' and '.join(same)} both have file names and labels. Keep only one in the folder.")
    if not usable:
        return None
    kept = [table for table in usable if table in labelled or table.role not in {other.role for other in labelled}]
    unused = [table.path.name for table in tables if table not in kept]
    left_out.files.subtract(path.suffix.lower() for path in (table.path for table in tables))
    left_out.files = +left_out.files
    notes += [f"Tables that are not used: {first_of(unused)}."] if unused else []
    return Tables(folder, index, kept, files, [*notes, *left_out.notes()])


def readable_tables(folder: Path) -> tuple[list[LabelTable], list[str]]:
    """The tables of the folder, and notes on those that cannot be read. Raises ValueError if these have names of label tables."""
    tables, notes = [], []
    for path in tables_in(folder):
        try:
            tables.append(read_table(path, folder))
        except ValueError as error:
            if path.name in METADATA or role_of(path, folder):
                raise
            notes.append(f"Not used: {error}")
    return tables, notes


def check_label_column(found: Tables, column: str) -> str:
    """Raises ValueError if the table lacks the column, or if its values cannot be classes."""
    table = found.main
    if column not in table.columns:
        raise ValueError(f"{table.path} has no column {column!r}. Its columns: {', '.join(table.columns)}.")
    distinct = set(table.columns[column])
    if len(distinct) == len(table) or len(distinct) < 2:
        kind = "a different value for each image" if len(distinct) > 1 else "only one value"
        raise ValueError(f"Column {column} of {table.path} has {kind}, so it cannot be the label. Choose another one.")
    return column


def is_confirmed(found: Tables) -> bool:
    """Whether a column of the table agrees with the class folders: a one-to-one mapping of its values to folder names."""
    table = found.main
    numbers = [found.index.find(value, table) for value in table.columns[found.files[table.path]]]
    folders = [os.path.dirname(found.index.paths[places[0]]) if places else "" for places in numbers]
    names = [os.path.basename(folder) for folder in folders]
    for values in table.columns.values():
        pairs = {(name, value) for name, value in zip(names, values) if name}
        if len(pairs) == len({name for name, _ in pairs}) == len({value for _, value in pairs}) > 1:
            return True
    return False


def read_tables(found: Tables, column: str, for_training: bool) -> Reading:
    """The images of the tables, with the column as labels. Raises ValueError if rows have no label, or a label is ambiguous."""
    rows: Rows = {}
    notes = list(found.notes)
    seen: dict[str, str] = {}
    for table in found.tables:
        if column not in table.columns or {value.lower() for value in table.columns[column]} <= {*UNLABELLED}:
            if table is found.main:
                raise ValueError(f"{table.path} has no labels in its column {column}.")
            notes.append(f"{table.path.name} has no labels (column {column}) and is not used.")
            continue
        own, missing = rows_of(table, column, found, seen)
        if missing:
            notes.append(f"{len(missing):,} rows of {table.path.name} refer to missing images: {first_of(missing)}.")
        for split, more in own.items():
            rows.setdefault(split, []).extend(more)
    if "train" not in rows and len(rows) == 1 and all(table.role is None for table in found.tables):
        rows = {"train": next(iter(rows.values()))}
    if len(seen) < len(found.index.paths):
        notes.append(f"{len(found.index.paths) - len(seen):,} images have no row with a label and are not used.")
    if overlap := set.intersection(*({path for path, _, _ in own} for own in rows.values())) if len(rows) > 1 else set():
        notes.append(f"{len(overlap):,} images are in {' and '.join(rows)}: {first_of(sorted(overlap))}.")
    defining = ["train"] if for_training and "train" in rows else list(rows)
    class_names = sorted_names({label for split in defining for _, label, _ in rows[split]})
    notes.append(f"Labels: column {column} of {', '.join(table.path.name for table in found.tables)}.")
    return {split: to_split(split, rows[split], class_names) for split in find_splits(rows, "")}, class_names, notes


def sorted_names(labels: set[str]) -> list[str]:
    """Sorts labels numerically if all are whole numbers, otherwise alphabetically."""
    return sorted(labels, key=int if all(re.fullmatch(r"-?\d+", label) for label in labels) else None)


def rows_of(table: LabelTable, column: str, found: Tables, seen: dict[str, str]) -> tuple[Rows, list[str]]:
    """The images of the table by split, and the file names without an image. seen: the labels of all images so far; updated.

    Raises ValueError, with the row, for a missing label, an ambiguous file name, and an image with two labels.
    """
    rows: Rows = {}
    missing = []
    values, labels = table.columns[found.files[table.path]], table.columns[column]
    places = [found.index.find(value, table) for value in values]
    splits = splits_of_rows(table, places, found.index)
    for number, (value, label, numbers, split) in enumerate(zip(values, labels, places, splits), 1):
        where = f"Row {number} of {table.path}"
        if not numbers:
            missing.append(value)
            continue
        path = found.index.paths[numbers[0]]
        if len(numbers) > 1:
            others = ", ".join(found.index.relative[other] for other in numbers[:3])
            raise ValueError(f"{where}: {value!r} may mean any of {others}. Write the path in the table.")
        if label.lower() in MISSING:
            count = sum(other.lower() in MISSING for other in labels)
            raise ValueError(
                f"{where} has no {column} ({count} such rows). Repair or remove these rows, or choose "
                "another column with --label_column."
            )
        label = label_text(label)
        if seen.setdefault(path, label) != label:
            raise ValueError(
                f"{where} gives {value!r} a second label ({seen[path]} and {label}). Only one label per "
                "image is supported, not multi-label datasets or boxes."
            )
        rows.setdefault(split, []).append((path, label, where))
    for split, own in rows.items():
        rows[split] = list({path: (path, label, where) for path, label, where in own}.values())  # each image once
    return rows, missing


def splits_of_rows(table: LabelTable, places: list[list[int]], index: FileIndex) -> list[str]:
    """The split of each row: from the table, from a column of split names, or from the folder of the image; else train."""
    if table.role is not None:
        return [table.role] * len(table)
    for values in table.columns.values():
        names = Counter(values)
        try:
            found = find_splits(names, str(table.path))
        except ValueError:
            continue
        if "train" in found and 1 < len(found) == len(names):
            return [next(ours for ours, theirs in found.items() if theirs == value) for value in values]
    roles = [index.role(numbers[0]) if numbers else "" for numbers in places]
    if "train" in roles and None not in roles and len({*roles} - {""}) > 1:
        return [role or "train" for role in roles]
    return ["train"] * len(table)


def to_split(name: str, rows: list[tuple[str, str, str]], class_names: list[str]) -> Split:
    """The split of these rows. Raises ValueError, with the row, for a label that no training image has."""
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    for _, label, where in rows:
        if label not in numbers:
            raise ValueError(
                f"{where} has the label {label!r}, which no training image has. The training classes: "
                f"{first_of(class_names)}."
            )
    labels = np.array([numbers[label] for _, label, _ in rows], np.int64)
    return split_of_files(name, [path for path, _, _ in rows], labels)
