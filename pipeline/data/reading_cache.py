"""What `datasets` made of a set, remembered beside the decoded images: its Arrow files, labels and class names.

So the next start asks the Hub for the set's commit alone and imports neither `datasets` nor pandas, and goes on where the
Hub is out of reach.
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

FORMAT = 1  # raised when what a record holds changes its meaning


class MappedTable:
    """Arrow files one after another, memory-mapped. Pickled for a worker process they are their names.

    Raises OSError or ValueError where one cannot be read.
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


def recall(asked: Sequence[str | None], state: object) -> Reading | None:
    """What was remembered of the set that was asked for so, if it is in that state and its Arrow files are as they were.

    state: None takes the last one that was remembered.
    """
    try:
        digest, _, text = record_path(asked).read_text().partition("\n")
        record = json.loads(text)
        if digest != sha256(text) or (state is not None and record["state"] != plain(state)):
            return None
        splits = {name: recalled_split(name, **facts) for name, facts in record["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, it is damaged, or a file is gone
        return None
    return splits, record["class_names"], record["notes"]


def recalled_split(name: str, files: list[Any], column: str, labels: list[int], origin: str) -> Split:
    """Raises ValueError where a file is not what it was, OSError where it cannot be read."""
    if files != plain([file_state(path) for path, *_ in files]):
        raise ValueError("an Arrow file has changed")
    return Split(name, MappedTable([path for path, *_ in files]), column, np.array(labels, np.int64), origin=origin)


def remember(asked: Sequence[str | None], state: object, reading: Reading) -> None:
    """Keeps what was read, if its tables are Arrow files as they are; where the cache cannot be written, nothing."""
    from datasets.table import list_table_cache_files

    splits, class_names, notes = reading
    record: dict[str, Any] = {"state": state, "class_names": class_names, "notes": notes, "splits": {}}
    for name, split in splits.items():
        paths = list_table_cache_files(split.table)
        mapped = MappedTable(paths).table if paths else None
        if mapped is None or mapped.num_rows != len(split) or mapped.schema.types != split.table.schema.types:
            return  # such as a column of plain bytes that was read as images
        record["splits"][name] = {
            "files": [file_state(path) for path in paths],
            "column": split.column,
            "labels": split.labels.tolist(),
            "origin": split.origin,
        }
    text, path = json.dumps(record), record_path(asked)
    with contextlib.suppress(OSError), locked(path), written_aside(path) as aside:
        aside.write_text(f"{sha256(text)}\n{text}")


def record_path(asked: Sequence[str | None]) -> Path:
    key = json.dumps([FORMAT, version("datasets"), *asked])
    return cache_folder() / f"{sha256(key)[:32]}.json"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: object) -> Any:
    """As it comes back from a record."""
    return json.loads(json.dumps(value))
