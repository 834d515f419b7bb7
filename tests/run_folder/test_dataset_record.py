"""A run resumes and is evaluated on the images that it was trained on, wherever they are, and on no others."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import yaml
from conftest import lines_of, same_weights, timeless
from PIL import Image

from pipeline.data.fingerprint import fingerprint
from pipeline.data.image_dataset import load_image_dataset
from pipeline.run_folder.checkpoint import checkpoints, read_facts
from pipeline.run_folder.dataset_record import check_same_images, differences, read_record
from pipeline.settings.parser import from_yaml, read_config
from pipeline.training.tracking import Tracker

PHOTOS = {"max_train_samples": None, "batch_size": 8, "lr": 0.01, "log_every": 1, "checkpoint_every_steps": 1}


def write_photos(root, classes=("cat", "dog"), count=20, seed=0):
    draw = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture
def begun(tmp_path, run_training, monkeypatch):
    """A run on `photos` in a folder of its own, killed at step 5 of 8 after the validation of its first epoch."""
    photos = write_photos(tmp_path / "begun" / "photos")
    monkeypatch.chdir(tmp_path / "begun")
    log = Tracker.log

    def killed(self, split, place, values):
        if place["step"] == 6:
            raise RuntimeError("killed")
        log(self, split, place, values)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(dataset="photos", output_dir="runs", **PHOTOS)
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":  # a killed process would not delete the earlier checkpoint
            thread.join()
    return photos


def resume(run_training, path, *arguments):
    """As `python train.py --config PATH ARGUMENTS`."""
    return run_training(**dataclasses.asdict(read_config(["--config", str(path), *arguments])))


def test_config_yaml_has_the_absolute_path_and_what_was_passed(begun):
    text = (begun.parent / "runs" / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text)["dataset"] == str(begun) and "'photos'" in text.splitlines()[0]
    record = read_record(begun.parent / "runs" / "run")
    assert record["given"] == "photos" and record["path"] == str(begun) and record["class_names"] == ["cat", "dog"]
    facts = read_facts(checkpoints(begun.parent / "runs" / "run")[0])
    assert facts["dataset"] == record and record["splits"]["test"]["count"] == 8


def test_a_run_resumes_on_its_own_images_from_a_folder_with_others_of_the_same_name(
    begun, tmp_path, run_training, monkeypatch
):
    write_photos(tmp_path / "elsewhere" / "photos", count=50, seed=1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    summary, run_dir = resume(run_training, "../begun/runs/run/config.yaml")
    assert summary["status"] == "completed" and summary["test"]["num_samples"] == 8
    assert run_dir.resolve() == begun.parent / "runs" / "run" and not (tmp_path / "elsewhere" / "runs").exists()
    monkeypatch.chdir(begun.parent)
    _, whole = run_training(dataset="photos", output_dir="runs", **{**PHOTOS, "run_name": "whole"})
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


def add_a_class(photos):
    write_photos(photos, ["tulip"], 10)


def add_files(photos):
    for number in range(10):
        shutil.copy(photos / "cat" / "000.png", photos / "cat" / f"1{number:02d}.png")


def rename_a_class(photos):
    (photos / "dog").rename(photos / "hound")


def rename_files(photos):
    for path in (photos / "dog").iterdir():
        path.rename(path.with_name(f"{path.stem}x.png"))


def rewrite_images(photos):
    for path in (photos / "dog").iterdir():
        path.write_bytes(path.read_bytes() + b"\0")


def remove_files(photos):
    for number in range(5):
        (photos / "dog" / f"{number:03d}.png").unlink()


CHANGES = {
    add_a_class: r"classes added: tulip; train .* \(.*tulip 0 -> ",
    add_files: r"train 26 -> \d+ images \(cat 13 -> \d+",
    rename_a_class: "classes missing: dog; classes added: hound",
    rename_files: "images of dog in train differ in name or size",
    rewrite_images: "images of dog in train differ in name or size",
    remove_files: r"train 26 -> \d+ images \(",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_resume_on_other_images(begun, run_training, change):
    change(begun)
    before = (begun.parent / "runs" / "run" / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=CHANGES[change]) as error:
            resume(run_training, "runs/run/config.yaml")
        assert "\n" not in str(error.value) and "--dataset" in str(error.value)
    assert (begun.parent / "runs" / "run" / "metrics.jsonl").read_bytes() == before


def test_other_images_under_another_path_are_refused_also_by_a_completed_run(begun, tmp_path, run_training):
    other = write_photos(tmp_path / "other", count=50, seed=1)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{other} does not have the images that runs/run was trained on .*26 -> 64"):
            resume(run_training, "runs/run/config.yaml", f"--dataset={other}")
        resume(run_training, "runs/run/config.yaml")


@pytest.mark.parametrize("spelling", ["./photos", "photos/", "../begun/photos", "moved"])
def test_the_same_images_under_another_path_continue(begun, tmp_path, run_training, spelling):
    if spelling == "moved":
        spelling = str(begun.rename(tmp_path / "moved photos"))
        with pytest.raises(ValueError, match=f"No folder '{begun}'.*--dataset"):
            resume(run_training, "runs/run/config.yaml")
    summary, run_dir = run_training(dataset=spelling, output_dir="runs", **PHOTOS)
    assert summary["status"] == "completed" and summary["steps"] == 6
    assert [line["step"] for line in lines_of(run_dir) if line["split"] == "train" and "lr" in line] == list(range(1, 7))


def test_a_run_folder_that_was_moved_resumes_where_it_is(begun, tmp_path, run_training, monkeypatch):
    moved = shutil.move(begun.parent / "runs", tmp_path / "archive")
    monkeypatch.chdir(tmp_path)
    summary, run_dir = resume(run_training, "archive/run/config.yaml")
    assert summary["status"] == "completed" and run_dir.resolve() == tmp_path / "archive" / "run"
    assert from_yaml(moved / "run" / "config.yaml").run_dir == moved / "run"
    monkeypatch.chdir(moved / "run")
    assert read_config(["--config", "config.yaml"]).run_dir == moved / "run"
    assert read_config(["--config", "config.yaml", "--run_name", "new"]).run_dir == moved / "new"


def test_a_checkpoint_without_a_record_continues_with_a_note(begun, run_training, capsys):
    from safetensors.torch import load_file

    from pipeline.run_folder.checkpoint import save_checkpoint

    run_dir = begun.parent / "runs" / "run"
    (run_dir / "dataset.json").unlink()
    for folder in checkpoints(run_dir):
        facts = {key: value for key, value in read_facts(folder).items() if key not in ("files", "format", "step", "dataset")}
        facts["settings"] |= {"dataset": "photos", "mixed_precision": None}
        tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        save_checkpoint(run_dir, int(folder.name[5:]), tensors, facts)
    summary, _ = run_training(dataset="photos", output_dir="runs", **PHOTOS)
    assert summary["status"] == "completed" and "is not verified" in capsys.readouterr().err


def test_evaluation_export_and_mistakes_are_of_the_run_s_own_images(begun, tmp_path, run_training):
    from pipeline.evaluate import make_parser
    from pipeline.inference.export_formats import images_for_check
    from pipeline.inference.mistakes import most_confident_mistakes
    from pipeline.inference.saved_evaluation import evaluate_saved
    from pipeline.inference.saved_model import load_saved_model

    summary, run_dir = resume(run_training, "runs/run/config.yaml")
    moved = str(begun.rename(tmp_path / "moved"))

    def evaluated(*arguments):
        return evaluate_saved(make_parser().parse_args(["runs/run", "--device", "cpu", *arguments]))

    commands = [
        lambda *dataset: evaluated(*(["--dataset", *dataset] if dataset else [])),
        lambda *dataset: images_for_check(load_saved_model("runs/run"), "onnx", [], *dataset),
        lambda *dataset: most_confident_mistakes(run_dir, 3, *dataset),
    ]
    for command in commands:
        with pytest.raises(ValueError, match=f"No folder '{begun}'.*--dataset"):
            command()
        command(moved)
    figures = evaluated("--dataset", moved)
    assert figures["num_samples"] == 8 and figures["accuracy"] == summary["test"]["accuracy"]
    write_photos(begun, count=50, seed=1)
    for command in commands:
        with pytest.raises(ValueError, match="does not have the images that .*run was trained on"):
            command()


def test_a_stream_of_class_folders_has_the_fingerprint_of_the_folder_and_the_embedded_set_one_of_its_own(tmp_path):
    photos = str(write_photos(tmp_path / "photos"))
    assert fingerprint(load_image_dataset(photos)) == fingerprint(load_image_dataset(photos, streamed=True))
    whole, part = (fingerprint(load_image_dataset("digits", max_train_samples=number)) for number in (None, 100))
    assert differences(whole, whole) == [] and "train 1294 -> 90 images" in differences(whole, part)[0]
    streamed = fingerprint(load_image_dataset("digits", streamed=True))
    assert differences(whole, streamed) == [] and whole["splits"]["train"]["images"] != streamed["splits"]["train"]["images"]


@pytest.mark.parametrize("streamed", [False, True])
def test_tables_are_compared_by_names_sizes_and_labels(tmp_path, streamed, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    photos = write_photos(tmp_path / "photos")
    paths = sorted(photos.rglob("*.png"))

    def table(name, change=lambda rows: rows):
        rows = change([{"image": path.read_bytes(), "label": path.parent.name} for path in paths])
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train.parquet")
        return fingerprint(load_image_dataset(str(tmp_path / name), streamed=streamed))

    first, second = table("first"), table("second")
    assert differences(first, second) == [] and first["path"] != second["path"]
    assert first["splits"]["train"]["kind"] == ("shards" if streamed else "table")
    assert "train 29 -> 36 images" in differences(first, table("more", lambda rows: rows + rows[:10]))[0]
    swapped = table("swapped", lambda rows: [{**rows[0], "label": "dog"}, {**rows[-1], "label": "cat"}, *rows[1:-1]])
    assert differences(first, swapped)


def test_another_commit_of_a_hub_dataset_is_named_and_refused_only_for_other_images(tmp_path, capsys):
    record = {"given": "owner/name", **fingerprint(load_image_dataset("digits")), "commit": "a" * 40}
    check_same_images(record, {**record, "commit": "b" * 40}, tmp_path)
    assert "a" * 40 + " -> " + "b" * 40 in capsys.readouterr().err
    changed = json.loads(json.dumps({**record, "commit": "b" * 40}))
    changed["splits"]["test"]["images"] = changed["splits"]["test"]["class_images"][3] = "other"
    with pytest.raises(ValueError, match="images of 3 in test differ in name or size; commit aaaa.* -> bbbb"):
        check_same_images(record, changed, tmp_path)
