"""The training loop: the files of a run, and results that do not depend on micro-batches, loaders and workers."""

import importlib.util
import json
import math
import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import assert_identical, lines_of, same_weights
from PIL import Image

from pipeline.common.stopping import TrainingFailed
from pipeline.data.image_dataset import load_image_dataset
from pipeline.loaders.build import make_loader
from pipeline.models.small_models import SimpleMLP
from pipeline.settings.config import Config
from pipeline.training import step
from pipeline.training.metrics import add_batch
from pipeline.training.plan import classes_text


def train_losses(run_dir: Path) -> list[float]:
    losses = [line["loss"] for line in lines_of(run_dir) if line["split"] == "train"]
    assert losses
    return losses


def test_a_run_leaves_the_documented_files(run_training):
    summary, run_dir = run_training(keep_checkpoints=5)
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()} - {".lock"}
    checkpoint = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert files == {
        "config.yaml", "dataset.json", "metrics.jsonl", "samples.png", "summary.json",
        "model/config.json", "model/model.safetensors", "model/README.md",
        *(f"checkpoints/step-{step:08d}/{name}" for step in (5, 10) for name in checkpoint),
    }  # fmt: skip
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    expected = {
        "status", "epochs", "steps", "samples", "best", "test", "seconds", "images_per_second", "peak_memory_bytes",
        "num_parameters", "device", "num_processes", "versions",
    }  # fmt: skip
    assert expected <= summary.keys()
    assert (summary["status"], summary["epochs"], summary["steps"], summary["samples"]) == ("completed", 2, 10, 160)
    for part in ("best", "test"):
        assert {"epoch", "loss", "accuracy", "top5_accuracy"} <= summary[part].keys()


def test_every_line_has_its_place_and_its_figures(run_training):
    _, run_dir = run_training(clip_grad_norm=1.0)
    lines = lines_of(run_dir)
    assert all({"split", "epoch", "step", "samples", "seconds"} <= line.keys() for line in lines)
    figures = {"loss", "accuracy", "top5_accuracy", "num_samples"}
    steps = [line for line in lines if line["split"] == "train" and "event" not in line]
    assert [line["step"] for line in steps] == [2, 4, 5, 6, 8, 10]
    assert all({"loss", "lr", "batch_size", "images_per_second", "grad_norm"} <= line.keys() for line in steps)
    ends = [line for line in lines if line.get("event") == "epoch"]
    assert [line["epoch"] for line in ends] == [1, 2] and all(figures <= line.keys() for line in ends)
    assert all(line["num_samples"] == 80 for line in ends)
    assert [line["split"] for line in lines if line["split"] != "train"] == ["val", "val", "test"]
    evaluations = [line for line in lines if line["split"] != "train"]
    assert all(figures | {"balanced_accuracy", "macro_f1"} <= line.keys() for line in evaluations)
    assert not any("roc_auc" in line for line in lines)


def test_a_step_searches_no_package_and_formats_no_stack(run_training, monkeypatch):
    asked = []
    for module, name in ((importlib.util, "find_spec"), (traceback, "format_stack")):
        ask = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, ask=ask, **kwargs: asked.append(args) or ask(*args, **kwargs))
    counts = [len(asked)]
    monkeypatch.setattr(step, "add_batch", lambda *args: counts.append(len(asked)) or add_batch(*args))
    summary, _ = run_training(clip_grad_norm=1.0, ema_decay=0.9, sam_rho=0.05, micro_batch_size=8, epochs=1)
    first_step, last_step = counts[1], counts[-1]
    assert summary["steps"] == 5 and len(counts) == 11
    assert first_step == last_step, asked[first_step:]


@pytest.mark.parametrize("micro_batch_size, most", [(None, 32), (8, 8)])
def test_evaluation_takes_twice_a_training_batch_in_inference_mode(run_training, micro_batch_size, most):
    passes = []

    def note(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(model, SimpleMLP) and len(inputs[0]) > 1:  # one image is looked at before training
            passes.append((model.training, torch.is_inference_mode_enabled(), len(inputs[0])))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run_training(val_fraction=0.0, epochs=1, micro_batch_size=micro_batch_size)
    finally:
        hook.remove()
    assert {inference for training, inference, _ in passes if training} == {False}
    assert {inference for training, inference, _ in passes if not training} == {True}
    assert max(size for training, _, size in passes if training) == (micro_batch_size or 16)
    assert max(size for training, _, size in passes if not training) == most


def test_the_steps_losses_average_to_the_epochs_loss(run_training):
    _, run_dir = run_training(log_every=1)
    lines = [line for line in lines_of(run_dir) if line["split"] == "train"]
    for epoch in (1, 2):
        steps = [line["loss"] for line in lines if line["epoch"] == epoch and "event" not in line]
        (end,) = [line["loss"] for line in lines if line["epoch"] == epoch and "event" in line]
        assert len(steps) == 5 and math.isclose(sum(steps) / 5, end, rel_tol=1e-6)


def test_the_saved_model_reaches_the_test_accuracy_to_the_last_digit(finished_run):
    from accelerate import Accelerator

    from pipeline.data.from_settings import load_data
    from pipeline.training.build import make_preprocessing
    from pipeline.training.evaluation import evaluate
    from pipeline.training.metrics import zero_class_counts

    summary, run_dir = finished_run(epochs=4)
    model = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True)
    config = Config(**yaml.safe_load((run_dir / "config.yaml").read_text()))
    accelerator = Accelerator()
    dataset = load_data(config, accelerator)
    loader = make_loader(
        config, dataset.test, dataset, make_preprocessing(config, dataset, 8, model), accelerator, training=False
    )
    classes = zero_class_counts(10, accelerator.device)
    figures = evaluate(model, loader, accelerator, classes)
    tested = summary["test"]
    assert figures == {key: tested[key] for key in figures} and tested["accuracy"] > 0.5
    assert classes.tolist() == tested["confusion_matrix"]
    config_json = json.loads((run_dir / "model" / "config.json").read_text())
    assert config_json["label_names"] == [str(digit) for digit in range(10)]
    assert config_json["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert {"mean", "std", "interpolation", "crop_pct"} <= config_json["pretrained_cfg"].keys()
    assert "digits" in (run_dir / "model" / "README.md").read_text()


def test_the_same_seed_gives_the_same_run_and_another_one_another(run_training, finished_run):
    _, first = finished_run(run_name="first")
    _, second = run_training(run_name="second")
    _, other = run_training(run_name="other", seed=1)
    assert_identical(first, second)
    assert not same_weights(first, other)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_give_the_same_losses(run_training, finished_run, micro_batch_size):
    settings = {"mixup": 0.2, "label_smoothing": 0.1} if micro_batch_size == 8 else {}
    _, whole = finished_run(run_name="whole", **settings)
    _, parts = run_training(run_name="parts", micro_batch_size=micro_batch_size, **settings)
    assert train_losses(parts) == pytest.approx(train_losses(whole), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_and_workers_give_the_same_run(run_training, finished_run, num_workers):
    _, device = finished_run(run_name="device", loader="device")
    _, workers = run_training(run_name="workers", loader="workers", num_workers=num_workers)
    assert_identical(workers, device)


def test_a_setting_without_effect_is_reported_at_the_start(run_training, capsys):
    run_training(epochs=1, momentum=0.8, optimizer="adamw")
    assert "warning: momentum 0.8 has no effect with optimizer adamw." in capsys.readouterr().err


def test_a_run_without_a_name_gets_a_new_folder_each_time(run_training, tmp_path):
    run_training(run_name=None, epochs=1)
    run_training(run_name=None, epochs=1)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 2 and all(name.startswith("digits-simple_mlp-2") for name in names)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(run_training, tmp_path):
    with pytest.raises(TrainingFailed, match=r"step \d+ in epoch \d was not finite.*learning rate of.*Lower --lr.*new run"):
        run_training(lr=1e30, momentum=0.0, nesterov=False, warmup_epochs=0.0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "not finite" in summary["reason"]


def test_a_failure_in_a_later_epoch_leaves_the_earlier_checkpoint_whole(run_training, tmp_path):
    from pipeline.run_folder.checkpoint import checkpoints, read_facts

    # the batch-size schedule makes the learning rate jump to where the loss overflows
    settings = {"batch_size_schedule": {1: 40}, "batch_lr_scaling": "linear", "lr": 1e-3}
    with pytest.raises(TrainingFailed, match="the last logged loss was .*--init_from .*step-00000005"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "pipeline.optim.schedule.batch_size_at",
                lambda epoch, config: config.batch_size * 10 ** (40 * epoch),
            )
            run_training(**settings)
    (folder,) = checkpoints(tmp_path / "run")
    assert read_facts(folder)["step"] == 5


@pytest.mark.parametrize("drop_last, steps", [(True, [5, 2, 1]), (False, [5, 3, 1])])
def test_a_growing_batch_is_reported_and_a_short_one_used_or_dropped(run_training, capsys, drop_last, steps):
    schedule = {"batch_size_schedule": {1: 30, 2: 500}, "epochs": 3, "micro_batch_size": 9, "drop_last": drop_last}
    summary, run_dir = run_training(log_every=1, **schedule)
    printed = [
        line.split("batch ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")
    ]
    assert printed == ["16", "30", "500"]
    lines = [line for line in lines_of(run_dir) if line["split"] == "train"]
    plain = [line for line in lines if "event" not in line]
    assert [sum(line["epoch"] == epoch for line in plain) for epoch in (1, 2, 3)] == steps
    assert {(line["epoch"], line["batch_size"]) for line in plain} == {(1, 16), (2, 30), (3, 500)}
    assert [line["step"] for line in plain] == list(range(1, sum(steps) + 1))
    seen = [80, 60 if drop_last else 80, 80]  # an epoch that is smaller than its batch is one step
    assert [line["num_samples"] for line in lines if "event" in line] == seen and summary["samples"] == sum(seen)


def test_early_stopping_ends_the_run_and_keeps_the_best(run_training):
    summary, run_dir = run_training(lr=1e-12, epochs=9, early_stopping_patience=2)
    assert (summary["status"], summary["epochs"], summary["best"]["epoch"]) == ("early_stopped", 3, 1)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000005", "step-00000015"]


def test_without_validation_images_the_test_split_is_used_for_both_with_a_note(run_training, capsys):
    summary, _ = run_training(val_fraction=0.0)
    best, test = summary["best"], summary["test"]
    assert all(best[key] == test[key] for key in ("loss", "accuracy", "num_samples"))
    assert "test split" in capsys.readouterr().out


def test_the_plan_lists_the_classes_with_their_images(run_training, capsys):
    run_training(dry_run=True, max_train_samples=None)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("classes"))
    digits = load_image_dataset("digits", val_fraction=0.2)
    fours = [int((split.labels == 4).sum()) for split in (digits.train, digits.val, digits.test)]
    assert f"; 4 {' '.join(map(str, fours))}; 5 " in line and line.endswith("(images in train, val, test)")


def write_squares(root: Path, side: int) -> None:
    for number, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for index in range(20):
            Image.new("L", (side, side), 100 * number + index).save(root / name / f"{index}.png")


def test_an_image_size_that_patches_do_not_cover_is_refused(run_training, tmp_path):
    write_squares(tmp_path / "set", 40)
    with pytest.raises(ValueError, match="the last 10 rows and columns of 90 x 90.*Use --image_size 80 or 96"):
        run_training(dataset=str(tmp_path / "set"), model_name="vit_tiny_patch16_224", image_size=90, dry_run=True)


def test_small_images_that_patches_do_not_cover_are_enlarged_with_a_note(run_training, tmp_path, capsys):
    write_squares(tmp_path / "set", 40)
    run_training(dataset=str(tmp_path / "set"), model_name="vit_tiny_patch16_224", dry_run=True, max_train_samples=None)
    out = capsys.readouterr().out
    assert "last 8 rows and columns of 40 x 40 images: they are enlarged to 48 x 48" in out and "1 x 48 x 48, loader" in out


def test_of_many_classes_the_plan_lists_the_first_and_the_last():
    splits = {name: SimpleNamespace(labels=np.arange(2000)) for name in ("train", "val", "test")}
    text = classes_text(SimpleNamespace(class_names=[f"c\n{number}" for number in range(2000)], **splits))
    assert text.startswith("c\\n0 1 1 1; c\\n1 1 1 1; ") and "c\\n7 1 1 1; ...; c\\n1997 1 1 1" in text


def test_a_dry_run_leaves_no_files_and_prints_the_plan_that_a_run_follows(run_training, tmp_path, capsys):
    settings = {"batch_size_schedule": {1: 32}, "epochs": 3, "optimizer": "adamw", "micro_batch_size": 8, "log_every": 1}
    run_training(dry_run=True, **settings)
    assert list(tmp_path.iterdir()) == []
    facts, groups, epochs = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    summary, run_dir = run_training(**settings)
    plan = dict(line.split(maxsplit=1) for line in facts)
    assert plan["dataset"].endswith(": 80 train, 20 val, 359 test images, 10 classes")
    assert plan["model"] == f"simple_mlp, {summary['num_parameters']:,} parameters"
    assert plan["optimizer"] == "adamw, lr 0.05, schedule cosine" and plan["batch"] == "16, 5 steps per epoch, 3 epochs"
    assert plan["device"] == f"{summary['device']}, processes: 1, mixed precision no" and plan["run"] == str(run_dir)
    rows = [re.split("  +", line.strip()) for line in groups]
    assert {row[0]: row[4] for row in rows} == {
        "parameter group": "weight decay", "weights": "0.05", "norms and biases": "0",
    }  # fmt: skip
    assert sum(int(row[2].replace(",", "")) for row in rows[1:]) == summary["num_parameters"]
    steps = [line for line in lines_of(run_dir) if line["split"] == "train" and "event" not in line]
    for epoch, line in enumerate(epochs[1:], 1):
        own = [step for step in steps if step["epoch"] == epoch]
        batch_size = own[0]["batch_size"]
        rates = [f"{step['lr']:.4g}" for step in (own[0], own[-1])]
        assert line.split() == [str(epoch), str(batch_size), str(len(own)), *rates, str(batch_size // 8)]
    assert len(epochs) == 1 + 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dataset": "cifar11"}, "Did you mean 'cifar10'"),
        ({"model_name": "resnet118"}, "Did you mean"),
        ({"optimizer": "adamv"}, "Unknown optimizer 'adamv'. Did you mean .*'adamw'"),
        ({"scheduler": "cosin"}, "Did you mean 'cosine'"),
        ({"log_with": "tensorbord"}, "Did you mean 'tensorboard'"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_invalid_settings_are_reported_before_any_data_is_loaded(run_training, monkeypatch, settings, words, tmp_path):
    def load(*args, **kwargs):
        raise AssertionError("data was loaded")

    monkeypatch.setattr("pipeline.data.from_settings.load_image_dataset", load)
    with pytest.raises(ValueError, match=words):
        run_training(**settings)
    assert list(tmp_path.iterdir()) == []
