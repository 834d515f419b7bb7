"""python -m pipeline.evaluate: a run's test figures bit for bit, and other datasets with classes matched by name."""

import itertools
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import ON_THE_CPU, ROOT, python_that_forks, torchrun
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import evaluate
from pipeline.inference import saved_evaluation
from pipeline.inference.saved_evaluation import EvaluatedModel
from pipeline.inference.saved_model import load_saved_model


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes with eight photos each, all of different sizes."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(("bird", "cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(8):
            pixels = draw.integers(0, 80, (20 + index, 34 - index, 3), dtype=np.uint8) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def evaluated(capsys, *arguments):
    """The JSON that the command prints."""
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def figures(printed):
    keys = (
        "loss", "accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "num_samples", "per_class_accuracy", "per_class",
        "confusion_matrix",
    )  # fmt: skip
    return {key: printed[key] for key in keys}


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 3},
        {"image_size": 16, "micro_batch_size": 3, "max_train_samples": 60},
        {"mixed_precision": "bf16", "channels_last": True, "val_fraction": 0.5},
        {"ema_decay": 0.5, "label_smoothing": 0.1, "gradient_checkpointing": False, "seed": 3},
    ],
)
def test_a_runs_own_test_figures_come_out_to_the_last_digit(finished_run, capsys, monkeypatch, settings):
    summary, run_dir = finished_run(**settings)
    seconds = itertools.count(step=4)
    monkeypatch.setattr(saved_evaluation, "perf_counter", lambda: next(seconds))
    printed = evaluated(capsys, run_dir)
    assert figures(printed) == figures(summary["test"])
    assert (printed["dataset"], printed["split"], printed["mixed_precision"]) == ("digits", "test", summary["mixed_precision"])
    assert printed["images_per_second"] == round(359 / 4, 1)


def test_the_precision_is_that_of_the_runs_launcher(run_training, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    summary, run_dir = run_training()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    printed = evaluated(capsys, run_dir)
    assert printed["mixed_precision"] == "bf16" and figures(printed) == figures(summary["test"])
    printed = evaluated(capsys, run_dir, "--mixed_precision", "no")
    assert printed["mixed_precision"] == "no" and printed["loss"] != summary["test"]["loss"]


def test_a_run_on_photos_has_its_figures_on_every_split(run_training, photos, capsys):
    settings = {"dataset": str(photos), "image_size": 16, "num_workers": 0, "batch_size": 4, "val_fraction": 0.3}
    summary, run_dir = run_training(**settings, max_train_samples=None)
    assert figures(evaluated(capsys, run_dir)) == figures(summary["test"])
    val = evaluated(capsys, run_dir, "--split", "val")
    assert {key: val[key] for key in ("loss", "accuracy", "num_samples")} == {
        key: summary["best"][key] for key in ("loss", "accuracy", "num_samples")
    }
    assert evaluated(capsys, run_dir, "--split", "train")["num_samples"] == 13


def test_a_set_of_twelve_bits_is_prepared_alike_everywhere(run_training, tmp_path, capsys):
    draw = np.random.default_rng(0)
    for number, name in enumerate(("dark", "bright")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(20):
            values = (draw.integers(0, 60, (8, 8)) + 100 * number).astype(np.uint16)
            values[0, 0] = 4095
            Image.fromarray(values).save(tmp_path / "set" / name / f"{index}.png")
    settings = {"dataset": str(tmp_path / "set"), "max_train_samples": None, "epochs": 1, "num_workers": 0}
    summary, run_dir = run_training(**settings)
    assert load_saved_model(str(run_dir)).preprocessing.grey_max == 4095
    assert figures(evaluated(capsys, run_dir)) == figures(summary["test"])
    other = evaluated(capsys, run_dir / "model", "--dataset", tmp_path / "set", "--split", "test", "--batch_size", "16")
    assert figures(other) == figures(summary["test"])


def test_a_timm_folder_has_the_same_figures_on_the_same_dataset(finished_run, capsys):
    summary, run_dir = finished_run()
    printed = evaluated(capsys, run_dir / "model", "--dataset", "digits", "--batch_size", "32")  # as the run's evaluation
    assert figures(printed) == figures(summary["test"])
    printed = evaluated(capsys, f"local-dir:{run_dir / 'model'}", "--dataset", "digits", "--batch_size", "50")
    assert printed["confusion_matrix"] == summary["test"]["confusion_matrix"]


def reordered(folder, target, names):
    """The model of a folder with its classes in another order."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    rows = [config["label_names"].index(name) for name in names]
    weights = load_file(folder / "model.safetensors")
    weights |= {name: weights[name][rows].clone() for name in ("head.weight", "head.bias")}
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**config, "label_names": names}))
    return target


def test_classes_in_another_order_are_matched_by_name(finished_run, tmp_path, capsys):
    summary, run_dir = finished_run(epochs=4)
    names = list("3017294856")
    folder = reordered(run_dir / "model", tmp_path / "other", names)
    printed = evaluated(capsys, folder, "--dataset", "digits", "--batch_size", "16")
    assert printed["confusion_matrix"] == summary["test"]["confusion_matrix"] and printed["accuracy"] > 0.5
    assert printed["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)


def test_flip_averages_the_probabilities_of_an_image_and_its_mirror_image(finished_run):
    _, run_dir = finished_run()
    model = load_saved_model(str(run_dir)).model
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = EvaluatedModel(model, None, flip=True)(images)
        mean = (model(images).softmax(dim=1) + model(images.flip(3)).softmax(dim=1)) / 2
        torch.testing.assert_close(logits.exp(), mean)
        assert not torch.allclose(logits.softmax(dim=1), model(images).softmax(dim=1), atol=1e-3)
        order = torch.arange(9, -1, -1)
        assert torch.equal(EvaluatedModel(model, order, flip=True)(images), logits.flip(1))


def test_flip_is_in_the_commands_figures(finished_run, capsys):
    summary, run_dir = finished_run()
    printed = evaluated(capsys, run_dir, "--tta", "flip")
    assert printed["tta"] == "flip" and printed["loss"] != summary["test"]["loss"]


def test_two_processes_give_the_figures_of_one(finished_run, capsys):
    summary, run_dir = finished_run()
    alone = evaluated(capsys, run_dir)
    done = torchrun(2, "pipeline.evaluate", str(run_dir), "--json", program="-m")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["num_processes"] == 2 and printed["confusion_matrix"] == summary["test"]["confusion_matrix"]
    for key in ("loss", "expected_calibration_error"):
        assert printed[key] == pytest.approx(alone[key], rel=1e-6)


def test_the_report_shows_the_figures(finished_run, capsys):
    summary, run_dir = finished_run()
    capsys.readouterr()
    assert evaluate.main([str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * summary['test']['accuracy']:.2f} %" in out and f"{summary['test']['loss']:.4f}" in out
    assert " ".join(map(str, summary["test"]["confusion_matrix"][3])) in " ".join(out.split())
    own = summary["test"]["per_class"]["3"]
    shown = " ".join(f"{100 * own[key]:.2f} %" for key in ("recall", "precision", "f1"))
    assert f"3 3 {shown}" in " ".join(out.split()) and f"{100 * summary['test']['macro_f1']:.2f} %" in out


def test_of_many_classes_the_report_shows_the_most_confused():
    names = [f"class{number}" for number in range(30)]
    matrix = [[0] * 30 for _ in names]
    matrix[4][7], matrix[9][2], matrix[5][5] = 12, 3, 20
    printed = {"confusion_matrix": matrix, "per_class_accuracy": {name: 1.0 for name in names} | {"class4": 0.25}}
    text = evaluate.confused_pairs(names, printed)
    assert text.index("12  class4 predicted as class7") < text.index("3  class9 predicted as class2")
    assert text.splitlines()[1].split() == ["25.00", "%", "class4"] and "class5 predicted" not in text


def test_a_name_of_two_lines_is_shown_on_one():
    names = ["a\nb", "c"]
    own = {"precision": 1.0, "recall": 0.5, "f1": 2 / 3}
    result = {"confusion_matrix": [[1, 1], [0, 2]], "per_class": {name: own for name in names}}
    result["per_class_accuracy"] = {name: 0.5 for name in names}
    table, pairs = evaluate.confusion_table(names, result), evaluate.confused_pairs(names, result)
    assert table.splitlines()[2].startswith("0 a\\nb ") and len(table.splitlines()) == 4
    assert "1  a\\nb predicted as c" in pairs and "50.00 %  a\\nb" in pairs
    assert evaluate.listed(names) == "a\\nb, c"


def test_an_image_that_cannot_be_read_ends_with_status_1_and_its_name(run_training, photos, capsys):
    _, run_dir = run_training(
        dataset=str(photos), image_size=16, num_workers=0, batch_size=4, val_fraction=0.3, max_train_samples=None
    )
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60].ljust(path.stat().st_size, b"\0"))  # of another size it would be another image
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--split", "train"]) == 1
    assert ".png: Cannot decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["RUN", "--datset", "digits"], ["'--datset'", "Did you mean '--dataset'"]),
        (["RUN", "--tta", "flap"], ["'flap'", "Did you mean 'flip'"]),
        (["RUN", "--batch_size", "0"], ["'0' is not a whole number of 1 or more"]),
        (["RUN", "--hub_config", "x"], ["--hub_config requires --dataset"]),
        (["RUN", "--dataset", "digitz"], ["Did you mean 'digits'"]),
        (["RUN", "--device", "cuda"], ["No device cuda"]),
        (["RUN/model"], ["is not a run and has no dataset", "--dataset"]),
        (["RUN2"], ["No folder", "Did you mean 'run'"]),
        (["resnt18", "--dataset", "digits"], ["Unknown model 'resnt18'", "resnet18"]),
        ([], ["RUN|MODEL"]),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(finished_run, capsys, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, run_dir = finished_run()
    capsys.readouterr()
    try:
        status = evaluate.main([word.replace("RUN", str(run_dir)) for word in arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_run_that_has_not_ended_is_distinguished_from_a_folder_that_is_no_run(finished_run, capsys, tmp_path):
    _, run_dir = finished_run()
    shutil.rmtree(run_dir / "model")
    assert evaluate.main([str(run_dir)]) == 2
    assert "has not ended" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate.main([str(tmp_path / "empty")]) == 2
    assert "neither a run" in capsys.readouterr().err


def put_weights(folder, model_name):
    """Puts random weights into the cache of the Hub's files as published ones."""
    torch.manual_seed(0)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(timm.create_model(model_name).state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.slow
def test_the_readmes_five_minutes_run_as_written(tmp_path):
    """The commands of 'Own photos in five minutes', with the project's folder as the working folder would be.

    With weights that were put where a download would put them, and in less than five minutes: one epoch of small images.
    """
    text = (ROOT / "README.md").read_text().split("### Own photos in five minutes", 1)[1]
    commands = text.split("```sh\n", 1)[1].split("```", 1)[0]
    assert [line.split()[:3] for line in commands.splitlines()] == [
        ["python", "train.py", "--dataset"],
        *(["python", "-m", f"pipeline.{name}"] for name in ("evaluate", "predict", "export")),
    ]
    for name in ("train.py", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            pixels = draw.integers(0, 100, (12, 12, 3)) + 150 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.jpg")
    put_weights(tmp_path / "hub" / "models--timm--tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0")
    commands = commands.replace("--epochs 5", "--epochs 1 --image_size 64")
    (tmp_path / "bin").mkdir()
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    with python_that_forks(tmp_path / "bin", **hub) as python:
        environment = {**os.environ, **ON_THE_CPU, **hub, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1 and "calibration" in done.stdout
    rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert len(rows) == 41 and rows[0] == "image,label_1,probability_1,label_2,probability_2"
    assert all(row.split(",")[1] in ("cat", "dog") for row in rows[1:])
    names = {path.name for path in (tmp_path / "runs" / "photos" / "export" / "onnx").iterdir()}
    assert names == {"model.onnx", "preprocessing.json"}
