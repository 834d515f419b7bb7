"""Uneven classes: what a run shows of them, what it can monitor, and what corrects them, exactly."""

import json

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import assert_close_figures, assert_identical, cut_back, flags, lines_of, torchrun
from PIL import Image

from pipeline import evaluate
from pipeline.settings.config import DEFAULTS
from pipeline.settings.parser import read_config


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of two noisy classes of images, 60 of one and 20 of the other."""
    folder, draw = tmp_path_factory.mktemp("uneven") / "set", np.random.default_rng(0)
    for number, (name, count) in enumerate({"common": 60, "rare": 20}.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = (draw.integers(0, 200, (8, 8, 3)) + 40 * number).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def settings_of(folder, **settings):
    return {"dataset": str(folder), "max_train_samples": None, "batch_size": 16, "num_workers": 0, "epochs": 3, **settings}


def test_a_run_on_uneven_classes_shows_and_monitors_balanced_figures(run_training, uneven, capsys):
    summary, run_dir = run_training(**settings_of(uneven, monitor="roc_auc"))
    out = capsys.readouterr().out
    test = summary["test"]
    assert f"balanced          {100 * test['balanced_accuracy']:.2f} % (classes of 4 to 12 test images)" in out
    assert f"(validation roc auc {100 * summary['best']['roc_auc']:.2f} %)" in out
    values = [line["roc_auc"] for line in lines_of(run_dir) if line["split"] == "val"]
    assert len(values) == 3 and summary["best"]["roc_auc"] == max(values) == values[summary["best"]["epoch"] - 1]
    recalls = [own["recall"] for own in test["per_class"].values()]
    assert test["balanced_accuracy"] == pytest.approx(sum(recalls) / 2) and list(test["per_class"]) == ["common", "rare"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert evaluate.main([str(run_dir), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    keys = ("balanced_accuracy", "macro_f1", "roc_auc", "per_class")
    assert {key: printed[key] for key in keys} == {key: test[key] for key in keys}


def test_roc_auc_of_more_than_two_classes_is_refused(run_training):
    with pytest.raises(ValueError, match="monitor roc_auc needs two classes, and digits has 10"):
        run_training(monitor="roc_auc")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--loader", "stream", "--sampler", "balanced"], "a stream reads each shard once per epoch"),
        (["--class_weights", "balanced", "--sampler", "balanced"], "would correct twice"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_config(arguments)


@pytest.mark.parametrize("correction", [{"class_weights": "balanced", "mixup": 0.4}, {"sampler": "balanced", "loss": "bce"}])
def test_a_corrected_run_resumes_within_an_epoch_to_the_last_bit(run_training, uneven, tmp_path, correction):
    more = {"checkpoint_every_steps": 1, "keep_checkpoints": 99, **correction}
    _, whole = run_training(run_name="whole", **settings_of(uneven, **more))
    cut_back(whole, tmp_path / "part", 4)
    _, part = run_training(run_name="part", **settings_of(uneven, **more))
    assert_identical(part, whole)


@pytest.mark.parametrize("correction", ["class_weights", "sampler"])
def test_loaders_and_micro_batches_do_not_change_a_corrected_run(run_training, finished_run, uneven, correction):
    settings = settings_of(uneven, epochs=2, **{correction: "balanced"})
    _, plain = run_training(run_name="plain", loader="device", **settings)
    _, workers = run_training(run_name="workers", loader="workers", micro_batch_size=5, **settings)
    _, without = finished_run(run_name="without", **{**settings, correction: getattr(DEFAULTS, correction)})
    assert_close_figures(workers, plain)
    losses = [[line["loss"] for line in lines_of(run) if line.get("event")] for run in (plain, without)]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_two_processes_train_and_measure_what_one_does(run_training, uneven, tmp_path):
    settings = settings_of(uneven, class_weights="balanced", monitor="balanced_accuracy", output_dir=str(tmp_path))
    _, alone = run_training(**settings, run_name="alone")
    done = torchrun(2, *flags(**settings, run_name="two"))
    assert done.returncode == 0, done.stderr
    assert_close_figures(tmp_path / "two", alone)
