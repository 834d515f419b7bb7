"""Datasets: the embedded digits, folders, tables, stratified selections of rows, and images of every mode."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_process
from PIL import Image
from stand_in_hub import set_hub

from pipeline.data.image_dataset import (
    DATASETS,
    BadImage,
    ImageDataset,
    check_dataset_name,
    decode_image,
    load_image_dataset,
    stratified_rows,
)
from pipeline.data.splits import stratified_folds


def png(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def grey(level: int, side: int = 8) -> np.ndarray:
    return np.full((side, side), level, np.uint8)


def write_classes(root: Path, counts: dict[str, int], mode: str = "L") -> None:
    """Writes class folders with that many 8x8 images each; the grey level identifies class and number."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(grey(10 * number + index)).convert(mode).save(root / name / f"{index}.png")


def test_embedded_digits_are_scikit_learns_row_by_row():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    test_rows = stratified_rows(digits.target, 359, 0)
    loaded = load_image_dataset("digits", val_fraction=0)
    for split, rows in [(loaded.train, np.delete(np.arange(1797), test_rows)), (loaded.test, test_rows)]:
        assert len(split) == len(rows) > 300
        assert split.labels.tolist() == digits.target[rows].tolist()
        for row, original in enumerate(rows):
            assert (np.asarray(decode_image(split.encoded(row), 1)) == pixels[original]).all()


def test_digits_row_states_the_sizes_and_statistics_of_the_embedded_files():
    row = DATASETS["digits"]
    loaded = load_image_dataset("digits", val_fraction=0)
    images = [np.asarray(decode_image(loaded.train.encoded(i), 1)) / 255 for i in range(len(loaded.train))]
    assert (len(loaded.train), len(loaded.test)) == (1438, 359)
    assert (round(np.mean(images), 4), round(np.std(images), 4)) == (*row.mean, *row.std)
    assert images[0].shape == (row.image_size, row.image_size)
    assert sum(file.stat().st_size for file in (ROOT / "pipeline" / "data" / "digits").iterdir()) < 400_000


def test_digits_load_without_heavy_imports():
    code = (
        "import sys; from pipeline.data.image_dataset import load_image_dataset; load_image_dataset('digits'); "
        "assert not {'datasets', 'torch', 'PIL', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("digits", [10]),
        ("mnist", [10]),
        ("fashion_mnist", [10]),
        ("cifar10", [10]),
        ("cifar100", [100, 20]),
        ("oxford_iiit_pet", [37, 2]),
    ],
)
def test_rows_have_distinct_class_names_and_statistics_per_channel(name, counts):
    row = DATASETS[name]
    assert [len(set(names)) for names in row.label_columns.values()] == counts
    assert [len(names) for names in row.label_columns.values()] == counts
    assert len(row.mean) == len(row.std) == row.channels


@pytest.mark.parametrize(
    "name, message",
    [
        ("cifa10", "Did you mean 'cifar10'"),
        ("", "Known: digits"),
        ("./photos", "No folder './photos'"),
        ("/no/such/folder", "No folder"),
        ("a/b/c", "No folder"),
        ("own er/x", "Unknown dataset"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(name, message):
    with pytest.raises(ValueError, match=message):
        check_dataset_name(name)


def test_names_folders_and_hub_ids_are_accepted(tmp_path):
    for name in ["digits", "cifar100", str(tmp_path), "owner/some-set_1.0"]:
        check_dataset_name(name)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_dataset_name(str(tmp_path / "file"))


def test_a_setting_that_would_be_ignored_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5})
    for arguments in [
        {"name": "digits", "hub_config": "x"},
        {"name": "digits", "label_column": "x"},
        {"name": str(tmp_path), "hub_config": "x"},
        {"name": str(tmp_path), "label_column": "x"},
    ]:
        with pytest.raises(ValueError, match="has no effect on|has no label column"):
            load_image_dataset(**arguments)


# Stratified selections of rows


def test_stratified_folds_have_equal_shares_of_each_class():
    labels = np.arange(600) % 3
    folds = stratified_folds(labels, 5, 0)
    assert np.array_equal(np.bincount(folds * 3 + labels), np.full(15, 40))
    assert not np.array_equal(folds, stratified_folds(labels, 5, 1))


def test_stratified_rows_follow_largest_remainder_by_hand():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 18 + [3] * 1 + [4] * 1)
    rows = stratified_rows(labels, 11, 0)  # quotas 5.5, 3.3, 1.98, 0.11, 0.11: two are left over after 5, 3, 1
    assert np.bincount(labels[rows], minlength=5).tolist() == [6, 3, 2, 0, 0]
    labels = np.array([0] * 96 + [1] * 2 + [2] * 2)
    rows = stratified_rows(labels, 10, 0)  # quotas 9.6, 0.2, 0.2: one is left over, for a class that would get none
    assert np.bincount(labels[rows], minlength=3).tolist() == [9, 1, 0]


@pytest.mark.parametrize("size", [0, 1, 17, 90, 200])
def test_stratified_rows_are_exact_sorted_and_repeatable(size):
    labels = np.random.Generator(np.random.PCG64(1)).integers(0, 7, 200)
    rows = stratified_rows(labels, size, 3, 4)
    assert len(rows) == size
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == stratified_rows(labels, size, 3, 4).tolist()
    assert (abs(np.bincount(labels[rows], minlength=7) - np.bincount(labels) * size / 200) < 1).all()
    if 0 < size < 200:
        assert rows.tolist() != stratified_rows(labels, size, 3, 5).tolist()


def test_train_and_validation_partition_the_training_split():
    whole = load_image_dataset("digits", val_fraction=0)
    first, second = load_image_dataset("digits", seed=0), load_image_dataset("digits", seed=1)
    assert (len(first.train), len(first.val), len(first.test)) == (1294, 144, 359)
    where = [split.where(row) for split in (first.train, first.val) for row in range(len(split))]
    assert sorted(where) == sorted(whole.train.where(row) for row in range(len(whole.train)))
    assert where[-1].endswith("of train")
    assert first.val.labels.tolist() != second.val.labels.tolist() or first.val.where(0) != second.val.where(0)
    assert first.test.labels.tolist() == second.test.labels.tolist()


def test_with_val_fraction_0_the_test_split_is_validation_and_a_note_reports_it():
    loaded = load_image_dataset("digits", val_fraction=0)
    assert loaded.val is loaded.test
    assert any("test split is used as validation" in note for note in loaded.notes)


def test_max_train_samples_applies_before_validation_is_split_off():
    loaded = load_image_dataset("digits", max_train_samples=100, val_fraction=0.2)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (80, 20, 359)
    assert np.bincount(np.concatenate([loaded.train.labels, loaded.val.labels])).tolist() == [10] * 10


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"val_fraction": 1.0}, "below 1"),
        ({"val_fraction": -0.1}, "at least 0"),
        ({"val_fraction": 1e-4}, "gives 0"),
        ({"max_train_samples": 0}, "1 or more"),
        ({"max_train_samples": 2, "val_fraction": 0.9}, "leaves 0"),
    ],
)
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", **settings)


# Folders of class folders


def test_split_folders_with_nested_hidden_and_upper_case_files(tmp_path):
    write_classes(tmp_path / "train", {"cat": 4, "dog": 6}, "RGB")
    write_classes(tmp_path / "valid", {"dog": 3}, "RGB")
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2}, "RGB")
    (tmp_path / "train" / "cat" / "more").mkdir()
    (tmp_path / "train" / "cat" / "more" / "X.JPG").write_bytes(encode(Image.new("RGB", (8, 8)), "JPEG"))
    (tmp_path / "train" / "cat" / ".hidden.png").touch()
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    os.symlink(tmp_path / "train" / "dog" / "0.png", tmp_path / "train" / "dog" / "linked.png")
    loaded = load_image_dataset(str(tmp_path))
    assert loaded.class_names == ["cat", "dog"]
    assert loaded.train.labels.tolist() == [0] * 5 + [1] * 7
    assert loaded.val.labels.tolist() == [1] * 3
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    assert loaded.train.where(4) == str(tmp_path / "train" / "cat" / "more" / "X.JPG")
    assert loaded.train.encoded(4) == (tmp_path / "train" / "cat" / "more" / "X.JPG").read_bytes()
    assert (loaded.image_size, loaded.channels, len(loaded.mean)) == (8, 3, 3)
    assert any("own validation split" in note for note in loaded.notes)


def test_one_folder_of_classes_holds_out_the_same_test_images_for_every_seed(tmp_path):
    write_classes(tmp_path, {"train": 10, "car": 20})  # a class may be called train
    (tmp_path / "stray.png").touch()
    first, second = (load_image_dataset(str(tmp_path), seed=seed) for seed in (0, 1))
    assert first.class_names == ["car", "train"]
    assert np.bincount(first.test.labels).tolist() == [4, 2]
    assert [first.test.where(i) for i in range(6)] == [second.test.where(i) for i in range(6)]
    assert (len(first.train), len(first.val)) == (22, 2)
    assert (first.image_size, first.channels, len(first.mean)) == (8, 1, 1)
    assert any("held out as test" in note for note in first.notes)
    assert any("1 images" in note and "not used" in note for note in first.notes)


def test_validation_is_used_as_test_if_there_is_no_test_split(tmp_path):
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "val", {"a": 2, "b": 2})
    (tmp_path / "raw").mkdir()
    loaded = load_image_dataset(str(tmp_path))
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (18, 2, 4)
    assert loaded.test.where(0) == str(tmp_path / "val" / "a" / "0.png")
    assert any("val is used as test" in note for note in loaded.notes)
    assert any("raw" in note for note in loaded.notes)


@pytest.mark.parametrize(
    "train, test, message",
    [
        ({"a": 3, "b": 0, "c": 3}, {"a": 1}, "No image in the class folders b of .*train"),
        ({"a": 3, "b": 3}, {"a": 1, "c": 1}, "classes that .*train lacks: c"),
        ({"a": 0}, {"a": 1}, "Found no images.*Expected: FOLDER/train/CLASS"),
    ],
)
def test_inconsistent_class_folders_are_refused(tmp_path, train, test, message):
    write_classes(tmp_path / "train", train)
    write_classes(tmp_path / "test", test)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(tmp_path))


def test_folders_without_images_or_without_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Found no images.*Expected: FOLDER/train"):
        load_image_dataset(str(tmp_path))
    write_classes(tmp_path / "test", {"a": 1})
    with pytest.raises(ValueError, match="no training split"):
        load_image_dataset(str(tmp_path))


def test_a_missing_or_damaged_image_is_reported_with_its_path(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10})
    split = load_image_dataset(str(tmp_path)).train
    Path(split.where(3)).unlink()
    with pytest.raises(BadImage, match=f"Cannot read {split.where(3)}: No such file"):
        split.encoded(3)
    Path(split.where(0)).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"{split.where(0)}: Cannot read the header"):
        load_image_dataset(str(tmp_path))


def test_images_of_several_sizes_have_no_native_size(tmp_path):
    write_classes(tmp_path, {"a": 8, "b": 8})
    Image.fromarray(grey(0, 16)).convert("RGB").save(tmp_path / "a" / "0.png")
    loaded = load_image_dataset(str(tmp_path))
    assert (loaded.image_size, loaded.channels) == (None, 3)


# Tables, read through datasets


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """The cache of `datasets` inside tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    return datasets


def write_table(datasets, path: Path, labels: list, kind=None, column: str = "label", **more: list) -> None:
    """A Parquet file with as many grey images as labels; kind is the label column's feature."""
    images = [{"bytes": png(grey(index)), "path": None} for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: kind or datasets.ClassLabel(names=["x", "y"])})
    for name, values in more.items():
        features[name] = datasets.Value("string" if isinstance(values[0], str) else "int64")
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, column: labels, **more}, features=features).to_parquet(path)


def test_a_table_names_no_file_outside_its_folder(hf_cache, tmp_path):
    """A file inside is read; `..` in a path does not bypass the check."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("set/inside.png", "outside.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    def load(path):
        images = pa.array(
            [{"bytes": None, "path": str(path)}] * 20, pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
        pq.write_table(pa.table({"image": images, "label": [0, 1] * 10}), folder / "train.parquet")
        return load_image_dataset(str(folder))

    assert len(load(folder / "inside.png").train.encoded(0)) == (folder / "inside.png").stat().st_size
    for path in (tmp_path / "outside.png", folder / ".." / "outside.png"):
        with pytest.raises(
            ValueError, match="Train of the folder .* names the image file '.*outside.png', which is outside"
        ):
            load(path)


def test_parquet_folder_and_its_pickle(hf_cache, tmp_path):
    write_table(hf_cache, tmp_path / "set" / "train-00000.parquet", [0, 1] * 100)
    write_table(hf_cache, tmp_path / "set" / "test-00000.parquet", [1, 0, 1])
    loaded = load_image_dataset(str(tmp_path / "set"))
    assert loaded.class_names == ["x", "y"]
    assert (len(loaded.train), len(loaded.val), loaded.test.labels.tolist()) == (180, 20, [1, 0, 1])
    assert (loaded.image_size, loaded.channels) == (8, 1)
    assert loaded.test.encoded(2) == png(grey(2))
    row = int(loaded.val.where(7).split()[1])
    assert loaded.val.encoded(7) == png(grey(row))
    pickled = pickle.dumps(loaded.val)
    assert pickle.loads(pickled).encoded(7) == loaded.val.encoded(7)
    assert loaded.val.encoded(7) not in pickled and len(pickled) < 5_000


def test_string_and_integer_labels_become_classes(hf_cache, tmp_path):
    text, numbers = tmp_path / "text" / "train.parquet", tmp_path / "numbers" / "train.parquet"
    write_table(hf_cache, text, ["pug", "cat"] * 10, hf_cache.Value("string"), "breed")
    write_table(hf_cache, numbers, [7, 3] * 10, hf_cache.Value("int32"))
    named, counted = (load_image_dataset(str(path.parent)) for path in (text, numbers))
    assert (named.class_names, counted.class_names) == (["cat", "pug"], ["3", "7"])
    for loaded in (named, counted):
        rows = [int(loaded.train.where(i).split()[1]) for i in range(len(loaded.train))]
        assert loaded.train.labels.tolist() == [1 - row % 2 for row in rows]
        assert len(rows) == 14


def test_saved_to_disk_and_binary_columns(hf_cache, tmp_path):
    saved = {"image": [png(grey(i)) for i in range(20)], "label": [0, 1] * 10}
    hf_cache.Dataset.from_dict(saved).save_to_disk(tmp_path / "one")
    splits = {"train": hf_cache.Dataset.from_dict(saved), "test": hf_cache.Dataset.from_dict(saved).shuffle(seed=0)}
    hf_cache.DatasetDict(splits).save_to_disk(tmp_path / "two")
    one, two = (load_image_dataset(str(tmp_path / name)) for name in ("one", "two"))
    assert (len(one.test), len(two.test)) == (4, 20)
    assert [two.test.encoded(i) for i in range(20)] == splits["test"]["image"][:]
    assert two.test.labels.tolist() == splits["test"]["label"][:]


def test_label_column_is_chosen_by_name_type_or_setting(hf_cache, tmp_path):
    path = tmp_path / "set"
    write_table(hf_cache, path / "train.parquet", [0, 1] * 10, group=["b", "a"] * 10, number=[1, 2] * 10)
    assert load_image_dataset(str(path)).class_names == ["x", "y"]
    assert load_image_dataset(str(path), label_column="group").class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"--label_column image.*label \(int64\), group \(string\)"):
        load_image_dataset(str(path), label_column="image")


def test_ambiguous_or_missing_columns_are_listed(hf_cache, tmp_path):
    string = hf_cache.Value("string")
    write_table(hf_cache, tmp_path / "two" / "train.parquet", ["a"] * 4, string, "kind", number=[1] * 4)
    with pytest.raises(ValueError, match=r"\(kind, number\).*kind \(string\).*--label_column"):
        load_image_dataset(str(tmp_path / "two"))
    hf_cache.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "none").mkdir()
    (tmp_path / "none.parquet").rename(tmp_path / "none" / "train.parquet")
    with pytest.raises(ValueError, match=r"no image column.*text \(string\)"):
        load_image_dataset(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "train, test, kind, message",
    [
        ([0, 1, -1, 0], [0], "int64", "Row 2 of train .* label -1, expected 0..1"),
        ([0, 1, None, 0], [0], "int64", "Row 2 of train .* label None"),
        ([0, 1], [1, 5], "int64", "Row 1 of test .* label 5, expected 0..1"),
        (["a", "b"], ["b", "c"], "string", "Row 1 of test .* label 'c', expected one of"),
        ([-1, -1], [0], "int64", "label of train has no labels"),
    ],
)
def test_labels_out_of_range_are_refused_with_their_row(hf_cache, tmp_path, train, test, kind, message):
    write_table(hf_cache, tmp_path / "set" / "train.parquet", train, hf_cache.Value(kind))
    write_table(hf_cache, tmp_path / "set" / "test.parquet", test, hf_cache.Value(kind))
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(tmp_path / "set"))


def test_a_test_split_without_labels_is_not_used(hf_cache, tmp_path):
    write_table(hf_cache, tmp_path / "set" / "train.parquet", [0, 1] * 10)
    write_table(hf_cache, tmp_path / "set" / "validation.parquet", [0, 1, 1])
    write_table(hf_cache, tmp_path / "set" / "test.parquet", [-1] * 5)
    loaded = load_image_dataset(str(tmp_path / "set"))
    assert (len(loaded.train), len(loaded.val), loaded.test.labels.tolist()) == (18, 2, [0, 1, 1])
    assert any("test has no labels" in note for note in loaded.notes)


@pytest.mark.slow
def test_loading_a_hub_set_without_network_reports_what_to_do(tmp_path):
    code = "from pipeline.data.image_dataset import load_image_dataset; load_image_dataset('nobody/nothing')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    for words in ("ValueError: Could not load the Hub set 'nobody/nothing'", "HF_TOKEN", "HF_ENDPOINT", "cached set"):
        assert words in result.stderr


READ_PETS = """
import json, sys
from pipeline.data.image_dataset import load_image_dataset
loaded = load_image_dataset("owner/pets")
print(json.dumps([loaded.train.labels.tolist(), loaded.notes, "datasets" in sys.modules]))
"""


@pytest.mark.slow
def test_a_hub_set_is_read_again_only_after_a_change_and_from_the_cache_if_the_hub_is_unreachable(hf_cache, tmp_path):
    table = tmp_path / "pets" / "train.parquet"
    write_table(hf_cache, table, [0, 1, 1] * 4)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets")}

    def read(address: str, offline: str = "0") -> tuple[list[int], list[str], bool]:
        result = run_process("-c", READ_PETS, HF_HUB_OFFLINE=offline, HF_ENDPOINT=address, **home)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    with set_hub(tmp_path / "pets") as (address, hub):
        labels, notes, with_datasets = read(address)
        assert sorted(labels) == [0] * 3 + [1] * 6 and with_datasets
        assert read(address) == [labels, notes, False]
        write_table(hf_cache, table, [0, 1, 0, 0] * 5)
        hub.commit_id = "2" * 40
        changed, notes, with_datasets = read(address)
        assert len(changed) == 14 and with_datasets
        assert read(address) == [changed, notes, False]
    for offline, reason in (("0", "Connection refused"), ("1", "offline")):
        again, (first_note, *others), with_datasets = read(address, offline)
        assert (again, others, with_datasets) == (changed, notes, False)
        assert first_note.startswith("The Hub was not reached (") and reason in first_note


@pytest.mark.slow
def test_a_set_without_a_cached_reading_is_read_by_datasets_if_the_hub_is_unreachable(tmp_path):
    """Readings of images as plain bytes are not cached. The Hub client retries for 23 seconds; the test skips its sleeps."""
    (tmp_path / "pets").mkdir()
    images, labels = [png(grey(level)) for level in range(12)], ["cat", "dog", "dog"] * 4
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "pets" / "train.parquet")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets")}
    with set_hub(tmp_path / "pets") as (address, _):
        first = run_process("-c", READ_PETS, HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **home)
    assert first.returncode == 0, first.stderr
    without_waiting = "import time; time.sleep = lambda seconds: None" + READ_PETS
    again = run_process("-c", without_waiting, HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **home)
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr
    assert "Connection refused" in again.stderr and "cached" in again.stderr


@pytest.fixture
def readings(hf_cache, monkeypatch):
    """One entry for each time that `datasets` reads a folder."""
    counts, load = [], hf_cache.load_dataset
    monkeypatch.setattr(hf_cache, "load_dataset", lambda *args, **more: counts.append(args) or load(*args, **more))
    return counts


def described(loaded: ImageDataset) -> list[object]:
    splits = (loaded.train, loaded.val, loaded.test)
    rows = [(split.labels.tolist(), split.encoded(0), split.where(0), split.fingerprint()) for split in splits]
    return [rows, loaded.class_names, loaded.notes, loaded.image_size, loaded.channels]


def test_a_folder_is_read_by_datasets_once_and_again_when_a_file_changes(hf_cache, readings, tmp_path):
    folder = tmp_path / "set"
    write_table(hf_cache, folder / "train.parquet", [0, 1] * 50, group=["b", "a"] * 50)
    write_table(hf_cache, folder / "test.parquet", [1, 0, 1], group=["b", "a", "b"])
    first = load_image_dataset(str(folder))
    again = load_image_dataset(str(folder))
    assert described(first) == described(again) and len(readings) == 1
    assert load_image_dataset(str(folder), label_column="group").class_names == ["a", "b"] and len(readings) == 2
    pickled = pickle.dumps(again.val)
    assert pickle.loads(pickled).encoded(3) == first.val.encoded(3)
    assert first.val.encoded(3) not in pickled
    write_table(hf_cache, folder / "test.parquet", [0, 0, 0, 1], group=["b", "a", "b", "b"])
    assert load_image_dataset(str(folder)).test.labels.tolist() == [0, 0, 0, 1] and len(readings) == 3


@pytest.mark.parametrize("harm", ["record is damaged", "Arrow file is gone", "Arrow file has changed", "no folder"])
def test_a_damaged_or_outdated_cached_reading_is_read_again(hf_cache, readings, tmp_path, harm):
    folder, cache = tmp_path / "set", tmp_path / "hf_cache"
    write_table(hf_cache, folder / "train.parquet", [0, 1] * 50)
    first = described(load_image_dataset(str(folder)))
    (record,) = cache.glob("decoded/*.json")
    (arrow,) = cache.glob("**/*-train.arrow")
    if harm == "record is damaged":
        record.write_text(record.read_text().replace('"labels": [0, 1', '"labels": [1, 1'))
    elif harm == "no folder":
        shutil.rmtree(record.parent)
        record.parent.write_text("a file instead")
    elif harm == "Arrow file is gone":
        shutil.rmtree(arrow.parent)
    else:
        os.utime(arrow, ns=(1, 1))
    assert described(load_image_dataset(str(folder))) == first and len(readings) == 2


# Decoding


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    picture = Image.new("L", (4, 2), 255)
    picture.putpixel((1, 0), 0)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.asarray(picture).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = picture.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else picture.convert(mode)
    assert image.mode == mode
    # Pillow 12.3, which Gradio requires, does not read its own YCbCr TIFF files without compression
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    decoded = decode_image(encode(image, "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG", **options), channels)
    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    assert np.array_equal(np.asarray(decoded.convert("L")), np.asarray(picture))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert np.asarray(decode_image(png(values), 1)).tolist() == [[0, 1, 128, 255]]


def test_float_levels_are_read_as_unit_range_or_as_levels():
    for values, expected in [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255])]:
        encoded = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert np.asarray(decode_image(encoded, 1)).tolist() == [expected]
    for values in ([0.0, 300.0], [0.0, float("nan")]):
        with pytest.raises(BadImage, match="grey values from 0.0 to 300.0|NaN"):
            decode_image(encode(Image.fromarray(np.array([values], np.float32)), "TIFF"), 1)


def test_transparent_pixels_become_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    expected = [[[255, 0, 0], [255, 255, 255]], [[255, 255, 255]] * 2]
    assert np.asarray(decode_image(encode(clear, "PNG"), 3)).tolist() == expected
    indexed = Image.new("P", (2, 2), 1)
    indexed.putpalette([255, 0, 0, 0, 255, 0])
    indexed.putpixel((0, 0), 0)
    assert np.asarray(decode_image(encode(indexed, "PNG", transparency=1), 3)).tolist() == expected


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(file_format):
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (0, 0, 8, 8))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: white moves to the top
    decoded = decode_image(encode(image, file_format, exif=exif.tobytes()), 1)
    assert decoded.size == (8, 16)
    assert np.asarray(decoded)[2, 4] > 200 and np.asarray(decoded)[13, 4] < 50


def test_the_first_frame_of_an_animation_is_used():
    frames = [Image.fromarray(grey(level)) for level in (200, 10)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(encoded, 1)).tolist() == grey(200).tolist()


@pytest.mark.parametrize(
    "encoded, message",
    [
        (b"", "empty"),
        (b"<html>", "cannot identify"),
        (png(grey(7, 64))[:60], "Cannot decode"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:800], "truncated"),
    ],
)
def test_bytes_that_are_not_an_image_are_refused(encoded, message):
    with pytest.raises(BadImage, match=message):
        decode_image(encoded, 3)


@pytest.mark.parametrize("pil_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch, pil_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_limit)
    header = b"P5 20000 20000 255\n"
    with pytest.raises(BadImage, match="exceeds limit|more than the limit"):
        decode_image(header, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_of_tables_whose_name_has_brackets_is_read_as_the_folder(hf_cache, tmp_path, streamed):
    images, labels = [{"bytes": png(grey(index)), "path": None} for index in range(40)], [index % 2 for index in range(40)]
    table = pa.table({"image": images, "label": labels})
    for name, split in (("data[1]", table), ("data1", table.slice(0, 20))):
        (tmp_path / name).mkdir()
        pq.write_table(split, tmp_path / name / "train-0.parquet")
        pq.write_table(split.slice(0, 4), tmp_path / name / "test-0.parquet")
        (tmp_path / name / "notes.json").write_text("{}")
    loaded = load_image_dataset(str(tmp_path / "data[1]"), streamed=streamed)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (36, 4, 4)
    assert loaded.test.encoded(3) == images[3]["bytes"]
