"""Caches how `datasets` read a dataset, beside the decoded images: its Arrow files, labels and class names.

The next start then requests only the commit of the dataset from the Hub, imports neither `datasets` nor pandas, and also works
if the Hub cannot be reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.files import written_aside
from pipeline.data.cache_folder import cache_folder, locked
from pipeline.data.splits import Reading, Split, file_state

FORMAT = 2  # increase it when the content of a record changes its meaning


class MappedTable:
    """Memory-mapped Arrow files as one table. Pickles as the file names, for worker processes.

    Raises OSError or ValueError if a file cannot be read.
    """

    def __init__(self, paths: list[str]):
        import pyarrow as pa

        self.paths = paths
        self.table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTable, (self.paths,)

    @property
    def num_rows(self) -> int:
        return int(self.table.num_rows)


def load(request: Sequence[str | None], state: object) -> Reading | None:
    """The cached reading of a request, or None if there is none for this state or an Arrow file has changed.

    request: what was read, and how. state: the commit, or the file sizes and times; None accepts the last cached state.
    """
    try:
        digest, _, text = record_path(request).read_text().partition("\n")
        record = json.loads(text)
        if digest != sha256(text) or (state is not None and record["state"] != plain(state)):
            return None
        splits = {name: load_split(name, **facts) for name, facts in record["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # the record is missing or damaged, or an Arrow file is missing
        return None
    return splits, record["class_names"], record["notes"]


def load_split(name: str, files: list[Any], column: str, labels: list[int], origin: str) -> Split:
    """Raises ValueError if a file has changed, OSError if it cannot be read."""
    if files != plain([file_state(path) for path, *_ in files]):
        raise ValueError("an Arrow file has changed")
    return Split(name, MappedTable([path for path, *_ in files]), column, np.array(labels, np.int64), origin=origin)


def store(request: Sequence[str | None], state: object, reading: Reading) -> None:
    """Caches a reading whose tables are unmodified Arrow files. Does nothing if the cache is not writable."""
    from datasets.table import list_table_cache_files

    splits, class_names, notes = reading
    record: dict[str, Any] = {"state": state, "class_names": class_names, "notes": notes, "splits": {}}
    for name, split in splits.items():
        paths = list_table_cache_files(split.table)
        mapped = MappedTable(paths).table if paths else None
        if mapped is None or mapped.num_rows != len(split) or mapped.schema.types != split.table.schema.types:
            return  # for example a column of plain bytes that was cast to images
        record["splits"][name] = {
            "files": [file_state(path) for path in paths],
            "column": split.column,
            "labels": split.labels.tolist(),
            "origin": split.origin,
        }
    text, path = json.dumps(record), record_path(request)
    with contextlib.suppress(OSError), locked(path), written_aside(path) as aside:
        aside.write_text(f"{sha256(text)}\n{text}")


def record_path(request: Sequence[str | None]) -> Path:
    key = json.dumps([FORMAT, version("datasets"), *request])
    return cache_folder() / f"{sha256(key)[:32]}.json"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: object) -> Any:
    """The value after a round trip through JSON, as a record returns it."""
    return json.loads(json.dumps(value))
