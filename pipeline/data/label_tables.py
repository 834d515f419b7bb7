"""Label tables: CSV and JSON Lines files beside images, with a column of file names and one of labels."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from pathlib import Path

import numpy as np

from pipeline.data.splits import role_within, split_role
from pipeline.images.files import KNOWN, is_folder, visible_entries

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
METADATA = ("metadata.csv", "metadata.jsonl")  # the names of Hugging Face
PREFERRED_FILES = ("file_name", "filename", "file", "image", "image_id", "filepath", "path", "img", "id")
PREFERRED_LABELS = (
    "label", "labels", "class", "target", "category", "class_name", "label_name", "class_id", "label_id", "diagnosis",
)  # fmt: skip
MISSING = ("", "nan", "none", "null", "na", "n/a")
UNLABELLED = (*MISSING, "-1")
SAMPLE_ROWS = 200


@dataclasses.dataclass
class LabelTable:
    """A table. columns: the values of each column as text. role: train, val, test, or None if the file name has none."""

    path: Path
    columns: dict[str, list[str]]
    role: str | None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def tables_in(folder: Path) -> list[Path]:
    """The CSV and JSON Lines files in the folder and in its subfolders for splits, labels or annotations.

    In other subfolders, only metadata.csv and metadata.jsonl are used.
    """
    entries = visible_entries(folder)
    found = [Path(entry.path) for entry in entries if entry.name.lower().endswith(ENDINGS)]
    for entry in filter(is_folder, entries):
        if role_within(entry.name) or re.search("label|annot|meta|csv", entry.name.lower()):
            inner = [Path(inner.path) for inner in visible_entries(entry.path)]
            found += [path for path in inner if path.name.lower().endswith(ENDINGS) and path.is_file()]
        else:
            found += [path for name in METADATA if (path := Path(entry.path, name)).is_file()]
    return [path for path in found if not re.search("submission", path.name.lower())]


def read_table(path: Path, root: Path) -> LabelTable:
    """Reads a table. Raises ValueError if the file is not a valid table."""
    role = role_of(path, root)
    try:
        text = decoded(path.read_bytes())
        columns = rows_of_json(text) if path.suffix.lower() in (".jsonl", ".ndjson") else rows_of_csv(text, path.suffix)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"Cannot read the table {path}: {error}. Repair it, or move it out of the folder.") from error
    return LabelTable(path, columns, role)


def role_of(path: Path, root: Path) -> str | None:
    """The split of a table by its name, or that of its folder."""
    return role_within(path.stem) or (split_role(path.parent.name) if path.parent != root else None)


def decoded(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def as_in_table(path: str) -> str:
    """A path as `decoded` gives it: the name of a file that is not UTF-8 is in Latin-1, as is the table that names it."""
    return path if path.isascii() else decoded(os.fsencode(path))


def rows_of_csv(text: str, suffix: str) -> dict[str, list[str]]:
    """The columns by name; without a header, column_1, column_2, ... Raises ValueError for rows of unequal length."""
    first = text.partition("\n")[0]
    delimiter = "\t" if suffix.lower() == ".tsv" else max(",;\t|", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    if not rows:
        return {}
    width = len(rows[0])
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != width), None)
    if wrong is not None:
        raise ValueError(f"row {wrong} has {len(rows[wrong - 1])} values, the first row {width}")
    names = [name.strip() for name in rows[0]]
    if any(os.path.splitext(name)[1].lower() in KNOWN for name in names):
        names, rows = [f"column_{number}" for number in range(1, width + 1)], [names, *rows]
    columns = [[value.strip() for value in values] for values in zip(*rows[1:])] or [[] for _ in names]
    return {name or f"column_{number}": values for number, (name, values) in enumerate(zip(names, columns), 1)}


def rows_of_json(text: str) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("each line must be a JSON object")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [as_text(row.get(name)) for row in rows] for name in names}


def as_text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


class FileIndex:
    """Finds the image for a file name in a table, among the images below a folder."""

    def __init__(self, root: Path, paths: list[str]):
        self.root, self.paths = root, paths
        self.relative = [as_in_table(os.path.relpath(path, root).replace(os.sep, "/")) for path in paths]
        self.places: dict[str, list[int]] = {}  # by file name, with and without its ending
        for number, path in enumerate(self.relative):
            name = path.rpartition("/")[2]
            stem, ending = os.path.splitext(name)
            for key in {name, stem if ending.lower() in KNOWN else name}:
                self.places.setdefault(key, []).append(number)

    def find(self, value: str, table: LabelTable) -> list[int]:
        """The numbers of the images that match the value; several if it is ambiguous.

        The value is a path, with or without its ending, relative to the table, to images/ or to any other folder. Of an absolute
        path, which may come from another machine, the last parts are matched. A table of a split only matches images that are
        not in the folder of another split.
        """
        value = value.replace("\\", "/").removeprefix("./")
        found = self.ending_with(value)
        if not found and (value.startswith("/") or re.match("[A-Za-z]:/", value)):
            parts = value.split("/")
            found = next(filter(None, (self.ending_with("/".join(parts[at:])) for at in range(1, len(parts)))), [])
        if ".." in value.split("/"):
            found = self.ending_with(os.path.normpath(self.beside(table) + value))
        if table.role:
            found = [number for number in found if self.role(number) in (None, table.role)]
        for folder in (self.beside(table), f"{self.beside(table)}images/") if len(found) > 1 else ():
            exact = [number for number in found if self.is_named(self.relative[number], folder + value)]
            if len(exact) == 1:
                return exact
        return found

    def ending_with(self, value: str) -> list[int]:
        numbers = self.places.get(value.rpartition("/")[2], [])
        return [number for number in numbers if self.is_named(f"/{self.relative[number]}", value, whole=False)]

    @staticmethod
    def is_named(path: str, value: str, whole: bool = True) -> bool:
        names = (path, os.path.splitext(path)[0])
        return value in names if whole else any(name.endswith(f"/{value}") for name in names)

    def beside(self, table: LabelTable) -> str:
        folder = os.path.relpath(table.path.parent, self.root).replace(os.sep, "/")
        return "" if folder == "." else f"{folder}/"

    def role(self, number: int) -> str | None:
        """The split of an image according to its top-level folder, or None."""
        first, slash, _ = self.relative[number].partition("/")
        return role_within(first) if slash else None


def file_column(table: LabelTable, index: FileIndex) -> str | None:
    """The column of file names: in a sample, most of its distinct values match images and few repeat. None if there is none."""
    best: tuple[int, int, str] | None = None
    rows = np.unique(np.linspace(0, max(len(table) - 1, 0), SAMPLE_ROWS).astype(int)).tolist() if len(table) else []
    for name, values in table.columns.items():
        sample = [values[row] for row in rows]
        named = {value for value in sample if value and index.find(value, table)}
        if 2 * len(named) > len(set(sample)) and 4 * len(named) >= len(sample):
            preference = -PREFERRED_FILES.index(name.lower()) if name.lower() in PREFERRED_FILES else -len(PREFERRED_FILES)
            best = max(best or (0, 0, ""), (len(named), preference, name))
    return best and best[2]


def label_candidates(table: LabelTable, files: str) -> list[str]:
    """The columns that may be labels, those with a name of PREFERRED_LABELS first.

    Excludes file names, splits, fractions, and columns whose values are all equal or all different.
    """
    candidates = []
    for name, values in table.columns.items():
        distinct = set(values) - {""}
        is_own = len(distinct) == len(values)
        is_split = len(distinct) > 1 and all(split_role(value) for value in distinct)
        if name != files and len(distinct) > 1 and not is_own and not is_split and not any(map(is_fraction, distinct)):
            candidates.append(name)
    return sorted(candidates, key=lambda name: not is_preferred(name))


def is_preferred(name: str) -> bool:
    return name.lower() in PREFERRED_LABELS


def is_fraction(value: str) -> bool:
    return re.fullmatch(r"[-+]?\d*\.\d*[1-9]\d*(e[-+]?\d+)?|[-+]?\d\.?\d*e[-+]?\d+", value.lower()) is not None


def label_text(value: str) -> str:
    """The class name of a label: 1.0 becomes 1."""
    return re.sub(r"\.0+$", "", value) if re.fullmatch(r"[-+]?\d+\.0+", value) else value
