"""A run from given weights: its classifier is fitted before the first step, and the fitted model counts as epoch 0."""

import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PYTHONPATH,
    SMALL_RUN,
    assert_identical,
    cut_back,
    flags,
    in_processes,
    lines_of,
    run_process,
    same_weights,
    weights_of,
)
from PIL import Image

from pipeline.models.linear_probe import Unfittable
from pipeline.models.timm_folder import save_model

NAMES = ("head.weight", "head.bias")
GIVEN = {"head_init_samples": 60, "lr": 0.01}


def save_weights(folder, model_name="simple_mlp", num_classes=7, image_size=8, names=None, **arguments):
    """A timm folder with weights of other classes, whose features separate the digits."""
    import timm

    torch.manual_seed(5)
    model = timm.create_model(model_name, num_classes=num_classes, in_chans=1, **arguments)
    names = names or [str(number) for number in range(num_classes)]
    save_model(
        model, Path(folder), label_names=names, image_size=image_size, in_chans=1, mean=(0.5,), std=(0.5,),
        interpolation="bilinear", crop_pct=1.0, readme="",
    )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "mlp", img_size=8)


def head_of(run_dir):
    return {name: value for name, value in weights_of(run_dir).items() if name in NAMES}


def val_lines(run_dir):
    return [line for line in lines_of(run_dir) if line["split"] == "val"]


def test_epoch_0_is_scikit_learns_logistic_regression_on_the_features(run_training, weights, capsys):
    from sklearn.linear_model import LogisticRegression

    from pipeline.data.image_dataset import load_image_dataset

    summary, run_dir = run_training(init_from=weights, epochs=0, augment="none", drop_rate=0.3)
    head = summary["head"]
    assert head["num_samples"] == 80 and head["loo_accuracy"] > 0.8
    assert f"leave-one-out accuracy {100 * head['loo_accuracy']:.2f} %" in capsys.readouterr().out
    features, labels = {}, {}
    data = load_image_dataset("digits", max_train_samples=100, val_fraction=0.2)
    backbone = load_backbone(weights)
    for name, split in (("train", data.train), ("test", data.test)):
        images = torch.stack([pixels_of(split, row) for row in range(len(split))])
        with torch.no_grad():
            received = backbone.forward_head(backbone.forward_features((images - data.mean[0]) / data.std[0]), True)
        features[name], labels[name] = received.double().numpy(), split.labels
    centre, spread = features["train"].mean(axis=0), features["train"].std(axis=0)
    spread = np.maximum(spread, 1e-3 * spread.mean())
    inputs = {name: (values - centre) / spread for name, values in features.items()}
    model = LogisticRegression(C=1 / head["penalty"], tol=1e-7, max_iter=5000).fit(inputs["train"], labels["train"])
    assert summary["test"]["accuracy"] == pytest.approx(model.score(inputs["test"], labels["test"]), abs=1e-9)
    chances = model.predict_proba(inputs["test"])[np.arange(len(data.test)), data.test.labels]
    assert summary["test"]["loss"] == pytest.approx(-np.log(chances).mean(), rel=1e-3)


def pixels_of(split, row):
    import io

    return torch.from_numpy(np.array(Image.open(io.BytesIO(split.encoded(row))))[None] / np.float32(255))


def load_backbone(folder):
    from pipeline.models.timm_folder import load_model

    return load_model(folder).eval()


def test_epoch_0_is_logged_saved_and_kept_if_no_epoch_is_better(run_training, weights, tmp_path):
    summary, run_dir = run_training(init_from=weights, **GIVEN | {"lr": 2.0, "clip_grad_norm": 1.0})
    lines = val_lines(run_dir)
    assert [(line["epoch"], line["step"], line["samples"]) for line in lines] == [(0, 0, 0), (1, 5, 80), (2, 10, 160)]
    assert max(line["accuracy"] for line in lines[1:]) < lines[0]["accuracy"]
    assert summary["best"]["epoch"] == 0 and summary["best"]["accuracy"] == lines[0]["accuracy"]
    probe, probed = run_training(init_from=weights, run_name="probe", **GIVEN | {"epochs": 0})
    assert same_weights(run_dir, probed)
    assert probe["status"] == "completed" and probe["steps"] == 0 and probe["test"]["accuracy"] == summary["test"]["accuracy"]


def test_training_starts_from_the_fitted_classifier_and_a_moving_average_includes_it(run_training, weights):
    _, probed = run_training(init_from=weights, run_name="probe", epochs=0)
    summary, run_dir = run_training(init_from=weights, lr=1e-9, momentum=0.0, ema_decay=0.5, epochs=1)
    for name, value in head_of(run_dir).items():
        torch.testing.assert_close(value, head_of(probed)[name], rtol=0, atol=1e-6)
    first, last = val_lines(run_dir)
    assert last["ema_loss"] == pytest.approx(first["loss"], abs=1e-5)


@pytest.mark.parametrize("killed_at", [0, 3, 7])
def test_a_run_from_given_weights_resumes_to_the_last_bit(run_training, finished_run, weights, tmp_path, killed_at):
    settings = {"init_from": weights, "checkpoint_every_steps": 1, "keep_checkpoints": 99, **GIVEN}
    _, whole = finished_run(run_name="whole", **settings)
    cut_back(whole, tmp_path / "part", killed_at)
    summary, resumed = run_training(run_name="part", **settings)
    assert_identical(resumed, whole)
    assert summary["head"] == json.loads((whole / "summary.json").read_text())["head"]


def test_a_run_interrupted_before_epoch_0_fits_the_classifier_again(run_training, weights, tmp_path, monkeypatch):
    from pipeline.common.stopping import Interrupted
    from pipeline.training import given_weights

    _, whole = run_training(run_name="whole", init_from=weights, **GIVEN)

    def interrupted(*arguments, **options):
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(given_weights, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            run_training(run_name="part", init_from=weights, **GIVEN)
    assert (tmp_path / "part" / "checkpoints" / "step-00000000").exists()
    _, resumed = run_training(run_name="part", init_from=weights, **GIVEN)
    assert_identical(resumed, whole)


def test_a_signal_during_the_fit_ends_the_run_before_its_first_step(run_training, weights, monkeypatch, tmp_path):
    from pipeline.common.stopping import Interrupted
    from pipeline.models.linear_probe import Logistic

    minimise, signals = Logistic.minimise, iter([signal.SIGINT])  # a second one would end the process

    def interrupted(*arguments):
        for number in signals:
            signal.raise_signal(number)
        return minimise(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Logistic, "minimise", interrupted)
        run_training(init_from=weights, epochs=0)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert run_training(init_from=weights, epochs=0)[0]["head"]["num_samples"] == 80


KILLED_IN_THE_FIT = """
import os, sys, train
from pipeline.models.linear_probe import Logistic
minimise = Logistic.minimise
def killed(logistic, penalty, start, tolerance):
    return minimise(logistic, penalty, start, tolerance) if penalty > 1e3 else os.kill(os.getpid(), 9)
Logistic.minimise = killed
train.main(sys.argv[1:])
"""


def test_a_run_killed_during_the_fit_starts_again_to_the_last_bit(run_training, finished_run, weights, tmp_path):
    settings = {"init_from": weights, "checkpoint_every_steps": 1, "keep_checkpoints": 99, **GIVEN}
    _, whole = finished_run(run_name="whole", **settings)  # that of the test above
    killed = run_process("-c", KILLED_IN_THE_FIT, *flags(output_dir=tmp_path, run_name="part", **settings))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.name for path in (tmp_path / "part").iterdir()} == {".lock", "config.yaml", "dataset.json"}
    summary, resumed = run_training(run_name="part", **settings)
    assert_identical(resumed, whole)
    assert untimed(summary["head"]) == untimed(json.loads((whole / "summary.json").read_text())["head"])


def untimed(head):
    return {name: value for name, value in head.items() if name != "seconds"}


@pytest.mark.parametrize("choice", ["zero", "random"])
def test_other_choices_of_the_classifier(run_training, weights, choice):
    summary, run_dir = run_training(init_from=weights, epochs=0, head_init=choice)
    assert summary["head"] is None and set(summary["best"]) >= {"accuracy", "loss"}
    drawn = bool(head_of(run_dir)["head.weight"].any())
    assert drawn == (choice == "random")
    if choice == "zero":
        assert val_lines(run_dir)[0]["loss"] == pytest.approx(math.log(10), rel=1e-6)


def test_a_classifier_that_the_weights_contain_is_kept_unless_fitted_is_asked_for(run_training, tmp_path):
    weights = save_weights(tmp_path / "same", num_classes=10, img_size=8)
    _, kept = run_training(init_from=weights, run_name="kept", epochs=0)
    assert all(torch.equal(value, load_backbone(weights).state_dict()[name]) for name, value in head_of(kept).items())
    assert len(val_lines(kept)) == 1
    summary, _ = run_training(init_from=weights, run_name="fitted", epochs=0, head_init="fitted")
    assert summary["head"]["num_samples"] == 80


def test_a_classifier_of_other_classes_starts_anew_although_its_shape_fits(run_training, tmp_path):
    weights = save_weights(tmp_path / "others", num_classes=10, names=[f"letter {number}" for number in range(10)], img_size=8)
    summary, _ = run_training(init_from=weights, epochs=0)
    assert summary["head"]["num_samples"] == 80


def test_batchnorm_keeps_the_statistics_of_given_weights_whose_classifier_starts_anew(run_training, tmp_path):
    from pipeline.models.timm_folder import load_model
    from pipeline.run_folder.checkpoint import read_tensors

    small = {"model_name": "test_resnet", "image_size": 16, "epochs": 1, "lr": 1e-5}
    for name, num_classes in (("anew", 7), ("kept", 10)):
        weights = save_weights(tmp_path / name, "test_resnet", num_classes, image_size=16)
        given = load_model(weights).state_dict()
        for frozen in (None, True, False):
            _, run_dir = run_training(run_name=f"{name} {frozen}", init_from=weights, freeze_batchnorm=frozen, **small)
            trained = read_tensors(run_dir / "checkpoints" / "step-00000005", "model")  # not epoch 0, if that is the best
            same = [torch.equal(trained[key], given[key]) for key in given if "running" in key]
            assert all(same) if frozen or frozen is None and name == "anew" else not any(same)
            assert not torch.equal(trained["conv1.0.weight"], given["conv1.0.weight"])
            again, _ = run_training(run_name=f"{name} {frozen}", init_from=weights, freeze_batchnorm=frozen, **small)
            assert again["status"] == "completed"  # null resolves to the recorded value


def test_from_scratch_nothing_changes(finished_run):
    summary, run_dir = finished_run(epochs=1)
    assert summary["head"] is None and [line["epoch"] for line in val_lines(run_dir)] == [1]


def test_epochs_0_needs_weights():
    from pipeline.settings.checks import check_limits
    from pipeline.settings.config import Config

    with pytest.raises(ValueError, match="epochs 0 trains nothing.*--pretrained"):
        check_limits(Config(epochs=0))
    check_limits(Config(epochs=0, pretrained=True, warmup_epochs=2.0, batch_size_schedule={3: 64}))


def model_of_images(name, num_classes=3, **arguments):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    return model, torch.randn(40, 3, 32, 32), torch.arange(40) % num_classes


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
        ("resnetv2_18", {}),
        ("test_vit", {"img_size": 32}),
    ],
    ids=["two classifiers", "a 1x1 convolution", "pooled tokens"],
)
def test_each_classifier_receives_what_is_recorded(name, arguments):
    from types import SimpleNamespace

    from accelerate import Accelerator

    from pipeline.optim.optimizers import classifier_names
    from pipeline.training.given_weights import check_fittable, classifier_inputs

    model, images, _ = model_of_images(name, **arguments)
    check_fittable(model, None)
    for head in classifier_names(model):
        torch.nn.init.normal_(model.get_submodule(head).weight)
    loader = SimpleNamespace(eval_epoch=lambda: zip(images.split(16), torch.arange(40).split(16)), eval_batch_size=16)
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), signals=None)
    features, rows = classifier_inputs(model, loader, run, 40)
    assert torch.equal(rows, torch.arange(40)) and model.training
    heads = [model.get_submodule(head) for head in classifier_names(model)]
    outputs = [values @ head.weight.flatten(1).T + head.bias for values, head in zip(features, heads)]
    torch.testing.assert_close(torch.stack(outputs).mean(dim=0), model.eval()(images), rtol=1e-4, atol=1e-5)
    if len(heads) == 1:
        expected = model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)
        torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-5)


class CosineHead(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, features):
        return torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(self.weight).T


class ScaledLogits(torch.nn.Module):
    """A linear classifier whose output is changed afterwards."""

    def __init__(self, body):
        super().__init__()
        self.body, self.pretrained_cfg = body, {"classifier": "body.head.fc"}

    def forward(self, images):
        return 3 * self.body(images)


def test_a_classifier_that_is_not_one_linear_layer_is_named():
    from types import SimpleNamespace

    from accelerate import Accelerator

    from pipeline.models.timm_folder import LoadReport
    from pipeline.training.given_weights import check_fittable, classifier_inputs

    model, images, _ = model_of_images("test_resnet")
    below = LoadReport("file", (), reinitialised=("layer4.0.conv1.weight", "fc.weight", "fc.bias"))
    with pytest.raises(Unfittable, match="layer4.0.conv1.weight"):
        check_fittable(model, below)
    scaled = ScaledLogits(model)
    scaled.pretrained_cfg = {"classifier": "body.fc"}
    loader = SimpleNamespace(eval_epoch=lambda: [(images, torch.arange(40))], eval_batch_size=40)
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), signals=None)
    with pytest.raises(Unfittable, match="not the output of its last linear layer"):
        classifier_inputs(scaled, loader, run, 40)
    model.fc = CosineHead(model.num_features, 3)
    with pytest.raises(Unfittable, match="CosineHead"):
        check_fittable(model, None)


def test_a_classifier_of_several_layers_is_set_to_zero_in_its_last_one(run_training, weights, monkeypatch, capsys):
    from pipeline.training import given_weights

    def refuse(model, report):
        raise Unfittable("head has several layers")

    monkeypatch.setattr(given_weights, "check_fittable", refuse)
    _, run_dir = run_training(init_from=weights, epochs=0)
    assert not any(value.any() for value in head_of(run_dir).values())
    output = capsys.readouterr().out.splitlines()
    assert "classifier  set to zero, because it cannot be fitted: head has several layers" in output  # of the plan
    assert "classifier set to zero, because it cannot be fitted: head has several layers" in output
    with pytest.raises(ValueError, match="head_init fitted is not possible: head has several layers"):
        run_training(init_from=weights, epochs=0, head_init="fitted", run_name="refused")


def test_an_image_that_cannot_be_decoded_is_no_reason_to_leave_out_the_fit(run_training, weights, tmp_path, capsys):
    from pipeline.common.stopping import TrainingFailed

    for number in range(12):
        path = tmp_path / "photos" / ("train" if number < 8 else "test") / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(path)
    (damaged,) = (tmp_path / "photos").glob("train/*/3.png")
    damaged.write_bytes(damaged.read_bytes()[:80])  # its header is whole
    settings = {"dataset": str(tmp_path / "photos"), "batch_size": 4, "max_train_samples": None, "loader": "workers"}
    with pytest.raises(TrainingFailed, match="3.png"):
        run_training(init_from=weights, num_workers=0, **settings)
    assert "cannot be fitted" not in capsys.readouterr().out


def test_the_sample_is_stratified_and_of_a_stream_from_few_chunks():
    from pipeline.data.shards import Shards, StreamedSplit
    from pipeline.settings.config import Config
    from pipeline.training.given_weights import sampled

    labels = np.arange(600) % 3
    shards = Shards("tar", ["a"], np.zeros(20, np.int64), np.zeros(20, np.int64), np.arange(0, 601, 30))
    split = sampled(StreamedSplit("train", shards, labels, None, "train"), Config(head_init_samples=60))
    assert np.bincount(split.labels).tolist() == [20, 20, 20]
    assert len(split.chunk_starts()[0]) == 2


def fit_in_processes(folder: Path, weights: str, name: str, settings: dict) -> None:
    """Runs in each process, with three penalties to choose from: each iteration of a fit adds up sums over the processes."""
    from pipeline.models import linear_probe
    from pipeline.settings.config import Config
    from pipeline.training.loop import train

    linear_probe.PENALTIES = linear_probe.PENALTIES[3:6]
    train(Config(**{**SMALL_RUN, **settings, "init_from": weights, "epochs": 0, "output_dir": str(folder), "run_name": name}))


ONE = {"max_train_samples": 97}
WAYS = {
    "one": (1, ONE),
    "two": (2, ONE | {"loader": "workers", "num_workers": 1}),
    "four": (4, ONE),
    "stream of two": (2, ONE | {"loader": "stream", "num_workers": 0}),
}


def test_the_classifier_is_the_same_with_any_processes_and_loader(tmp_path, weights):
    ended = run_process(__file__, str(tmp_path), weights, PYTHONPATH=PYTHONPATH)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    one = head_of(tmp_path / "one")
    assert one["head.weight"].abs().max() > 0.01
    for name in WAYS:
        for key, value in head_of(tmp_path / name).items():
            assert (value - one[key]).abs().max() <= 1e-6 * one[key].abs().max(), (name, key)
        figures = [json.loads((tmp_path / run / "summary.json").read_text())["head"] for run in ("one", name)]
        assert figures[0]["loo_accuracy"] == figures[1]["loo_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1]), sys.argv[2]
    sys.exit(max(max(in_processes(number, fit_in_processes, *given, name, more)) for name, (number, more) in WAYS.items()))
