"""Real processes: two give the results of one, skip a step together, and a run resumes after signals.

Under torchrun this file is also the program: one launch does the work of all tests of two processes.
"""

import hashlib
import json
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import (
    SMALL_RUN,
    assert_close_figures,
    assert_close_weights,
    assert_identical,
    cut_back,
    flags,
    lines_of,
    run_process,
    start_process,
    torchrun,
    wait_for,
    weights_of,
)

# 80 images in batches of 37: the ranks' shares are uneven and the last batch is short
UNEVEN = {"batch_size": 37, "drop_last": False, "log_every": 1, "epochs": 2}
RUNS: dict[str, dict[str, Any]] = {
    "sam": {"optimizer": "sam", "lr": 0.05},
    "asam": {"optimizer": "sam", "lr": 0.05, "sam_adaptive": True, "sam_rho": 1.0, "micro_batch_size": 7},
    "muon": {"optimizer": "muon", "lr": 0.002},
    "muon with sam": {"optimizer": "muon", "lr": 0.002, "sam_rho": 0.05},
    "frozen at first": {"optimizer": "sgd", "freeze_epochs": 1, "sam_rho": 0.05, "micro_batch_size": 7},
}
RESUMED = {"optimizer": "adamw", "lr": 0.005, "ema_decay": 0.1, "checkpoint_every_steps": 1, "keep_checkpoints": 99}
BALANCED = {**RESUMED, "sampler": "balanced", "loss": "bce"}
RESUMED_STEP = 4  # the first of three steps of the second epoch

# An overflow on the second rank only: where it happens, and the settings of the step.
OVERFLOWS: dict[str, dict[str, Any]] = {
    "first pass, each rank its own": {"optimizer": "muon", "sam_rho": 0.05, "sam_sync": False},
    "first pass": {"optimizer": "sgd", "sam_rho": 0.05, "micro_batch_size": 2},
    "second pass": {"optimizer": "adamw", "sam_rho": 0.05, "clip_grad_norm": 1.0},
    "plain step": {"optimizer": "adamw", "clip_grad_norm": 1.0},
}


def run_of(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Trains in this process, or in this one and the others that torchrun started; returns the run's folder."""
    from accelerate.state import AcceleratorState

    from pipeline.settings.config import Config
    from pipeline.training.loop import train

    AcceleratorState._reset_state()  # but keep the process group
    config = Config(**{**SMALL_RUN, **UNEVEN, **settings, "output_dir": str(folder), "run_name": name})
    train(config)
    return config.run_dir


class Stepping:
    """A small network with BatchNorm on each rank, for steps on batches whose second half is the second rank's."""

    def __init__(self, settings: dict[str, Any], scaler: torch.amp.GradScaler | None = None):
        from accelerate.state import AcceleratorState

        from pipeline.distributed.accelerator import make_accelerator
        from pipeline.optim.ema import create_ema
        from pipeline.optim.optimizers import create_optimizer, set_lr
        from pipeline.settings.config import Config
        from pipeline.training.state import begin_state

        AcceleratorState._reset_state()
        torch.manual_seed(0)
        self.config = Config(ema_decay=0.5, **settings)
        self.accelerator = make_accelerator(self.config)
        self.accelerator.scaler = scaler
        model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        ema = create_ema(model, self.config)
        optimizer = create_optimizer(model, self.config, "no" if scaler is None else "fp16")
        self.state = begin_state(model, optimizer, self.accelerator, ema)
        if scaler is not None:  # from here on Accelerate unscales before it clips
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        set_lr(self.state.optimizer, 0.01)

    def step(self, seed: int, pixel: float | None = None) -> None:
        """A step on this rank's half of a batch of 12; pixel: put into the second rank's first image."""
        from steps import batch

        from pipeline.training.step import Share, train_step

        whole, rank = batch(12, seed, torch.float32), self.accelerator.process_index
        share = Share(whole.images[6 * rank : 6 * rank + 6], whole.labels[6 * rank : 6 * rank + 6], 12, epochs=0.1)
        if pixel is not None and rank == 1:
            share.images[0, 0, 0, 0] = pixel
        train_step(self.state, share, self.config, self.accelerator)

    def overflow_in(self, where: str) -> None:
        """Makes the loss of the second rank infinite: in its next backward pass for "first pass...", else in all later ones."""
        backward, calls = self.accelerator.backward, []

        def overflowing(loss: torch.Tensor) -> None:
            calls.append(loss)
            is_hit = (len(calls) == 1) == where.startswith("first pass") and self.accelerator.process_index == 1
            backward(loss * (math.inf if is_hit else 1.0))

        setattr(self.accelerator, "backward", overflowing)

    def digest(self) -> str:
        """SHA-256 of the weights."""
        parameters = [parameter.detach().flatten() for parameter in self.state.model.parameters()]
        return hashlib.sha256(torch.cat(parameters).numpy().tobytes()).hexdigest()


def overflow_facts(where: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of this rank after a step, then one with an overflow on the second rank, then another step."""
    from steps import cpu_scaler, everything, same

    stepping = Stepping(settings, cpu_scaler(1024.0))
    backward = stepping.accelerator.backward
    stepping.step(seed=0)
    before = everything(stepping.state)
    if where != "plain step":
        stepping.overflow_in(where)
    stepping.step(seed=1, pixel=math.inf if where == "plain step" else None)
    setattr(stepping.accelerator, "backward", backward)
    facts = {
        "unchanged": same(everything(stepping.state), before),
        "scale": stepping.accelerator.scaler.get_scale(),
        "skipped_steps": stepping.state.skipped_steps,
        "step": stepping.state.step,
    }
    stepping.step(seed=2)
    return facts | {
        "continues": not same(everything(stepping.state), before) and stepping.state.skipped_steps == 1,
        "weights": stepping.digest(),
    }


def sharpness_facts(sam_sync: bool) -> str:
    stepping = Stepping({"optimizer": "sam", "sam_sync": sam_sync})
    for seed in range(3):
        stepping.step(seed)
    return stepping.digest()


def reads_of_steps() -> list[str]:
    """The functions that read a tensor during two steps."""
    from device_watch import device_watch

    stepping = Stepping({"optimizer": "muon", "sam_rho": 0.05, "micro_batch_size": 4, "clip_grad_norm": 1.0})
    with device_watch() as watch:
        for seed in range(2):
            stepping.step(seed)
    return [function for _, function in watch.reads]


def work(folder: Path) -> None:
    """Runs in each process; writes the runs and the facts of each rank."""
    from pipeline.distributed.shared_failure import end_process_group

    for name, settings in RUNS.items():
        run_of(folder, name, settings)
    run_of(folder, "resumed", RESUMED)
    balanced = run_of(folder, "balanced", BALANCED)
    if torch.distributed.get_rank() == 0:
        cut_back(balanced, folder / "balanced, resumed", RESUMED_STEP)
    torch.distributed.barrier()
    run_of(folder, "balanced, resumed", BALANCED)
    run_of(folder, "own", {**RUNS["sam"], "sam_sync": False})
    facts: dict[str, Any] = {where: overflow_facts(where, settings) for where, settings in OVERFLOWS.items()}
    facts |= {"together": sharpness_facts(True), "each its own": sharpness_facts(False), "reads": reads_of_steps()}
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))
    end_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the same runs by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name, settings in RUNS.items():
        run_of(one, name, settings)
    run_of(one, "balanced", BALANCED)
    cut_back(run_of(one, "resumed", RESUMED), two / "resumed", RESUMED_STEP)
    ended = torchrun(2, str(two), program=__file__)
    assert ended.returncode == 0, ended.stderr
    return one, two


@pytest.fixture(scope="module")
def ranks(runs: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads((runs[1] / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, "resumed", "balanced"])
def test_two_processes_train_as_one(runs, name):
    one, two = runs
    assert json.loads((two / name / "summary.json").read_text())["num_processes"] == 2
    assert len(lines_of(two / name)) == 11
    assert_close_figures(one / name, two / name)
    has_adam = RUNS.get(name, RESUMED)["optimizer"] in ("adamw", "muon")  # Muon has vectors in AdamW groups
    assert_close_weights(weights_of(one / name), weights_of(two / name), has_adam)


@pytest.mark.slow
def test_two_processes_resume_balanced_draws_within_an_epoch_to_the_last_bit(runs):
    assert_identical(runs[1] / "balanced, resumed", runs[1] / "balanced")


@pytest.mark.slow
def test_each_process_may_perturb_with_its_own_gradient(runs, ranks):
    together, own = ([rank[kind] for rank in ranks] for kind in ("together", "each its own"))
    assert together[0] == together[1] and own[0] == own[1] and own[0] != together[0]
    losses = {
        name: [line["loss"] for line in lines_of(runs[1] / name) if line["split"] == "train"] for name in ("sam", "own")
    }
    assert losses["own"][0] == losses["sam"][0] and losses["own"] != losses["sam"]
    assert losses["own"] == pytest.approx(losses["sam"], rel=0.1)


@pytest.mark.slow
def test_steps_of_two_processes_read_only_adams_step_count(ranks):
    assert [rank["reads"] for rank in ranks] == [["_get_value"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("where", OVERFLOWS)
def test_an_overflow_on_one_rank_skips_the_step_on_both(ranks, where):
    for rank in ranks:
        facts = rank[where]
        assert facts["unchanged"] and facts["continues"]
        assert (facts["scale"], facts["skipped_steps"], facts["step"]) == (512.0, 1, 2)
    assert ranks[0][where]["weights"] == ranks[1][where]["weights"]


# train.py, but before its step `step` it waits for `number` signals: so they arrive there, however slow this machine is.
HELD = """
import sys, time
from pathlib import Path
import train
from pipeline.common.stopping import Signals
from pipeline.training import loop

folder, step, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
train_step, receive, received = loop.train_step, Signals.receive, []

def noted(signals, number, frame):
    receive(signals, number, frame)
    received.append(number)
    (folder / f"received {number}").touch()

def held_step(state, *arguments):
    if state.step == step:
        (folder / f"held at {step}").touch()
        while len(received) < number:
            time.sleep(0.01)
    return train_step(state, *arguments)

Signals.receive, loop.train_step = noted, held_step
sys.exit(train.main(sys.argv[4:]))
"""


def start_held(folder: Path, step: int, number: int, *arguments: str) -> Any:
    """Starts HELD with these arguments of train.py; returns the process when it waits for its first signal."""
    process = start_process("-c", HELD, str(folder), str(step), str(number), *arguments)
    wait_for((folder / f"held at {step}").exists, process=process)
    return process


def interrupt(run_dir: Path, step: int, signal_number: int, *arguments: str) -> list[str]:
    """Starts train.py and stops it with a signal in a step; returns the printed arguments that resume the run."""
    process = start_held(run_dir.parent, step, 1, *arguments[1:])
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal_number, err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", signal.Signals(signal_number).name)
    (line,) = [line for line in out.splitlines() if "To resume: python " in line]
    assert summary["steps"] == step + 1 and f"Saved at step {step + 1}." in line
    return shlex.split(line.partition("To resume: python ")[2])


LONG_RUN = {"epochs": 6, "log_every": 1, "optimizer": "adamw", "lr": 0.005, "ema_decay": 0.5, "drop_rate": 0.2}


@pytest.mark.slow
def test_a_run_stopped_by_signals_resumes_to_the_identical_result(tmp_path):
    arguments = ["train.py", *flags(output_dir=tmp_path, **LONG_RUN)]
    whole = start_process(*arguments, "--run_name=whole")
    stopped = tmp_path / "run"
    arguments = interrupt(stopped, 7, signal.SIGINT, *arguments)
    assert arguments == ["train.py", "--config", str(stopped / "config.yaml")]
    assert interrupt(stopped, 14, signal.SIGTERM, *arguments) == arguments  # in the last step of an epoch
    assert interrupt(stopped, 21, signal.SIGUSR1, *arguments) == arguments
    ended = run_process(*arguments)
    assert ended.returncode == 0 and "Resuming from" in ended.stdout, ended.stderr
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    assert_identical(stopped, tmp_path / "whole")


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    process = start_held(tmp_path, 3, 2, *flags(output_dir=tmp_path, **LONG_RUN))
    process.send_signal(signal.SIGINT)
    # of two signals that are sent at once, either may arrive first
    wait_for((tmp_path / f"received {signal.SIGINT:d}").exists, process=process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run" / "summary.json").exists()


def test_help_ends_with_0_and_a_misspelt_setting_prints_one_line():
    printed = run_process("train.py", "--help")
    assert printed.returncode == 0 and "--batch_size_schedule" in printed.stdout
    printed = run_process("train.py", "--batchsize=16")
    assert printed.returncode == 2 and printed.stdout == ""
    assert printed.stderr.startswith("error: Unknown setting 'batchsize'. Did you mean 'batch_size'")
    assert len(printed.stderr.splitlines()) == 1


def test_failures_in_training_end_with_1_and_print_the_reason(tmp_path):
    bad_image = write_pets(tmp_path / "pets")
    exploding = {"lr": 1e30, "warmup_epochs": 0, "scheduler": "constant", "epochs": 1, "run_name": "exploding"}
    unreadable = {
        "dataset": tmp_path / "pets",
        "image_size": 16,
        "batch_size": 4,
        "num_workers": 1,
        "run_name": "unreadable",
    }
    processes = [
        start_process("train.py", *flags(output_dir=tmp_path, **settings)) for settings in (exploding, unreadable)
    ]
    for process, words in zip(processes, ("was not finite", f"{bad_image}: ")):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1, err
        assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    for name in ("exploding", "unreadable"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "failed"


def write_pets(folder: Path) -> Path:
    """Writes a folder dataset with one truncated image; returns its path."""
    from PIL import Image

    for split, number in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (20 + index, 24), (40 * index, 9, 9))
                image.save(folder / split / name / f"{index}.png")
    bad = folder / "train" / "dog" / "5.png"
    bad.write_bytes(bad.read_bytes()[:50])
    return bad


@pytest.fixture
def small_convnet(run_training):
    """Trains a network with BatchNorm."""

    def run(name: str, **settings: Any) -> tuple[dict[str, Any], Path]:
        return run_training(run_name=name, **{"model_name": "test_resnet", "log_every": 1, "lr": 0.02, **settings})

    return run


def checkpoint_of(run_dir: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def initial_weights(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    from accelerate import Accelerator

    from pipeline.data.from_settings import load_data
    from pipeline.settings.config import Config
    from pipeline.training.build import make_model

    config = Config(**{**SMALL_RUN, **settings})
    return make_model(config, load_data(config, Accelerator()), 8)[0].state_dict()


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_a_frozen_backbone_is_bit_identical_and_trains_afterwards(small_convnet, sam_rho):
    _, run_dir = small_convnet("frozen", freeze_epochs=1, sam_rho=sam_rho, keep_checkpoints=9)
    initial = initial_weights({"model_name": "test_resnet"})
    frozen, ended = checkpoint_of(run_dir, 5), checkpoint_of(run_dir, 10)
    assert initial.keys() == frozen.keys() and any("running_mean" in name for name in initial)
    changed = {name for name, value in frozen.items() if not torch.equal(value, initial[name])}
    assert changed == {"fc.weight", "fc.bias"}
    still = {name for name, value in ended.items() if torch.equal(value, initial[name])}
    assert still == set()


def losses_of(run_dir: Path) -> list[float]:
    losses = [line["loss"] for line in lines_of(run_dir)]
    assert len(losses) > 12
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"optimizer": "sam", "drop_path_rate": 0.2, "micro_batch_size": 8}])
def test_gradient_checkpointing_changes_no_metric_and_no_weight(small_convnet, settings):
    _, plain = small_convnet("plain", **settings)
    _, checkpointed = small_convnet("checkpointed", gradient_checkpointing=True, **settings)
    assert losses_of(checkpointed) == pytest.approx(losses_of(plain), rel=1e-6)
    ours, theirs = weights_of(checkpointed), weights_of(plain)  # the statistics of BatchNorm are among them
    assert all(torch.allclose(value, theirs[name], rtol=1e-5, atol=1e-6) for name, value in ours.items())


def test_channels_last_gives_the_same_losses(small_convnet):
    # with a learning rate that does not amplify rounding
    _, plain = small_convnet("plain", lr=0.002)
    _, channels_last = small_convnet("channels_last", lr=0.002, channels_last=True)
    assert losses_of(channels_last) == pytest.approx(losses_of(plain), rel=1e-4)


@pytest.mark.parametrize(
    "model_name, given, expected",
    [
        ("test_resnet", None, True),
        ("test_resnet", False, False),
        ("test_vit", None, False),  # its one convolution is the patch embedding
        ("simple_mlp", None, False),
        ("simple_mlp", True, True),
    ],
)
def test_channels_last_defaults_to_true_for_convolutional_models(model_name, given, expected):
    import timm
    from accelerate import Accelerator

    from pipeline.distributed.accelerator import with_channels_last
    from pipeline.settings.config import Config

    model = timm.create_model(model_name)
    assert with_channels_last(Config(channels_last=given), model, Accelerator()).channels_last is expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, mode, settings",
    [(True, None, {"optimizer": "sam"}), ("reduce-overhead", "reduce-overhead", {"clip_grad_norm": 1.0})],
)
def test_a_compiled_model_trains_equally_and_keeps_its_names(run_training, monkeypatch, how, mode, settings):
    # traced as usual, but without the C++ compiler, which takes a minute
    modes, plain_compile = [], torch.nn.Module.compile

    def compile_fast(model: torch.nn.Module, dynamic: bool | None, mode: str | None) -> None:
        modes.append(mode)
        plain_compile(model, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_fast)
    settings = {"ema_decay": 0.5, "log_every": 1, **settings}
    summary, ours = run_training(run_name="compiled", compile=how, **settings)
    _, theirs = run_training(run_name="plain", **settings)
    assert modes == [mode] and losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-5)
    for name in ("model", "ema"):
        assert checkpoint_of(ours, 10, name).keys() == weights_of(theirs).keys()
    assert weights_of(ours).keys() == weights_of(theirs).keys()


def test_the_averaged_weights_are_saved_if_they_are_better(run_training):
    settings = {
        "lr": 0.5,
        "scheduler": "constant",
        "epochs": 6,
        "ema_decay": 0.3,
        "keep_checkpoints": 9,
        "monitor": "loss",
    }
    summary, run_dir = run_training(**settings)
    best = summary["best"]
    entries = {line["epoch"]: line for line in lines_of(run_dir) if line["split"] == "val"}
    assert (
        best["weights"] == "ema" and best["loss"] == entries[best["epoch"]]["ema_loss"] < entries[best["epoch"]]["loss"]
    )
    assert best["loss"] == min(min(line["loss"], line["ema_loss"]) for line in entries.values())
    average, kept = checkpoint_of(run_dir, 5 * best["epoch"], "ema"), weights_of(run_dir)
    assert kept.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in kept.items())
    trained = checkpoint_of(run_dir, 5 * best["epoch"])
    assert not all(torch.equal(value, trained[name]) for name, value in kept.items())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
