"""On a GPU: fp16 under its scaler, bf16, Muon's stacked matrices, resume. Skipped where there is none."""

import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, lines_of, wait_for
from torch import nn

from pipeline.common.fork_server import Fork
from pipeline.optim.muon import Muon
from pipeline.sweep.file import sweep_of
from pipeline.sweep.trials import read_summary, start_trial, trial_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

LEARNING_RATES = {"sgd": 0.02, "adamw": 0.002, "muon": 0.002}
START_SCALE = 2.0**10  # low enough for no step of these runs to overflow
HUGE_SCALE = 2.0**30  # high enough for the first steps to overflow

# a network with BatchNorm, 20 steps
SMALL_GPU_RUN: dict[str, Any] = {
    "model_name": "test_resnet", "max_train_samples": 400, "batch_size": 32, "epochs": 2, "log_every": 1,
}  # fmt: skip


@pytest.fixture
def train_on_gpu(run_training, monkeypatch):
    """Trains with the given settings and first loss scale; returns the run's folder."""
    from pipeline.training import loop

    make_accelerator, scales = loop.make_accelerator, [START_SCALE]

    def make_with_scale(config: Any) -> Any:
        accelerator = make_accelerator(config)
        assert accelerator.device.type == "cuda"
        if accelerator.scaler is not None:
            accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=scales[0])
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make_with_scale)

    def run(name: str, scale: float = START_SCALE, **settings: Any) -> Path:
        scales[0] = scale
        summary, run_dir = run_training(run_name=name, **{**SMALL_GPU_RUN, **settings})
        assert summary["status"] == "completed" and summary["device"].startswith("cuda")
        return run_dir

    return run


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    steps = [line for line in lines_of(run_dir) if line["split"] == "train" and "event" not in line]
    assert steps
    return steps


def losses_of(run_dir: Path) -> list[float]:
    """Of the epochs, in training and in validation."""
    losses = [line["loss"] for line in lines_of(run_dir) if line["split"] == "val" or "event" in line]
    assert losses and all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
@pytest.mark.parametrize("parts", [{}, {"micro_batch_size": 12, "clip_grad_norm": 1.0}])
def test_half_precision_trains_as_fp32_does(train_on_gpu, optimizer, sam_rho, parts):
    settings = {"optimizer": optimizer, "lr": LEARNING_RATES[optimizer], "sam_rho": sam_rho, **parts}
    full = losses_of(train_on_gpu("fp32", mixed_precision="no", **settings))
    run_dir = train_on_gpu("fp16", mixed_precision="fp16", **settings)
    assert [step["skipped_steps"] for step in steps_of(run_dir)] == [0] * len(steps_of(run_dir))
    assert {step["scaler_scale"] for step in steps_of(run_dir)} == {START_SCALE}
    # fp16 keeps 11 bits, bf16 8; two epochs of steps let their rounding grow
    assert losses_of(run_dir) == pytest.approx(full, rel=0.05)
    assert losses_of(train_on_gpu("bf16", mixed_precision="bf16", **settings)) == pytest.approx(full, rel=0.1)


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_overflows_are_skipped_counted_and_recovered_from(train_on_gpu, optimizer, sam_rho):
    settings = {"optimizer": optimizer, "lr": LEARNING_RATES[optimizer], "sam_rho": sam_rho, "ema_decay": 0.5}
    run_dir = train_on_gpu("run", HUGE_SCALE, mixed_precision="fp16", epochs=4, clip_grad_norm=1.0, **settings)
    steps = steps_of(run_dir)
    assert steps[0]["skipped_steps"] == 1 and "loss" not in steps[0]
    for step in steps:  # each overflow halves the scale
        assert step["scaler_scale"] == HUGE_SCALE / 2 ** step["skipped_steps"]
    assert 1 <= steps[-1]["skipped_steps"] < len(steps) / 2
    assert steps[-1]["skipped_steps"] == steps[-10]["skipped_steps"]  # the last ones were taken
    losses = [step["loss"] for step in steps if "loss" in step]  # the taken ones
    assert len(losses) == len(steps) - steps[-1]["skipped_steps"]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("mixed_precision, image_size", [("no", 8), ("bf16", 8), ("fp16", 32)])
def test_passes_that_are_replayed_as_cuda_graphs_train_alike(train_on_gpu, monkeypatch, mixed_precision, image_size):
    """At 8 pixels the last maps have one pixel, which is in channels_last and contiguous alike. The last batch has 8 images.

    cuDNN's convolutions otherwise differ from run to run, and TF32 would magnify it to percents within an epoch.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = {"mixed_precision": mixed_precision, "ema_decay": 0.5, "clip_grad_norm": 1.0, "drop_last": False}
    settings |= {"image_size": image_size, "max_train_samples": 410}
    plain = losses_of(train_on_gpu("plain", **settings))
    replayed = losses_of(train_on_gpu("replayed", compile="reduce-overhead", **settings))
    assert replayed == pytest.approx(plain, rel=0.02 if mixed_precision == "no" else 0.1)


@pytest.mark.parametrize("loader", ["device", "workers"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "sam_rho": 0.05, "micro_batch_size": 12},
        {"optimizer": "muon", "ema_decay": 0.5, "clip_grad_norm": 1.0, "mixed_precision": "bf16"},
        {"augment": "randaugment", "mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.25, "label_smoothing": 0.1},
    ],
)
def test_no_step_and_no_batch_waits_for_the_gpu(train_on_gpu, monkeypatch, settings, loader):
    """torch itself raises where Python would wait. The first steps may: they make buffers and choose convolutions."""
    from pipeline.loaders.loader import Loader
    from pipeline.training import loop

    calls = {"step": 0, "batch": 0}

    def checked(name: str, call: Any, *args: Any) -> Any:
        calls[name] += 1
        torch.cuda.set_sync_debug_mode("error" if calls[name] > 3 else "default")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def checked_batches(batches: Any) -> Any:
        while (batch := checked("batch", next, batches, None)) is not None:
            yield batch

    train_step, train_epoch = loop.train_step, Loader.train_epoch
    monkeypatch.setattr(loop, "train_step", lambda *args: checked("step", train_step, *args))
    monkeypatch.setattr(Loader, "train_epoch", lambda *args, **more: checked_batches(train_epoch(*args, **more)))
    train_on_gpu("run", **{"mixed_precision": "no", "loader": loader, "num_workers": 2, "lr": 0.002, **settings})
    assert calls["step"] > 15 and calls["batch"] > 15


def test_a_resumed_run_takes_up_the_loss_scale_and_ends_the_same(train_on_gpu):
    # a model without convolutions: cuDNN's are not the same from run to run
    settings = {
        "model_name": "simple_mlp",
        "mixed_precision": "fp16",
        "optimizer": "adamw",
        "lr": 0.005,
        "sam_rho": 0.05,
    }
    settings |= {"checkpoint_every_steps": 1, "keep_checkpoints": 99, "ema_decay": 0.5}
    whole = train_on_gpu("whole", HUGE_SCALE, **settings)
    expected = steps_of(whole)
    middle = len(expected) // 2 + 3
    part = whole.parent / "part"
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    for checkpoint in (part / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > middle:
            shutil.rmtree(checkpoint)
    resumed = steps_of(train_on_gpu("part", START_SCALE, **settings))
    assert expected[middle]["skipped_steps"] > 0 and len(resumed) == len(expected)
    for ours, theirs in zip(resumed, expected):
        assert [ours[key] for key in ("step", "skipped_steps", "scaler_scale")] == [
            theirs[key] for key in ("step", "skipped_steps", "scaler_scale")
        ]
        assert ("loss" in ours) == ("loss" in theirs)  # none if the step was skipped
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-4)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("loader", ["device", "workers"])
def test_only_log_lines_figures_and_the_fp16_scaler_wait_for_the_gpu(train_on_gpu, monkeypatch, mixed_precision, loader):
    """By torch's own detection of operations that wait; tests/training/test_device_waits.py does the same on a CPU."""
    from pipeline.training import loop

    waits: list[str] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    return function(*arguments, **keywords)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    waits.extend(f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message))

        return call

    monkeypatch.setattr(loop, "train_epoch", watched(loop.train_epoch))
    monkeypatch.setattr(loop, "evaluate", watched(loop.evaluate))
    settings = {"augment": "randaugment", "mixup": 0.2, "cutmix": 1.0, "micro_batch_size": 12, "sam_rho": 0.05}
    settings |= {"optimizer": "muon", "lr": 0.002, "ema_decay": 0.5, "clip_grad_norm": 1.0, "loader": loader}
    train_on_gpu("run", mixed_precision=mixed_precision, **settings)
    allowed = tuple(f"pipeline/training/{name}.py" for name in ("run", "metrics", "samples"))
    allowed += ("torch/amp/grad_scaler.py",) if mixed_precision == "fp16" else ()
    assert waits and [place for place in waits if not place.rpartition(":")[0].endswith(allowed)] == []


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (32, 128), (128, 32)])
def test_stacked_matrices_step_as_each_alone(shape):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for _ in range(4)]
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    updates = {}
    for kind in ("stacked", "alone"):
        params = [nn.Parameter(weight.to("cuda", copy=True)) for weight in weights]
        groups = [params] if kind == "stacked" else [[param] for param in params]
        optimizer = Muon([{"params": group, "use_muon": True} for group in groups], lr=1.0, weight_decay=0.0)
        for param, gradient in zip(params, gradients):
            param.grad = gradient.to("cuda")
        optimizer.step()
        updates[kind] = [param.detach().cpu() - weight for param, weight in zip(params, weights)]
    for stacked, alone in zip(updates["stacked"], updates["alone"]):
        # bf16 keeps 8 bits, and five steps of Newton-Schulz let its rounding grow
        assert (stacked - alone).norm() <= 0.05 * alone.norm() > 0


def test_forked_trials_of_a_sweep_use_the_gpu(tmp_path, monkeypatch):
    """The fork server has imported torch. Each trial initialises CUDA itself."""
    given = {"model_name": "simple_mlp", "max_train_samples": 100, "epochs": 1, "mixed_precision": "no"}
    parameters = {name: {"value": value} for name, value in given.items()} | {"seed": {"values": [0, 1]}}
    metric = {"name": "val/accuracy", "goal": "maximize"}
    sweep = sweep_of({"method": "grid", "metric": metric, "parameters": parameters}, "forked")
    monkeypatch.chdir(ROOT)
    with trial_server(sweep, 2) as server:
        trials = [start_trial(sweep, sweep.space.grid_point(place), tmp_path / str(place), {}, place, server) for place in (0, 1)]
        assert all(isinstance(trial.process, Fork) for trial in trials)
        wait_for(lambda: all(trial.process.poll() is not None for trial in trials), timeout=200)
    assert [trial.process.returncode for trial in trials] == [0, 0]
    assert all(read_summary(trial.run_dir)["device"].startswith("cuda") for trial in trials)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw", "mixed_precision": "fp16"}, {"compile": True, "ema_decay": 0.5}])
def test_a_time_limit_changes_nothing_but_the_number_of_epochs(train_on_gpu, settings):
    settings = {"model_name": "simple_mlp", "lr": 0.005, **settings}  # no convolutions: cuDNN's differ from run to run
    plain = losses_of(train_on_gpu("plain", **settings))
    limited = losses_of(train_on_gpu("limited", **settings, time_limit="1m"))
    assert limited == pytest.approx(plain, rel=1e-3)
