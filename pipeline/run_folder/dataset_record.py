"""The dataset that a run is trained on, recorded in its folder and its checkpoints; other images are refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common import console
from pipeline.common.files import write_json

Record = Mapping[str, Any]  # as data/fingerprint.py returns it, with `given`: the name that the user passed

MOST_NAMED = 5  # classes in a message


def record_path(run_dir: Path) -> Path:
    return run_dir / "dataset.json"


def write_record(run_dir: Path, record: Record) -> None:
    write_json(record_path(run_dir), record)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The record of a run; None if there is none, as in runs of earlier versions, or it is damaged."""
    try:
        record = json.loads(record_path(run_dir).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"path", "class_names", "splits"} <= record.keys() else None


def check_own_dataset(run_dir: Path, now: Record) -> None:
    """check_same_images with the record in the run's folder; a run without one is not checked."""
    recorded = read_record(run_dir)
    if recorded is not None:
        check_same_images(recorded, now, run_dir)


def check_same_images(recorded: Record, now: Record, run_dir: Path) -> None:
    """Raises ValueError, in one line that says what differs, unless both are the same images, wherever they are."""
    found = differences(recorded, now)
    before, after = recorded.get("commit"), now.get("commit")
    if found:
        if before != after:
            found.append(f"commit {before} -> {after}")
        raise ValueError(
            f"{place(now)} does not have the images that {run_dir} was trained on ({place(recorded)}): {'; '.join(found)}. "
            "Restore them, or pass the path of the original dataset with --dataset."
        )
    if before and after and before != after:
        console.warn(
            f"{place(now)} has another commit on the Hub than when {run_dir} was started ({before} -> {after}), with the same "
            "images."
        )


def place(record: Record) -> str:
    return str(record.get("path") or record.get("given"))


def differences(recorded: Record, now: Record) -> list[str]:
    """What differs in classes, counts and images, in words; empty for the same images."""
    found = class_differences(recorded["class_names"], now["class_names"])
    for name, before in recorded["splits"].items():
        after = now["splits"][name]
        if before["count"] != after["count"]:
            counts = [named(recorded, before, "class_counts"), named(now, after, "class_counts")]
            found.append(f"{name} {before['count']} -> {after['count']} images{in_classes(*counts)}")
        elif before["labels"] != after["labels"]:
            found.append(f"the labels of {name} differ")
        elif before["kind"] == after["kind"] and before["images"] != after["images"] and not found:
            hashes = [named(recorded, before, "class_images"), named(now, after, "class_images")]
            classes = changed_classes(*hashes)
            where = f" of {', '.join(classes[:MOST_NAMED])}" if classes else ""
            found.append(f"images{where} in {name} differ in name or size")
    return found


def class_differences(before: list[str], after: list[str]) -> list[str]:
    parts = {
        "missing": [name for name in before if name not in set(after)],
        "added": [name for name in after if name not in set(before)],
    }
    found = [f"classes {verb}: {shortened(names)}" for verb, names in parts.items() if names]
    return found or (["the classes have another order"] if before != after else [])


def shortened(names: list[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def named(record: Record, split: Record, key: str) -> dict[str, Any]:
    """The values of a split by class name; empty for datasets with too many classes."""
    return dict(zip(record["class_names"], split.get(key, [])))


def in_classes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """` (daisy 20 -> 50, rose 20 -> 40)`: the classes whose number of images differs."""
    classes = changed_classes(before, after)
    parts = [f"{name} {before.get(name, 0)} -> {after.get(name, 0)}" for name in classes]
    return f" ({shortened(parts)})" if parts else ""


def changed_classes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
