"""Columns of labels in tables: types that are taken, what is refused, and files and splits that are not used."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.image_dataset import load_image_dataset

ROWS = 20


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [png(number) for number in range(rows)], **columns}), path)


def numbers(remainder: int, kind=int) -> list:
    return [kind(row % remainder) for row in range(ROWS)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "labels, names",
    [
        (numbers(2, bool), ["False", "True"]),
        (numbers(2, float), ["0", "1"]),
        (numbers(12, float), [str(number) for number in range(12)]),
        (pa.array(numbers(2, float), pa.float32()), ["0", "1"]),
        (pa.array(["ab"[row % 2] for row in range(ROWS)]).dictionary_encode(), ["a", "b"]),
    ],
)
def test_types_of_labels(tmp_path, labels, names, streamed):
    write(tmp_path / "set" / "train.parquet", label=labels)
    loaded = load_image_dataset(str(tmp_path / "set"), streamed=streamed)
    assert loaded.class_names == names
    split = loaded.test
    rows = [int(split.where(row).split()[1]) for row in range(len(split))]
    assert split.labels.tolist() == [row % len(names) for row in rows]


def test_a_table_of_pandas_with_a_category_and_an_index(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [png(row) for row in range(ROWS)], "kind": [f"k{row % 3}" for row in range(ROWS)]})
    frame = frame.astype({"kind": "category"})[frame.kind != "k2"]
    (tmp_path / "set").mkdir()
    frame.to_parquet(tmp_path / "set" / "train.parquet")
    assert load_image_dataset(str(tmp_path / "set")).class_names == ["k0", "k1"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "labels, message",
    [
        ([1.0, 0.0, None, *numbers(2, float)], "Row 2 of train .* has label None"),
        ([1.0, 0.0, float("nan"), float("nan"), *numbers(2, float)], "Row 2 of train .* has label nan, .* .2 such rows"),
        ([0.5, 1.0, 0.0] * 5, "has fractions such as 0.5"),
        ([f"x{row}" for row in range(ROWS)], "a different value for each of 20 images .'x0', 'x1'.*--label_column"),
        (list(range(ROWS)), "a different value for each of 20 images"),
        (["a"] * ROWS, "one class only"),
        ([[0, 1], [1]] * 10, "no label column.*label .list, multi-label"),
        (pa.array(range(ROWS), pa.date32()), "no label column.*label .date32"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, message, streamed):
    write(tmp_path / "set" / "train.parquet", label=labels)
    with pytest.raises(ValueError, match=message) as refused:
        load_image_dataset(str(tmp_path / "set"), streamed=streamed)
    if "no label column" in message:
        assert "--label_column" not in str(refused.value)


def test_a_column_that_label_column_cannot_name_is_explained(tmp_path):
    write(tmp_path / "set" / "train.parquet", label=[[0]] * ROWS, kind=numbers(2), score=[0.1] * ROWS)
    for column, message in (("label", "cannot be the label.*multi-label"), ("lable", "has no column 'lable'.*kind .int64")):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(str(tmp_path / "set"), label_column=column)
    with pytest.raises(ValueError, match="score has fractions such as 0.1"):
        load_image_dataset(str(tmp_path / "set"), label_column="score")
    assert load_image_dataset(str(tmp_path / "set")).class_names == ["0", "1"]


def test_a_float_column_called_label_is_preferred_to_other_numbers(tmp_path):
    write(tmp_path / "set" / "train.parquet", width=numbers(5), label=numbers(2, float))
    assert load_image_dataset(str(tmp_path / "set")).class_names == ["0", "1"]


def test_a_split_whose_labels_are_nan_is_not_used(tmp_path):
    write(tmp_path / "set" / "train.parquet", label=numbers(2, float))
    write(tmp_path / "set" / "test.parquet", label=[float("nan")] * 4)
    assert any("test has no labels" in note for note in load_image_dataset(str(tmp_path / "set")).notes)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_that_belongs_to_no_split_is_named(tmp_path, streamed):
    for name in ("train", "test", "extra"):
        write(tmp_path / "set" / f"{name}.parquet", label=numbers(2))
    loaded = load_image_dataset(str(tmp_path / "set"), streamed=streamed)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (ROWS, ROWS)
    assert any("belong to no split" in note and "extra.parquet" in note for note in loaded.notes)


def test_a_split_that_is_neither_train_val_nor_test_is_named(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"image": [png(row) for row in range(ROWS)], "label": numbers(2)})
    datasets.DatasetDict({"train": table, "test": table, "unsupervised": table}).save_to_disk(tmp_path / "set")
    loaded = load_image_dataset(str(tmp_path / "set"))
    assert any("neither train, val nor test: unsupervised" in note for note in loaded.notes)


def test_lists_of_labels_in_tar_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in (("1.png", png(1)), ("1.json", b'{"label": [1, 2]}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="label of 1 is a list.*multi-label"):
        load_image_dataset(str(tmp_path), streamed=True)
