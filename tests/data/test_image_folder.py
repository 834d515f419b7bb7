"""Folders of images: what is listed, which folders are splits and classes, and labels from tables beside the images."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.common.console import escape_unprintable
from pipeline.data.image_dataset import ImageDataset, load_image_dataset
from pipeline.data.splits import role_within, split_role
from pipeline.settings.parser import from_yaml


def write(path: Path, number: int = 0, file_format: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number, file_format))


def encoded(number: int, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), number % 256, np.uint8)).save(stream, file_format)
    return stream.getvalue()


def write_classes(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            write(root / name / f"{name}{number}.png", number)


def write_table(path: Path, header: str, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")


def load(root: Path, **settings) -> ImageDataset:
    return load_image_dataset(str(root), **settings)


def labelled(loaded: ImageDataset) -> dict[str, str]:
    """The class name of each image by its file name, over all splits."""
    splits = (loaded.train, loaded.val, loaded.test)
    rows = [(split, row) for split in splits for row in range(len(split))]
    return {Path(split.where(row)).name: loaded.class_names[split.labels[row]] for split, row in rows}


def counts(loaded: ImageDataset) -> list[int]:
    return [len(split) for split in (loaded.train, loaded.val, loaded.test)]


def noted(loaded: ImageDataset, words: str) -> bool:
    return any(words in note for note in loaded.notes)


# Splits


@pytest.mark.parametrize(
    "name, role",
    [
        ("Train", "train"),
        ("training_set", "train"),
        ("train-images", "train"),
        ("valset", "val"),
        ("dev", "val"),
        ("Eval", "val"),
        ("test_data", "test"),
        ("latest", None),
        ("dataset", None),
        ("contest", None),
    ],
)
def test_names_of_splits(name, role):
    assert split_role(name) == role


def test_a_role_within_a_longer_name():
    assert [role_within(name) for name in ("seg_train", "val2017", "train_test", "cat")] == ["train", "val", None, None]


@pytest.mark.parametrize(
    "train, test",
    [("training_set", "test_set"), ("Train", "Test"), ("seg_train", "seg_test"), ("train2017", "test2017"), ("trainset", "eval")],
)
def test_siblings_that_are_splits_under_their_usual_names(tmp_path, train, test):
    write_classes(tmp_path / train, {"a": 10, "b": 10})
    write_classes(tmp_path / test, {"a": 3, "b": 2})
    loaded = load(tmp_path)
    assert loaded.class_names == ["a", "b"] and loaded.test.labels.tolist() == [0, 0, 0, 1, 1]
    assert counts(loaded) == [18, 2, 5]


def test_a_split_folder_inside_a_folder_of_its_name(tmp_path):
    for name, count in (("seg_train", 10), ("seg_test", 2)):
        write_classes(tmp_path / name / name, {"a": count, "b": count})
    assert counts(load(tmp_path)) == [18, 2, 4] and load(tmp_path).class_names == ["a", "b"]


def test_siblings_that_contain_the_same_folders_under_other_names_are_refused(tmp_path):
    for name in ("first", "second"):
        write_classes(tmp_path / name, {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=r"first, second .* same names \(a, b\).*train, training; validation"):
        load(tmp_path)


def test_splits_inside_the_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        write_classes(tmp_path / name, {"train": 4, "test": 4})
    with pytest.raises(ValueError, match="test/cat instead of cat/test"):
        load(tmp_path)


def test_one_folder_in_each_class_is_no_split(tmp_path):
    for name in ("cat", "dog"):
        write_classes(tmp_path / name, {"images": 10})
    assert load(tmp_path).class_names == ["cat", "dog"]


def test_classes_with_subfolders_of_the_same_names_inside_train_are_classes(tmp_path):
    for name in ("cat", "dog"):
        write_classes(tmp_path / "train" / name, {"indoor": 5, "outdoor": 5})
    assert load(tmp_path).class_names == ["cat", "dog"]


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val", "test"), ("train_images", "test_images", "x")])
def test_split_folders_without_class_folders_are_refused(tmp_path, names):
    write_classes(tmp_path, {name: 10 for name in names})
    with pytest.raises(ValueError, match="names of splits, but contain images without class folders"):
        load(tmp_path)


@pytest.mark.parametrize("below", ["flowers", "data/flowers", "flowers/train"])
def test_a_single_class_is_refused_with_the_folder_below_that_has_several(tmp_path, below):
    write_classes(tmp_path / below, {"daisy": 10, "rose": 10})
    with pytest.raises(ValueError, match=f"only one class folder with images.*{below}.*daisy, rose.*use --dataset"):
        load(tmp_path)


def test_a_single_class_is_refused(tmp_path):
    write_classes(tmp_path, {"photos": 10})
    with pytest.raises(ValueError, match="only one class folder with images, photos"):
        load(tmp_path)
    write_classes(tmp_path / "x" / "train" / "flowers", {"daisy": 10, "rose": 10})
    with pytest.raises(ValueError, match="daisy, rose.*move them up into"):
        load(tmp_path / "x")


def test_a_folder_without_images_does_not_make_a_second_class(tmp_path):
    """Caltech 101's layout."""
    write_classes(tmp_path / "101_ObjectCategories", {"ant": 10, "bass": 10})
    (tmp_path / "Annotations" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="use --dataset .*101_ObjectCategories"):
        load(tmp_path)


def test_loose_images_are_counted_where_there_are_no_classes(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images are in"):
        load(tmp_path)


# Labels from tables


def name_of(number: int) -> str:
    return "cat" if number % 3 else "dog"


@pytest.mark.parametrize(
    "image, value",
    [
        ("images/{}.png", "{}"),
        ("images/{}.png", "{}.png"),
        ("images/{}.png", "images/{}.png"),
        ("images/{}.png", "./images/{}.png"),
        ("images/{}.png", "images\\{}.png"),
        ("images/{}.png", "/kaggle/input/set/images/{}.png"),
        ("images/{}.png", "C:\\photos\\{}.png"),
        ("part_{}/x/{}.png", "{}.png"),
        ("{}.png", "{}"),
        ("train_images/im{}.jfif", "im{}"),
        ("a/b/c/{}.v2.png", "b/c/{}.v2"),
    ],
)
def test_a_table_beside_images_gives_the_labels(tmp_path, image, value):
    for number in range(30):
        write(tmp_path / image.replace("part_{}", f"part_{number % 2}").replace("{}", str(number)), number)
    rows = [f"{number},{value.replace('{}', str(number))},{name_of(number)},{number / 7:.3f}" for number in range(30)]
    write_table(tmp_path / "train.csv", "index,photo,species,weight", rows)
    loaded = load(tmp_path)
    expected = {Path(image.replace("{}", str(number))).name: name_of(number) for number in range(30)}
    assert labelled(loaded) == expected and loaded.class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_as_hugging_face_writes_it(tmp_path, name):
    for split, count in (("train", 20), ("test", 6)):
        rows = [{"file_name": f"{number}.png", "label": number % 2} for number in range(count)]
        for number in range(count):
            write(tmp_path / split / f"{number}.png", number)
        if name.endswith(".jsonl"):
            (tmp_path / split / name).write_text("\n".join(map(json.dumps, rows)))
        else:
            write_table(tmp_path / split / name, "file_name,label", [f"{row['file_name']},{row['label']}" for row in rows])
    loaded = load(tmp_path)
    assert counts(loaded) == [18, 2, 6] and loaded.class_names == ["0", "1"]
    assert loaded.test.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert loaded.test.where(5) == str(tmp_path / "test" / "5.png")


def test_metadata_at_the_top_takes_the_splits_from_the_folders(tmp_path):
    names = [f"{split}/{number}.png" for split, count in (("train", 20), ("test", 6)) for number in range(count)]
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    write_table(tmp_path / "metadata.csv", "file_name,label", [f"{name},{number % 2}" for number, name in enumerate(names)])
    assert counts(load(tmp_path)) == [18, 2, 6]


def test_a_column_of_splits_divides_the_table(tmp_path):
    for number in range(30):
        write(tmp_path / "images" / f"{number}.png", number)
    rows = [f"{number}.png;{name_of(number)};{'test' if number >= 24 else 'training'}" for number in range(30)]
    write_table(tmp_path / "all.csv", "file;species;part", rows)
    loaded = load(tmp_path)
    assert counts(loaded) == [22, 2, 6] and loaded.class_names == ["cat", "dog"]


def test_tables_of_splits_and_one_without_labels(tmp_path):
    """The layout of Kaggle; ids start again in each split."""
    for split, count in (("train", 30), ("val", 9), ("test", 12)):
        for number in range(count):
            write(tmp_path / split / f"{number}.png", number)
        if split != "test":
            write_table(tmp_path / f"{split}.csv", "id,label", [f"{number},{name_of(number)}" for number in range(count)])
    write_table(tmp_path / "test.csv", "id", [str(number) for number in range(12)])
    write_table(tmp_path / "sample_submission.csv", "id,label", [f"{number},cat" for number in range(12)])
    loaded = load(tmp_path)
    assert counts(loaded) == [27, 3, 9] and noted(loaded, "test.csv has no labels (column label) and is not used")
    assert noted(loaded, "12 images have no row with a label")
    assert all(f"{os.sep}val{os.sep}" in loaded.test.where(row) for row in range(9))


def test_a_table_without_a_header(tmp_path):
    for number in range(20):
        write(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{name_of(number)}\n" for number in range(20)))
    assert labelled(load(tmp_path)) == {f"{number}.png": name_of(number) for number in range(20)}


def test_label_column_decides_among_several(tmp_path):
    for number in range(20):
        write(tmp_path / "images" / f"{number}.png", number)
    rows = [f"{number}.png,{number % 2},{number % 3}" for number in range(20)]
    write_table(tmp_path / "data.csv", "file,color,shape", rows)
    with pytest.raises(ValueError, match=r"several columns that may be the label \(color, shape\)"):
        load(tmp_path)
    assert len(load(tmp_path, label_column="shape").class_names) == 3
    for column, words in (("size", "no column 'size'. Its columns: file, color"), ("file", "a different value for each image")):
        with pytest.raises(ValueError, match=words):
            load(tmp_path, label_column=column)


def test_whole_numbers_written_as_fractions_are_in_order(tmp_path):
    for number in range(24):
        write(tmp_path / "images" / f"im{number}.png", number)
    write_table(tmp_path / "data.csv", "file,label", [f"im{number},{number % 12}.0" for number in range(24)])
    assert load(tmp_path).class_names == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "rows, words",
    [
        (["7.png,"], "Row 21 of .*labels.csv has no label .1 such"),
        (["7.png,fish"], "Row 21 .* gives '7.png' a second label .cat and fish.*multi-label"),
        (["twice.png,cat"], "Row 21 .*'twice.png' may mean any of images/a/twice.png, images/b/twice.png"),
    ],
)
def test_invalid_rows_are_reported(tmp_path, rows, words):
    for name in [*range(20), "a/twice", "b/twice"]:
        write(tmp_path / "images" / f"{name}.png")
    write_table(tmp_path / "labels.csv", "file,label", [*(f"{number}.png,{name_of(number)}" for number in range(20)), *rows])
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_rows_without_an_image_and_images_without_a_row_are_counted(tmp_path):
    for number in range(25):
        write(tmp_path / "images" / f"im{number}.png", number)
    rows = [f"im{number}.png,{name_of(number)}" for number in (*range(20), 90, 91)]
    write_table(tmp_path / "labels.csv", "file,label", rows)
    loaded = load(tmp_path)
    assert sum(counts(loaded)) == 20
    assert noted(loaded, "2 rows of labels.csv refer to missing images: im90.png, im91.png")
    assert noted(loaded, "5 images have no row")


def test_a_label_of_the_test_table_that_training_lacks_is_refused(tmp_path):
    for number in range(20):
        write(tmp_path / "images" / f"im{number}.png", number)
    write_table(tmp_path / "train.csv", "file,label", [f"im{number},{name_of(number)}" for number in range(15)])
    write_table(tmp_path / "test.csv", "file,label", [*(f"im{number},cat" for number in range(15, 19)), "im19,fish"])
    with pytest.raises(ValueError, match="Row 5 of .*test.csv has the label 'fish', which no training image has"):
        load(tmp_path)


def test_a_table_that_agrees_with_the_class_folders_changes_nothing(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    rows = [f"{name}{number}.png,{kind},640,480" for name, kind in (("cat", 0), ("dog", 1)) for number in range(10)]
    write_table(tmp_path / "info.csv", "file,kind,width,height", rows)
    assert load(tmp_path).class_names == ["cat", "dog"]


def test_folders_of_parts_are_not_classes_beside_a_table(tmp_path):
    """The layout of HAM10000: photos in two folders, the diagnosis in a table with other columns."""
    for number in range(40):
        write(tmp_path / f"images_part_{number % 2 + 1}" / f"ISIC_{number}.jpg", number, "JPEG")
    rows = [f"L{number // 2},ISIC_{number},{'nv' if number % 4 else 'mel'},{30 + number % 5}" for number in range(40)]
    write_table(tmp_path / "HAM_metadata.csv", "lesion_id,image_id,dx,age", rows)
    with pytest.raises(ValueError, match=r"images_part_1, images_part_2.*lesion_id, dx, age.*--label_column"):
        load(tmp_path)
    loaded = load(tmp_path, label_column="dx")
    assert loaded.class_names == ["mel", "nv"] and sum(counts(loaded)) == 40


def test_a_table_of_other_facts_leaves_the_class_folders_with_a_note(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    rows = [f"{name}{number}.png,{number % 3},{number % 2}" for name in ("cat", "dog") for number in range(10)]
    write_table(tmp_path / "info.csv", "file,site,camera", rows)
    loaded = load(tmp_path)
    assert loaded.class_names == ["cat", "dog"] and noted(loaded, "info.csv is not used")


@pytest.mark.parametrize(
    "content", ["id,name\n0,cat\n1,dog\n", "id,kind\n0,x\n1,x\n2,y\n", "", "not a table\n1,2,3\n", "a,b\n1,2\n3,4\n"]
)
def test_other_tables_beside_class_folders_change_nothing(tmp_path, content):
    for name in ("cat", "dog"):
        for number in range(20):
            write(tmp_path / name / f"{number}{name}.png" if number > 4 else tmp_path / name / f"{number}.png", number)
    (tmp_path / "classes.csv").write_text(content)
    loaded = load(tmp_path)
    assert loaded.class_names == ["cat", "dog"] and sum(counts(loaded)) == 40


def test_a_broken_table_of_labels_is_an_error(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "train.csv").write_text("file,label\n1,2,3\n")
    with pytest.raises(ValueError, match="Cannot read the table .*train.csv: row 2 has 3 values"):
        load(tmp_path)


def test_a_stream_reads_the_same_table(tmp_path):
    for number in range(20):
        write(tmp_path / "images" / f"{number}.png", number)
    write_table(tmp_path / "labels.csv", "file,label", [f"{number}.png,{name_of(number)}" for number in range(20)])
    held, streamed = load(tmp_path), load(tmp_path, streamed=True)
    assert labelled(streamed) == labelled(held) and streamed.train.encoded(3) == held.train.encoded(3)


# Files and folders


def test_files_that_pillow_recognizes_are_used_and_others_are_counted(tmp_path):
    write_classes(tmp_path, {"a": 9, "b": 10})
    write(tmp_path / "a" / "1.jfif", file_format="JPEG")
    write(tmp_path / "a" / "2.AVIF", file_format="AVIF")
    write(tmp_path / "a" / "no_ending", file_format="WEBP")
    write(tmp_path / "a" / "4.img", file_format="PNG")
    for name in ("boxes.xml", "b.xml", "x.heic", "nothing", "t.txt", ".DS_Store", "Thumbs.db", ".hidden.png"):
        (tmp_path / "b" / name).write_bytes(b"nothing")
    loaded = load(tmp_path)
    assert sum(counts(loaded)) == 23
    assert noted(loaded, "not images: 2 .xml, 1 without an ending, 1 .heic.")


def test_folders_of_the_system_are_skipped_with_a_note(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10, "__MACOSX": 3, "lost+found": 0, "$RECYCLE.BIN": 2})
    write(tmp_path / "a" / "@eaDir" / "thumb.png")
    loaded = load(tmp_path)
    assert loaded.class_names == ["a", "b"] and sum(counts(loaded)) == 20
    for name in ("__MACOSX", "lost+found", "$RECYCLE.BIN", "@eaDir"):
        assert noted(loaded, name)


def test_each_folder_is_read_once(tmp_path):
    """Links to the folder itself, its parent and another class are skipped; links to other folders are followed once."""
    write_classes(tmp_path / "set", {"a": 10, "b": 10})
    write_classes(tmp_path / "outside", {"more": 5})
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "self").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "other").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "loop").symlink_to(tmp_path / "set" / "b" / "loop")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "b")
    for name in ("a/more", "b/again"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "outside" / "more")
    loaded = load(tmp_path / "set")
    assert loaded.class_names == ["a", "b"] and sum(counts(loaded)) == 25
    assert len([name for name, label in labelled(loaded).items() if label == "a"]) == 15
    assert noted(loaded, "Skipped links to folders of the dataset itself")


def test_a_class_that_is_a_link_to_outside_or_to_a_hidden_folder_is_read(tmp_path):
    write_classes(tmp_path / "set" / ".cache", {"a": 10})
    write_classes(tmp_path / "outside", {"b": 10})
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / ".cache" / "a")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "outside" / "b")
    assert sum(counts(load(tmp_path / "set"))) == 20


def test_an_unreadable_folder_is_reported_in_one_line(tmp_path, monkeypatch):
    write_classes(tmp_path, {"a": 10, "b": 10})
    scan = os.scandir

    def refusing(path):
        if str(path).endswith(f"{os.sep}b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"Cannot read the folder .*b: Permission denied\.[^\n]*$"):
        load(tmp_path)


def test_output_of_runs_in_the_folder_is_not_a_class(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10, "report": 1, "wandb/run-1/media": 1, "runs/first/checkpoints": 1})
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    for name in ("results.csv", "report.md"):
        (tmp_path / "report" / name).touch()
    loaded = load(tmp_path)
    assert loaded.class_names == ["a", "b"] and noted(loaded, "report, runs, wandb")
    write_classes(tmp_path / "other", {"report": 10, "runs": 10, "wandb": 10})
    assert load(tmp_path / "other").class_names == ["report", "runs", "wandb"]


@pytest.mark.skipif(sys.platform != "linux", reason="the file system accepts UTF-8 names only")
@pytest.mark.parametrize("loader", ["device", "stream", "workers"])
def test_names_that_are_not_utf_8_train_evaluate_and_report(tmp_path, run_training, loader):
    """Of the set, a class and the files. Class names contain the escaped byte, so that JSON, Markdown and HTML are valid."""
    from pipeline import evaluate
    from pipeline.report.__main__ import main as report

    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/set\xe9"))
    for name in ("caf\udce9", "dog"):
        for number in range(10):
            write(root / name / f"\udce9{name[0]}{number}.png", number)
    loaded = load(root)
    assert loaded.class_names == [r"caf\udce9", "dog"] and loaded.train.encoded(0)
    names = {"c": r"caf\udce9", "d": "dog"}
    assert labelled(loaded) == {f"\udce9{key}{number}.png": name for key, name in names.items() for number in range(10)}
    assert {os.path.dirname(loaded.train.where(row)) for row in range(len(loaded.train))} == {f"{root}/caf\udce9", f"{root}/dog"}
    settings = {"dataset": str(root), "loader": loader, "image_size": 8, "max_train_samples": None}
    escape_unprintable()  # as train.py does
    summary, run_dir = run_training(**settings, batch_size=4, epochs=1)
    assert summary["status"] == "completed" and list(summary["test"]["per_class_accuracy"]) == [r"caf\udce9", "dog"]
    assert from_yaml(run_dir / "config.yaml").dataset == str(root)
    shape = json.loads((run_dir / "model" / "config.json").read_text(encoding="utf-8"))
    assert shape["label_names"] == [r"caf\udce9", "dog"]
    assert r"set\udce9" in (run_dir / "model" / "README.md").read_text(encoding="utf-8")
    assert evaluate.main([str(run_dir), "--json"]) == 0
    if loader == "device":
        assert report([str(run_dir), "--output", str(tmp_path / "report")]) == 0
        assert r"set\udce9" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="the file system accepts UTF-8 names only")
def test_a_table_in_latin_1_names_files_in_latin_1(tmp_path):
    rows = []
    for number in range(20):
        write(tmp_path / "images" / f"caf\udce9{number}.png", number)
        rows.append(f"caf\u00e9{number}.png,{'ab'[number % 2]}")
    (tmp_path / "labels.csv").write_bytes("\n".join(["file,label", *rows]).encode("latin-1"))
    assert labelled(load(tmp_path)) == {f"caf\udce9{number}.png": "ab"[number % 2] for number in range(20)}
