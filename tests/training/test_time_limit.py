"""time_limit: the number of epochs that fit, its record, and a state that measuring does not change."""

import contextlib
import signal

import pytest
import torch
from conftest import SMALL_RUN, assert_identical, cut_back
from steps import batch, make_state, same
from timm.optim import list_optimizers

from pipeline.common.stopping import Interrupted
from pipeline.optim.optimizer_state import state_tensors
from pipeline.optim.optimizers import OPTIMIZERS, check_optimizer_name
from pipeline.optim.timm_optimizers import constructor
from pipeline.run_folder.resume import with_epochs
from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml
from pipeline.training import time_limit
from pipeline.training.step import train_step
from pipeline.training.time_limit import Rates, choose_epochs, epochs_that_fit, kinds, restored

RATES = Rates(steps={(False, 10): 1.0}, epoch_start=2.0, copy=0.5, epoch_end=3.0, finish=5.0)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(time_limit, "MOST_STEPS", 3)


@pytest.mark.parametrize(
    "given, seconds",
    [
        (None, None), (90.0, 90), ("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h 30m", 5400), ("1.5h", 5400),
        ("2h5s", 7205), (0.5, 0.5),
    ],
)  # fmt: skip
def test_durations(given, seconds):
    assert Config(time_limit=given).time_limit_seconds == seconds


@pytest.mark.parametrize("given", ["", "10 minutes", "m", "0s", "-5", "30m1h", "1:30", 0.0])
def test_other_durations_are_refused(given):
    with pytest.raises(ValueError, match="time_limit .* is not a duration above 0, such as 90, 90s, 10m or 1h30m"):
        Config(time_limit=given).time_limit_seconds


# an epoch of 100 images in batches of 10 takes 2 + 10 + 3 = 15 seconds, the end of the run 5
@pytest.mark.parametrize(
    "seconds, settings, expected",
    [
        (19.0, {}, (1, 20.0)),  # at least one
        (34.9, {}, (1, 20.0)),
        (35.0, {}, (2, 35.0)),
        (1505.0, {}, (100, 1505.0)),
        (1505.0, {"epochs": 40}, (40, 605.0)),  # the smaller
        (35.0, {"epochs": 40}, (2, 35.0)),
        (36.9, {"checkpoint_every_steps": 5}, (1, 21.0)),
        (37.0, {"checkpoint_every_steps": 5}, (2, 37.0)),
    ],
)
def test_as_many_epochs_are_chosen_as_fit(seconds, settings, expected):
    assert epochs_that_fit(seconds, RATES, Config(time_limit="1h", batch_size=10, **settings), 100) == expected


def test_frozen_epochs_and_the_batch_size_schedule_have_rates_of_their_own():
    config = Config(time_limit="1h", batch_size=10, batch_size_schedule={2: 20, 9: 50}, freeze_epochs=1)
    assert kinds(config) == [(True, 10), (False, 10), (False, 20), (False, 50)]
    limited = Config(time_limit="1h", batch_size=10, batch_size_schedule={2: 20, 9: 50}, epochs=9)
    assert kinds(limited) == [(False, 10), (False, 20)]
    rates = Rates({(True, 10): 0.1, (False, 10): 1.0, (False, 20): 1.5, (False, 50): 3.0}, 0.0, 0.0, 0.0, 0.0)
    epochs = [1.0, 10.0] + 7 * [5 * 1.5] + 3 * [2 * 3.0]  # seconds
    assert epochs_that_fit(sum(epochs) + 1e-9, rates, config, 100) == (12, pytest.approx(sum(epochs)))
    assert epochs_that_fit(1e9 + 0.5, RATES, Config(time_limit="1h", batch_size=10), 100) == (66666666, 999999995.0)  # at once


def one_of_each_kind():
    """A name for each class of optimizer that is supported."""
    names = {}
    for name in reversed(list_optimizers()):
        with contextlib.suppress(ValueError):
            check_optimizer_name(name)
            names[constructor(name)] = name
    return sorted({*names.values(), *OPTIMIZERS} - {"sam"})


def contents(state):
    """Copies of all that a step changes, by name."""
    named = {**state.model.state_dict(), **state_tensors(state.optimizer.optimizer, state.model), "sums": state.sums}
    named |= {f"average of {name}": value for name, value in state.ema.module.state_dict().items()}
    return {name: value.clone() for name, value in named.items()}


@pytest.mark.parametrize("name", one_of_each_kind())
def test_measured_steps_leave_no_trace(name):
    config = Config(optimizer=name, ema_decay=0.5, clip_grad_norm=0.1)
    state, accelerator = make_state(config, model_name="simple_mlp", dtype=torch.float32)
    before = contents(state)
    with pytest.raises(KeyError), restored(state, accelerator):
        for number in range(3):
            train_step(state, batch(seed=number, dtype=torch.float32), config, accelerator)
        assert not same(contents(state), before)
        raise KeyError
    assert same(contents(state), before) and state.step == state.batch == state.samples == 0
    assert all(parameter.grad is None for parameter in state.model.parameters())
    other, _ = make_state(config, model_name="simple_mlp", dtype=torch.float32)
    for one in (state, other):
        for number in range(2):
            train_step(one, batch(seed=number, dtype=torch.float32), config, accelerator)
    assert same(contents(state), contents(other))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "sam_rho": 0.05, "ema_decay": 0.5, "freeze_epochs": 1, "drop_rate": 0.2, "mixup": 0.4},
        {"loader": "workers", "num_workers": 2, "batch_size_schedule": {1: 24}, "model_name": "test_resnet", "lr": 0.01},
        {"loader": "stream", "num_workers": 1, "drop_last": False},
    ],
)
def test_a_run_with_a_time_limit_equals_one_with_its_number_of_epochs(settings, run_training, finished_run, capsys):
    summary, limited = run_training(**settings, run_name="limited", time_limit="1h")
    _, plain = finished_run(**settings)
    assert_identical(limited, plain)
    assert summary["epochs"] == from_yaml(limited / "config.yaml").epochs == SMALL_RUN["epochs"]
    assert "time limit  1 h 00 min: 2 epochs, expected to end after" in capsys.readouterr().out
    assert not (limited / ".time_limit").exists()


@pytest.fixture
def limited(monkeypatch, run_training):
    """Runs with a time limit into which four epochs fit; the rates are given, so that the choice is not that of this machine."""
    measured = []

    def rates(state, parts, run, limit):
        measured.append(limit)
        return Rates({kind: 0.0 for kind in kinds(run.config)}, 0.0, 0.0, epoch_end=limit / 4.5, finish=0.0)

    def run(**settings):
        return run_training(**{"epochs": None, "time_limit": "1h", **settings})

    monkeypatch.setattr(time_limit, "measured", rates)
    run.measured = measured
    return run


def test_a_resumed_run_keeps_the_choice(limited, finished_run, tmp_path, capsys):
    summary, whole = limited(run_name="whole")
    assert summary["epochs"] == 4 and limited.measured == [3600.0]
    _, plain = finished_run(epochs=4)
    assert_identical(whole, plain)
    cut_back(whole, tmp_path / "part", step=10)
    for settings in ({"time_limit": "60m"}, {"epochs": 9}):  # the same limit, and a number that leaves the choice
        summary, part = limited(run_name="part", **settings)
        assert summary["epochs"] == 4 and limited.measured == [3600.0]
        assert_identical(part, whole)
    assert "part has ended (completed)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="epochs 4 -> 3"):
        limited(run_name="part", epochs=3)
    with pytest.raises(ValueError, match="time_limit 3600.0 -> 7200.0"):
        limited(run_name="part", time_limit="2h")


def test_a_run_that_was_killed_before_the_choice_is_recorded_chooses_again(limited, monkeypatch):
    def kill(*_):
        raise SystemExit

    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr(time_limit, "epochs_that_fit", kill)
        limited(epochs=9)
    summary, run_dir = limited(epochs=9)
    assert summary["epochs"] == from_yaml(run_dir / "config.yaml").epochs == 4 and limited.measured == 2 * [3600.0]


def test_a_signal_during_the_measurement_ends_the_run_before_its_first_step(run_training, monkeypatch, tmp_path):
    steps = time_limit.training_steps

    def interrupted(*arguments):
        for number, _ in enumerate(steps(*arguments)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield

    with monkeypatch.context() as broken:
        broken.setattr(time_limit, "training_steps", interrupted)
        with pytest.raises(Interrupted):
            run_training(time_limit="1h")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert run_training(time_limit="1h")[0]["epochs"] == 2


def test_a_limit_that_is_too_short_trains_one_epoch_and_says_so(run_training, capsys):
    summary, _ = run_training(epochs=None, time_limit=0.001, warmup_epochs=2, batch_size_schedule={3: 32})
    printed = capsys.readouterr()
    assert summary["epochs"] == 1 and "1 epoch, expected to end after" in printed.out
    assert "time_limit 0.001 is too short for one epoch. The run trains one, and ends after about" in printed.err
    assert "warmup_epochs 2 is shortened to half of the run, 0.5 epochs" in printed.err
    assert "batch_size_schedule from epoch 3 on has no effect: the run has 1 epochs." in printed.err


def test_the_plan_names_the_limit(run_training, capsys):
    run_training(epochs=None, time_limit="10m", dry_run=True)
    printed = capsys.readouterr().out
    assert "as many epochs as fit into 10m" in printed and "chosen after the first steps" in printed
    run_training(epochs=3, time_limit="10m", dry_run=True)
    printed = capsys.readouterr().out
    assert "as many epochs as fit into 10m, at most 3" in printed and printed.splitlines()[-1].split()[0] == "3"


def test_the_limit_of_a_run_from_given_weights_includes_its_classifier_and_epoch_0(run_training, finished_run):
    assert epochs_that_fit(37.9, RATES, Config(time_limit="1h", batch_size=10, pretrained=True), 100) == (1, 23.0)
    assert epochs_that_fit(38.0, RATES, Config(time_limit="1h", batch_size=10, pretrained=True), 100) == (2, 38.0)
    _, source = finished_run(epochs=1)
    settings = {"init_from": str(source / "model"), "head_init": "fitted", "lr": 0.01}
    _, plain = run_training(run_name="plain", **settings)
    _, limited = run_training(run_name="limited", **settings, time_limit="1h")
    assert_identical(limited, plain)
    summary, _ = run_training(run_name="only-the-head", **settings, time_limit="1h", epochs=0)
    assert summary["epochs"] == 0


def test_without_a_limit_nothing_is_measured(limited):
    summary, run_dir = limited(time_limit=None)
    assert summary["epochs"] == 8 == from_yaml(run_dir / "config.yaml").epochs and not limited.measured
    assert with_epochs(Config()).epochs == 8 and choose_epochs
