"""Loads an `ImageDataset` of train, val and test splits from a name in DATASETS, a folder or a Hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.common.suggestions import did_you_mean
from pipeline.data.hub import is_table_folder, read_hub_set, read_table_folder
from pipeline.data.image_folder import read_image_folder
from pipeline.data.known_datasets import DATASETS, IMAGENET_MEAN, IMAGENET_STD, DatasetRow
from pipeline.data.looks import Looks, looks_of
from pipeline.data.shard_index import is_tar_folder, stream_folder, stream_hub_set, stream_parquet_files
from pipeline.data.splits import Reading, Split, joined, stratified_rows
from pipeline.images.decode import GREY_MAX, BadImage, decode_image
from pipeline.images.files import first_of

__all__ = [
    "DATASETS",
    "BadImage",
    "DatasetRow",
    "ImageDataset",
    "Split",
    "check_dataset_name",
    "decode_image",
    "load_image_dataset",
    "stratified_rows",
]

BEFORE_TRAINING = -1  # the epoch in the address of the draws below; training epochs begin with 0
VALIDATION, SUBSET, HELD_OUT_TEST = 0, 1, 2  # the purpose in the address of a draw
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # those of ImageNet, averaged over the channels
HELD_OUT_FRACTION = 0.2
HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
DIGITS = Path(__file__).parent / "digits"


@dataclass(frozen=True)
class ImageDataset:
    """An image dataset ready for training.

    source describes its origin. mean and std are per channel, in units of 0..1. image_size is the side length if the images
    are small, square and all of one size, else None. flip: whether a mirrored image keeps its label. notes are messages for
    the user. bad_images holds one message for each skipped image.
    """

    name: str
    source: str
    train: Split
    val: Split
    test: Split
    class_names: list[str]
    image_size: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    notes: list[str]
    bad_images: list[str] = field(default_factory=list)
    grey_max: int = GREY_MAX


def check_dataset_name(name: str) -> None:
    """Raises ValueError, before anything is loaded, unless name is in DATASETS, a folder, or shaped like a Hub id."""
    path = Path(name).expanduser()
    if name in DATASETS or (name and path.is_dir()):
        return
    if path.is_file():
        raise ValueError(f"Dataset {name!r} is a file. Pass the folder that contains the images, Parquet or Arrow files.")
    if name.startswith((".", "/", "~", "\\")) or name.endswith("/") or name.count("/") > 1 or path.is_absolute():
        raise ValueError(f"No folder {name!r}: {path.absolute()} does not exist. Pass the path of the dataset with --dataset.")
    if HUB_ID.fullmatch(name):
        return
    hint, known = did_you_mean(name, DATASETS), ", ".join(DATASETS)
    raise ValueError(
        f"Unknown dataset {name!r}.{hint} Known: {known}; or a folder (there is no {path.absolute()}), or a Hub id "
        "(owner/name). Pass one with --dataset."
    )


def load_image_dataset(
    name: str,
    *,
    label_column: str | None = None,
    hub_config: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    max_train_samples: int | None = None,
    skip_bad_headers: bool = False,
    streamed: bool = False,
) -> ImageDataset:
    """Loads a dataset, reduces its training split to max_train_samples and creates its validation split.

    Validation is the validation split of the dataset if it also has a test split. Otherwise it is a stratified `val_fraction`
    of the training split, drawn with the seed; with 0, it is the test split. If the dataset has neither a test nor a validation
    split, a stratified fifth is held out as test, the same for every seed; a validation split alone is used as test.
    skip_bad_headers: whether to skip images without a readable header when image_size and channels are detected. streamed:
    whether the splits are StreamedSplits, with the same rows, whose images are not downloaded in advance. Raises ValueError if
    the dataset cannot be read or a setting does not fit it.
    """
    check_dataset_name(name)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"max_train_samples must be 1 or more, got {max_train_samples}.")
    row = _find_row(name)
    source, splits, class_names, notes = _read_checked(name, row, label_column, hub_config, streamed)
    if "train" not in splits:
        raise ValueError(f"{source} has no training split. Its splits: {', '.join(splits)}. Name one 'train'.")
    if len(class_names) < 2:
        raise ValueError(f"{source} has one class only ({', '.join(class_names)}). A classifier needs images of two or more.")
    looks = Looks(row.image_size, row.channels) if row else looks_of(splits["train"], skip_bad_headers)
    notes += looks.notes
    train, own_val, test = _with_test(splits, notes)
    if max_train_samples is not None and max_train_samples < len(train):
        train = train.select(stratified_rows(train.labels, max_train_samples, seed, BEFORE_TRAINING, SUBSET))
    train, val = _with_validation(train, own_val, test, val_fraction, seed, notes)
    notes += _classes_without_images(train, class_names)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if looks.channels == 3 else (GREY_MEAN, GREY_STD)
    return ImageDataset(
        name=name,
        source=source,
        train=train,
        val=val,
        test=test,
        class_names=class_names,
        image_size=looks.image_size,
        channels=looks.channels,
        grey_max=looks.grey_max,
        mean=row.mean if row else mean,
        std=row.std if row else std,
        flip=row.flip if row else True,
        notes=notes,
    )


def load_for_evaluation(
    name: str, split: str | None, *, label_column: str | None = None, hub_config: str | None = None
) -> tuple[ImageDataset, str]:
    """A dataset whose train, val and test are all the images to score, and the name of their split.

    A split of the dataset is used as it is, without a training split or with other classes than it. all: every image. None:
    every image of a dataset without splits, else test, or val if there is no test. train and val of a dataset with a training
    split, and every split of one without splits, are those of load_image_dataset. Raises ValueError for a split that is not
    there.
    """
    check_dataset_name(name)
    source, splits, class_names, notes = _read_checked(name, _find_row(name), label_column, hub_config, False, False)
    is_whole = list(splits) == ["train"]
    if split is None:
        split = "all" if is_whole else "test" if "test" in splits else "val"
    if split == "all":
        scored = joined(list(splits.values()), "all")
    elif split in splits and (split == "test" or "train" not in splits):
        scored = splits[split]
    elif "train" in splits:
        dataset = load_image_dataset(name, label_column=label_column, hub_config=hub_config)
        scored, class_names, notes = getattr(dataset, split), dataset.class_names, dataset.notes
    else:
        raise ValueError(f"{source} has no {split} split. Its splits: {', '.join(splits)}. Choose one with --split, or all.")
    dataset = ImageDataset(
        name=name,
        source=source,
        train=scored,
        val=scored,
        test=scored,
        class_names=class_names,
        image_size=None,  # the preprocessing of the model determines it
        channels=3,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=False,
        notes=notes,
    )
    return dataset, split


def _read_checked(
    name: str, row: DatasetRow | None, label_column: str | None, hub_config: str | None, streamed: bool, training: bool = True
) -> tuple[str, dict[str, Split], list[str], list[str]]:
    """Like _read, but raises ValueError for a split without images."""
    source, splits, class_names, notes = _read(name, row, label_column, hub_config, streamed, training)
    for split_name, split in splits.items():
        if not len(split):
            raise ValueError(f"The {split_name} split of {source} has no images. Add images, or remove the split.")
    notes = list(notes)
    if name in DATASETS and Path(name).is_dir():
        notes.append(f"The known set {name} is used, not the folder of that name; for the folder, write ./{name}.")
    return source, splits, class_names, notes


def _find_row(name: str) -> DatasetRow | None:
    """The row of a known name, or of a known Hub id if no folder has that name."""
    if name in DATASETS or Path(name).expanduser().is_dir():
        return DATASETS.get(name)
    return next((row for row in DATASETS.values() if row.hub_id == name), None)


def _read(
    name: str, row: DatasetRow | None, label_column: str | None, hub_config: str | None, streamed: bool, training: bool
) -> tuple[str, dict[str, Split], list[str], list[str]]:
    """The source in words, the splits of the dataset, the class names and notes."""
    if row and label_column is not None and label_column not in row.label_columns:
        known = ", ".join(row.label_columns)
        raise ValueError(f"{name} has no label column {label_column!r}. Its label columns: {known}.")
    folder = Path(name).expanduser()
    hub_id = row.hub_id if row else None if folder.is_dir() else name
    if hub_id is not None:
        column = label_column or (row.label_column if row else None)
        read = stream_hub_set if streamed else read_hub_set
        return f"Hub set {hub_id}", *read(hub_id, hub_config or (row.config if row else None), row, column)
    if hub_config is not None:
        raise ValueError(f"--hub_config {hub_config} has no effect on {name!r}, which is not a Hub set. Remove it.")
    if row:
        return "scikit-learn's digits, in this package", *(_stream_digits if streamed else _read_digits)(row)
    if streamed:
        return f"folder {folder}", *stream_folder(folder, label_column)
    if is_tar_folder(folder):
        raise ValueError(f"{folder} contains tar files (webdataset), which only --loader stream can read.")
    if is_table_folder(folder):
        return f"folder {folder}", *read_table_folder(folder, label_column)
    return f"folder {folder}", *read_image_folder(folder, label_column, training)


def _read_digits(row: DatasetRow) -> Reading:
    """Reads the embedded dataset without importing `datasets` (1.4 s), and pandas (0.4 s) via pq.read_table or to_numpy."""
    import pyarrow.parquet as pq

    splits = {}
    for name, file in row.splits.items():
        table = pq.ParquetFile(DIGITS / f"{file}.parquet").read()
        labels = np.array(table.column(row.label_column).to_pylist(), np.int64)
        splits[name] = Split(name, table, row.image_column, labels)
    return splits, list(row.class_names), []


def _stream_digits(row: DatasetRow) -> Reading:
    return stream_parquet_files({name: str(DIGITS / f"{file}.parquet") for name, file in row.splits.items()}, row)


def _with_test(splits: dict[str, Split], notes: list[str]) -> tuple[Split, Split | None, Split]:
    """Train, the validation split of the dataset if it also has a test split, and test."""
    train, val, test = splits["train"], splits.get("val"), splits.get("test")
    if test is not None:
        return train, val, test
    if val is not None:
        notes.append(f"There is no labelled test split: {val.origin} is used as test.")
        return train, None, val.select(np.arange(len(val)), "test")
    held_out = stratified_rows(train.labels, round(len(train) * HELD_OUT_FRACTION), 0, BEFORE_TRAINING, HELD_OUT_TEST, keep=1)
    if not len(held_out):
        raise ValueError(
            f"There is no test split, and {len(train)} images are too few to hold one out. Add images or a test split."
        )
    notes.append(
        f"There is no test split: {len(held_out)} of {len(train)} images are held out as test, the same for every seed."
    )
    return _without(train, held_out), None, train.select(held_out, "test")


def _with_validation(
    train: Split, own_val: Split | None, test: Split, val_fraction: float, seed: int, notes: list[str]
) -> tuple[Split, Split]:
    """Train without the rows of validation, and val."""
    if own_val is not None:
        notes.append(f"The set's own validation split is used ({len(own_val)} images); val_fraction has no effect.")
        return train, own_val
    if val_fraction == 0:
        notes.append("val_fraction 0: the test split is used as validation, so the best epoch is selected on it.")
        return train, test  # the same object, so that its images are in memory once
    size = round(len(train) * val_fraction)
    if not 0 < size < len(train):
        raise ValueError(
            f"val_fraction {val_fraction} of {len(train)} training images gives {size} for validation and leaves "
            f"{len(train) - size} for training; each needs at least one. Change val_fraction, or use more images."
        )
    rows = stratified_rows(train.labels, size, seed, BEFORE_TRAINING, VALIDATION, keep=1)
    if not len(rows):  # each class has one image, for example with a small max_train_samples
        rows = stratified_rows(train.labels, size, seed, BEFORE_TRAINING, VALIDATION)
    return _without(train, rows), train.select(rows, "val")


def _classes_without_images(train: Split, class_names: list[str]) -> list[str]:
    """A note on the classes without training images."""
    counts = np.bincount(train.labels, minlength=len(class_names))
    empty = [class_names[number] for number in np.flatnonzero(counts == 0)]
    return [f"{len(empty):,} of {len(class_names):,} classes have no training image: {first_of(empty)}."] if empty else []


def _without(split: Split, rows: np.ndarray) -> Split:
    return split.select(np.delete(np.arange(len(split)), rows))
