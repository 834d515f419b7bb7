"""python -m pipeline.predict: the preprocessing of validation, a result for every file, three formats."""

import codecs
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import ON_THE_CPU, ROOT
from PIL import Image

from pipeline import evaluate, predict
from pipeline.inference import prediction
from pipeline.inference.saved_model import load_saved_model, names_of
from pipeline.settings.parser import from_yaml
from pipeline.training.build import assemble

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photo_set(tmp_path_factory):
    """A folder of two classes of ten photos, grey and coloured, all of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for index in range(10):
            shape = (20 + index, 41 - index) if index == 5 else (20 + index, 41 - index, 3)
            pixels = draw.integers(0, 100, shape) + 100 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def photos(photo_set, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(photo_set, tmp_path / "photos")


@pytest.fixture
def photo_run(photo_set, finished_run):
    """The folder of a run on the photos."""
    return finished_run(dataset=str(photo_set), **PHOTO_RUN)[1]


PHOTO_RUN = {"image_size": 16, "num_workers": 0, "batch_size": 4, "max_train_samples": None, "epochs": 4}


def write_test_images(run_dir, folder):
    """The images of the run's test split as files, in order, and their labels."""
    folder.mkdir()
    split = assemble(from_yaml(run_dir / "config.yaml"), Accelerator()).dataset.test
    for row in range(len(split)):
        (folder / f"{row:04d}.png").write_bytes(split.encoded(row))
    return split.labels


def predicted(capsys, *arguments, status=0):
    """What the command writes for each image, and its standard error."""
    capsys.readouterr()
    assert predict.main([*map(str, arguments), "--format", "jsonl"]) == status
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


@pytest.mark.parametrize(
    "settings",
    [{}, {"image_size": 13}, {"image_size": 6, "model_name": "simple_mlp"}, {"dataset": "photos", **PHOTO_RUN}],
)
def test_images_are_preprocessed_as_in_validation_bit_for_bit(finished_run, photo_set, settings):
    _, run_dir = finished_run(**settings | ({"dataset": str(photo_set)} if "dataset" in settings else {}))
    parts = assemble(from_yaml(run_dir / "config.yaml"), Accelerator())
    saved = load_saved_model(str(run_dir))
    assert saved.preprocessing == parts.preprocessing
    split = parts.dataset.test
    read = [prediction.read_image(split.encoded(row), saved.preprocessing) for row in range(len(split))]
    assert len(read) > 1
    expected = torch.cat([images for images, _ in parts.loaders["test"].eval_epoch()])
    assert torch.equal(prediction.to_input(read, saved.preprocessing, CPU), expected)


def test_a_runs_test_images_get_the_predictions_of_its_evaluation(finished_run, tmp_path, capsys):
    summary, run_dir = finished_run(epochs=3)
    labels = write_test_images(run_dir, tmp_path / "test")
    lines, err = predicted(capsys, run_dir, tmp_path / "test")
    assert [line["image"] for line in lines] == sorted(map(str, (tmp_path / "test").iterdir())) and not err
    confusion = np.zeros((10, 10), int)
    for label, line in zip(labels, lines, strict=True):
        confusion[label, line["top"][0]["class"]] += 1
    assert confusion.tolist() == summary["test"]["confusion_matrix"]
    loss = -np.mean([
        np.log(next(top["probability"] for top in line["top"] if top["class"] == label))
        for label, line in zip(labels, predicted(capsys, run_dir, tmp_path / "test", "--top_k", "10")[0], strict=True)
    ])  # fmt: skip
    assert loss == pytest.approx(summary["test"]["loss"], rel=1e-5)
    gaps = np.zeros(15)  # by confidence: how many more answers are right than their probabilities add up to
    for label, line in zip(labels, lines, strict=True):
        gaps[int(np.ceil(15 * line["probability"])) - 1] += (line["top"][0]["class"] == label) - line["probability"]
    assert evaluate.main([str(run_dir), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["expected_calibration_error"]
    assert np.abs(gaps).sum() / len(lines) == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_the_batch_size_does_not_change_the_predictions(photo_run, photos, capsys):
    whole, _ = predicted(capsys, photo_run, photos)
    parts, _ = predicted(capsys, photo_run, photos, "--batch_size", "3")
    assert len(whole) == 20 and [line["image"] for line in whole] == [line["image"] for line in parts]
    for first, second in zip(whole, parts):
        assert first["label"] == second["label"] and first["label"] in ("cat", "dog")
        assert first["probability"] == pytest.approx(second["probability"], rel=1e-5)


def test_all_formats_have_the_same_content_and_top_k_is_at_most_the_classes(photo_run, photos, capsys, tmp_path):
    lines, _ = predicted(capsys, photo_run, photos, "--top_k", "9")
    assert all(len(line["top"]) == 2 for line in lines)
    assert all(line["top"][0] == {"label": line["label"], "probability": line["probability"],
                                  "class": ["cat", "dog"].index(line["label"])} for line in lines)  # fmt: skip
    assert all(sum(top["probability"] for top in line["top"]) == pytest.approx(1) for line in lines)
    assert predict.main([str(photo_run), str(photos), "--format", "csv", "--output", str(tmp_path / "a.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert predict.main([str(photo_run), str(photos), "--top_k", "1"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line, row, cells in zip(lines, rows, table, strict=True):
        assert (line["image"], line["label"]) == (row["image"], row["label_1"])
        assert float(row["probability_2"]) == pytest.approx(line["top"][1]["probability"], abs=1e-6)
        assert cells == [line["image"], line["label"], f"{100 * line['probability']:.2f}", "%"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_long_label_is_cut_in_the_table_only():
    names = ["cat\ndog", "American Staffordshire terrier, Staffordshire terrier, pit bull terrier"]
    _, line = predict.table_lines(["a.png"], names, 2)
    ranked = [(names[1], 1, 0.75), (names[0], 0, 0.25)]
    cells = "a.png  American Staffordshire terrie...  75.00 %  " + r"cat\ndog".ljust(32) + "  25.00 %\n"
    assert line("a.png", ranked) == cells
    assert names[1] in predict.csv_lines(["a.png"], names, 2)[1]("a.png", ranked)


def test_bad_files_are_reported_and_the_rest_are_predicted(photo_run, photos, capsys):
    (photos / "cat" / "3.png").write_bytes((photos / "cat" / "3.png").read_bytes()[:50])
    (photos / "cat" / "4.png").write_bytes(b"")
    lines, err = predicted(capsys, photo_run, "gone.png", photos, photos / "*.jpg", "--batch_size", "2", status=1)
    assert len(lines) == 18 and not {"3.png", "4.png"} & {line["image"].split("cat/")[-1] for line in lines}
    for name in (photos / "cat" / "3.png", photos / "cat" / "4.png", "gone.png", photos / "*.jpg"):
        assert sum(f"error: {name}: " in line for line in err.splitlines()) == 1, name
    assert err.splitlines()[-1] == "18 images predicted, 4 could not be read."


def test_only_bad_files_leave_an_empty_output_and_status_1(finished_run, tmp_path, capsys):
    _, run_dir = finished_run()
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert predicted(capsys, run_dir, tmp_path / "bad.png", status=1)[0] == []


def test_places_are_files_folders_patterns_and_a_list(photos):
    cat, dog = photos / "cat", photos / "dog"
    everything = [str(folder / f"{index}.png") for folder in (cat, dog) for index in range(10)]
    (cat / "notes.txt").write_text("no image")
    (cat / ".hidden.png").write_text("hidden")
    assert prediction.find_images([str(photos)]) == (everything, [], [])
    assert prediction.find_images([str(photos / "**" / "*.png")])[0] == everything
    assert prediction.find_images([str(dog / "[13].*"), str(cat / "2.png")])[0] == [
        str(dog / "1.png"), str(dog / "3.png"), str(cat / "2.png")
    ]  # fmt: skip
    listed = [str(dog / "7.png"), "", str(cat), str(dog / "*.png")]
    found, problems, _ = prediction.find_images(["-"], listed)
    assert found == [str(dog / "7.png"), *everything[:10]] and len(problems) == 1
    (photos / "a[1].png").write_text("")  # an existing file takes precedence over a pattern
    assert prediction.find_images([str(photos / "a[1].png")])[0] == [str(photos / "a[1].png")]


def test_a_list_comes_in_on_standard_input(photo_run, photos, capsys, monkeypatch):
    first, second = photos / "dog" / "1.png", photos / "cat" / "2.png"
    for start, end in ((b"", b"\n"), (codecs.BOM_UTF8, b"\r\n")):
        give_list(monkeypatch, start + os.fsencode(first) + end + os.fsencode(second) + end)
        lines, _ = predicted(capsys, photo_run, "-", "--device", "cpu")
        assert [line["image"] for line in lines] == [str(first), str(second)]


def give_list(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_a_list_in_another_encoding_is_refused_by_name(finished_run, capsys, monkeypatch):
    _, run_dir = finished_run()
    for content, words in (("a.png\n".encode("utf-16"), "is UTF-16. Convert it"), (b"a.png\0b.png\0", "contains NUL bytes")):
        give_list(monkeypatch, content)
        assert predict.main([str(run_dir), "-"]) == 2
        assert words in capsys.readouterr().err


def test_a_line_end_in_a_file_name_does_not_split_a_line_of_the_output(photo_run, photos, capsys, monkeypatch, tmp_path):
    name, bad = str(photos / "dog" / "1\rb.png"), str(photos / "dog" / "2\r.png")
    os.rename(photos / "dog" / "1.png", name)
    Path(bad).write_bytes(b"no image")
    give_list(monkeypatch, os.fsencode(f"{name}\n{bad}\n"))
    lines, err = predicted(capsys, photo_run, "-", status=1)
    assert [line["image"] for line in lines] == [name]
    assert err.splitlines()[0].startswith(f"error: {photos}/dog/2\\r.png: ")
    assert predict.main([str(photo_run), name, "--format", "csv", "--output", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [name]
    assert predict.main([str(photo_run), name]) == 0
    assert capsys.readouterr().out.startswith(f"{photos}/dog/1\\rb.png  ")


@pytest.mark.skipif(sys.platform != "linux", reason="the file system accepts UTF-8 names only")
def test_names_that_are_not_utf_8_do_not_lose_an_answer(photo_run, photos, capsys, monkeypatch, tmp_path):
    """Also where the terminal is ASCII. The escape of a byte is one of JSON, which Python reads as the name."""
    name = os.fsdecode(os.fsencode(photos / "dog") + b"/caf\xe9.png")
    os.rename(photos / "dog" / "1.png", name)
    unicode_name = str(photos / "dog" / "\u732b.png")
    os.rename(photos / "dog" / "2.png", unicode_name)
    give_list(monkeypatch, os.fsencode(f"{name}\n{unicode_name}\n"))
    assert [line["image"] for line in predicted(capsys, photo_run, "-")[0]] == [name, unicode_name]
    everything, _ = predicted(capsys, photo_run, photos)
    assert len(everything) == 20 and {name, unicode_name} < {line["image"] for line in everything}
    for kind in ("jsonl", "csv", "table"):
        assert predict.main([str(photo_run), name, unicode_name, "--format", kind, "--output", str(tmp_path / kind)]) == 0
    assert [json.loads(line)["image"] for line in (tmp_path / "jsonl").read_text().splitlines()] == [name, unicode_name]
    escaped = f"{photos}/dog/caf\\udce9.png"
    assert [row["image"] for row in csv.DictReader(io.StringIO((tmp_path / "csv").read_text()))] == [escaped, unicode_name]
    assert (tmp_path / "table").read_text().startswith(f"{escaped}  ")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert predict.main([str(photo_run), name, unicode_name, "--format", "jsonl"]) == 0
    assert [json.loads(line)["image"] for line in written.getvalue().splitlines()] == [name, unicode_name]


def test_brackets_in_names_are_names_first_and_patterns_second(photos):
    inner = photos / "new[1]"
    inner.mkdir()
    for name in ("photo[1].png", "photo1.png"):
        shutil.copy(photos / "cat" / "1.png", inner / name)
    whole = [str(inner / "photo1.png"), str(inner / "photo[1].png")]
    assert prediction.find_images([str(inner)])[0] == whole
    assert prediction.find_images([str(inner / "photo[1].png")])[0] == whole[1:]
    assert prediction.find_images([str(inner / "*.png")])[0] == whole
    assert prediction.find_images([str(inner / "photo[12].png")])[0] == whole[:1]
    (photos / "new1").mkdir()
    shutil.copy(photos / "cat" / "1.png", photos / "new1" / "other.png")
    assert prediction.find_images([str(inner / "other.png")])[0] == []
    assert prediction.find_images([str(photos / "new[123]" / "*.png")])[0] == [str(photos / "new1" / "other.png")]


def test_a_relative_pattern_gives_relative_paths(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert prediction.find_images(["c*/[12].png"])[0] == ["cat/1.png", "cat/2.png"]


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_without_an_error(photo_run, photos, forking_python):
    command = [str(forking_python), "-m", "pipeline.predict", str(photo_run), str(photos)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ON_THE_CPU}, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["RUN"], ["PATH"]),
        (["RUN", "a.png", "--topk", "3"], ["'--topk'", "Did you mean '--top_k'"]),
        (["RUN", "a.png", "--format", "tabel"], ["Did you mean 'table'"]),
        (["RUN", "a.png", "--output", "RUN"], ["is a folder"]),
        (["RUN", "a.png", "--output", "RUN/no/a.csv"], ["There is no folder"]),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(tmp_path, capsys, arguments, words):
    try:
        status = predict.main([word.replace("RUN", str(tmp_path)) for word in arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_options_and_paths_may_be_in_any_order():
    args = predict.make_parser().read(["--top_k", "2", "runs/a", "b.png", "--format=csv", "c.png"])
    assert (args.model, args.paths, args.top_k, args.format) == ("runs/a", ["b.png", "c.png"], 2, "csv")


def test_an_imagenet_model_reports_readable_names():
    names, descriptions = names_of("test_resnet", timm.create_model("test_resnet"))
    assert len(names) == 1000 and names[0] == "n01440764" and "tench" in descriptions["n01440764"]
    assert names_of("x", timm.create_model("test_resnet", num_classes=7)) == (None, {})


def test_label_names_by_number_may_have_gaps():
    model = timm.create_model("test_resnet", num_classes=3)
    vars(model)["pretrained_cfg"]["label_names"] = {"0": "cat", "2": "dog"}
    assert names_of("x", model)[0] == ["cat", "1", "dog"]
    vars(model)["pretrained_cfg"]["label_names"] = ["cat", "dog"]
    with pytest.raises(ValueError, match="2 label names for 3 classes"):
        names_of("x", model)
