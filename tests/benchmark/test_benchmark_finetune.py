"""`benchmark finetune` at toy size: the same photos for all, a line of test accuracy over time for each contender."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_benchmark import FACTS, check_markdown, in_this_process  # noqa: F401, a fixture

from pipeline.benchmark.__main__ import main
from pipeline.benchmark.finetune import FASTAI, HERE, beside_peers, summary_row, timm_folder
from pipeline.benchmark.peers.finetuning import Task, Timeline, accuracy, model_with_drawn_head, timm_batches
from pipeline.benchmark.reporting import COLUMNS
from pipeline.benchmark.sets import class_folders
from pipeline.models.timm_folder import save_model

NUM_PHOTOS = {"train": 12, "test": 5}  # of each class
COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
SIDE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of train and test with noisy photos of a colour each; one of them is a BMP file."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in NUM_PHOTOS.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(draw.normal(colour, 30, (48, 40, 3)), 0, 255).astype(np.uint8)
                ending = "bmp" if (split, name, number) == ("train", "red", 0) else "png"
                Image.fromarray(pixels).save(folder / split / name / f"{number}.{ending}")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The timm folder of a tiny model of four classes."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("weights"), timm.create_model("test_efficientnet", num_classes=4)
    kept = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.95, "readme": ""}
    save_model(model, folder, label_names=list("abcd"), image_size=SIDE, in_chans=3, **kept)
    return folder


@pytest.fixture
def settings(photos, weights):
    flags = {"dataset": photos, "init_from": weights, "model_name": "test_efficientnet", "image_size": SIDE}
    flags |= {"batch_size": 8, "epochs": 2, "val_fraction": 0.25, "num_workers": 0}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def task(settings, tmp_path):
    found = class_folders(settings, str(tmp_path / "photos"), "")
    kept = {key: found[key] for key in ("num_classes", "image_size")}
    return Task(settings, str(tmp_path / "photos"), **kept, seed=0, workers=0, began=0.0)


def written_rows(folder):
    return [json.loads(line) for line in (folder / "benchmark-finetune.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_contender_has_a_point_for_each_epoch_and_a_missing_peer_is_named(
    in_this_process, settings, tmp_path, capsys, monkeypatch  # noqa: F811
):
    monkeypatch.setattr("pipeline.benchmark.finetune.usable_cores", lambda: 0)
    monkeypatch.setattr("pipeline.benchmark.finetune.find_spec", lambda name: None)
    argv = ["finetune", *settings, "--optimizers", "sgd", "--rounds", "1", "--output", str(tmp_path)]
    assert main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    rows = written_rows(tmp_path)
    names = ["ours, sgd", *HERE["timm"], *HERE["plain"]]
    assert [row["row"] for row in rows] == [*names, FASTAI]
    for row in rows[:-1]:
        assert row.keys() >= FACTS and row["n"] == len(row["test_accuracies"]) == 1
        last, num_test = row["points"][-1], 2 * NUM_PHOTOS["test"]
        assert last["epoch"] == 2 and row["run_seconds"] == last["seconds"]
        seconds = [point["seconds"]["mean"] for point in row["points"]]
        assert seconds == sorted(seconds) and 0 < seconds[0]
        assert all(num_test * value == pytest.approx(round(num_test * value)) for value in row["test_accuracies"])
        assert f"| {row['row']} " in printed
    for row in rows[1:-1]:
        assert [point["epoch"] for point in row["points"]] == [0, 1, 2]
        assert row["points"][-1]["test_accuracy"]["mean"] == row["test_accuracies"][0]
    assert rows[-1]["skipped"].startswith("not installed") and "pip install fastai timm" in printed
    check_markdown(tmp_path / "benchmark-finetune.jsonl", rows, printed)
    assert "18 training, 6 validation and 10 test images to 32x32, batch 8, 2 epochs" in printed
    assert (tmp_path / "benchmark-finetune.png").read_bytes().startswith(b"\x89PNG")


def test_fastai_runs_by_its_own_python_with_the_weights_and_the_photos_of_ours(
    in_this_process, settings, weights, tmp_path, capsys  # noqa: F811
):
    """Here a program in the place of that Python, which returns what it was given."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "given = json.loads(sys.argv[3])\n"
        "given['files'] = sorted(str(path.relative_to(given['photos'])) for path in pathlib.Path(given['photos']).rglob('*.*'))\n"
        "point = {'epoch': 0, 'seconds': 1.5, 'test_accuracy': 0.5}\n"
        "result = {'epochs': [point], 'test_accuracy': 0.5, 'device': 'cpu', 'threads': 1, 'fastai': given}\n"
        "open(sys.argv[4], 'w').write(json.dumps(result))\n"
    )
    python.chmod(0o755)
    argv = ["finetune", *settings, "--optimizers", "--peers", "fastai", "--rounds", "2", "--output", str(tmp_path)]
    assert main([*argv, "--fastai_python", str(python)]) == 0, capsys.readouterr().err
    (row,) = written_rows(tmp_path)
    assert (row["row"], row["n"], row["test_accuracies"]) == (FASTAI, 2, [0.5, 0.5])
    given = row["fastai"]
    assert (given["weights"], given["batch_size"], given["epochs"]) == (f"local-dir:{weights}", 8, 2)
    assert given["seed"] == 1, "the second round has the second seed"
    assert {path.split("/")[1] for path in given["files"]} == {"0000", "0001"}
    assert len(given["files"]) == 2 * sum(NUM_PHOTOS.values())


def test_peers_read_the_splits_of_ours_and_draw_the_head(task, settings):
    model = model_with_drawn_head(task, torch.device("cpu"))
    labels = [label for _, labels in timm_batches(task, model, torch.device("cpu"))["test"] for label in labels.tolist()]
    assert sorted(labels) == [0] * NUM_PHOTOS["test"] + [1] * NUM_PHOTOS["test"]
    again = model_with_drawn_head(Task(**{**vars(task), "seed": 1}), torch.device("cpu"))
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, again.state_dict()[name])}
    assert model.state_dict().keys() - same == {"classifier.weight", "classifier.bias"} and len(same) > 20


def test_the_timm_folder_of_init_from_is_that_of_a_run_a_folder_or_a_file(weights, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(weights)
    assert timm_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert timm_folder(weights) == timm_folder(weights / "model.safetensors") == weights


def test_the_test_of_a_timeline_uses_the_weights_of_each_moment():
    model = torch.nn.Linear(2, 2, bias=False)
    batches = [(torch.eye(2), torch.tensor([0, 1]))]
    timeline = Timeline(model, began=0.0)
    for weights in ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(weights))
        timeline.mark()
    figures = timeline.tested(batches, torch.device("cpu"))
    assert [(point["epoch"], point["test_accuracy"]) for point in figures["epochs"]] == [(0, 1.0), (1, 0.0), (2, 0.5)]
    assert figures["test_accuracy"] == 0.5 == accuracy(model, batches, torch.device("cpu"))


def test_a_row_has_mean_and_deviation_over_the_seeds():
    def result(final, *points):
        epochs = [{"epoch": n, "seconds": s, "test_accuracy": a} for n, (s, a) in enumerate(points)]
        return {"epochs": epochs, "test_accuracy": final, "peak_memory_bytes": 1}

    row = summary_row("ours, sgd", [result(0.9, (4.0, 0.8), (8.0, 0.9)), result(0.7, (6.0, 0.6), (9.0, 0.6))])
    assert row["points"][0]["test_accuracy"] == {"mean": pytest.approx(0.7), "deviation": pytest.approx(0.02**0.5)}
    assert row["points"][0]["seconds"] == {"mean": 5.0, "deviation": pytest.approx(2**0.5)}
    shown = {key: COLUMNS[key][1](row[key]) for key in ("test_accuracies", "run_seconds", "points")}
    assert shown == {"test_accuracies": "80.00 ± 14.14 %", "run_seconds": "8.5 ± 0.7", "points": "0: 70.0 (5 s), 1: 75.0 (8 s)"}
    peer = summary_row("plain", [result(0.75, (1.0, 0.5))])
    assert beside_peers([row, peer]) == ["ours, sgd: +5.00 points against plain"] and beside_peers([row]) == []


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pretrained=false"], "starts from given weights"),
        (["--val_fraction=0"], "selects the best epoch on the test images"),
        (["--time_limit=1m"], "--epochs alone"),
        (["--epochs=1"], "--epochs 2 or more"),
        (["--fastai_python=missing"], "pip install fastai timm"),
    ],
)
def test_unfair_settings_are_refused_in_one_line(more, words, capsys):
    assert main(["finetune", *more]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and words in printed
