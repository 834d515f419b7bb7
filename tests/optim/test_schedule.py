"""Schedules: pure functions that follow torch's schedulers and their formulas."""

import math

import pytest
import torch

from pipeline.optim.schedule import SCHEDULES, best_epoch, check_scheduler_name, lr_scale, should_stop_early
from pipeline.settings.batch_size import batch_size_at, fitting_batch_size, steps_per_epoch
from pipeline.settings.config import Config


def history_of(*accuracies: float) -> list[dict]:
    return [{"val": {"accuracy": accuracy, "loss": 1 - accuracy}} for accuracy in accuracies]


def torch_lrs(scheduler_class, epochs: int, metrics=None, **options) -> list[float]:
    """The learning rate of each epoch under one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_class(optimizer, **options)
    lrs = []
    for epoch in range(epochs):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([metrics[epoch]] if metrics else []))
    return lrs


def test_step_equals_step_lr():
    config = Config(scheduler="step", step_epochs=3.0, gamma=0.5, epochs=10, warmup_epochs=0)
    expected = torch_lrs(torch.optim.lr_scheduler.StepLR, 10, step_size=3, gamma=0.5)
    assert [lr_scale(epoch, [], config) for epoch in range(10)] == pytest.approx(expected)


def test_step_at_listed_epochs_equals_multi_step_lr():
    config = Config(scheduler="step", step_epochs=[2.0, 7.0], epochs=10, warmup_epochs=0)
    expected = torch_lrs(torch.optim.lr_scheduler.MultiStepLR, 10, milestones=[2, 7], gamma=0.1)
    assert [lr_scale(epoch, [], config) for epoch in range(10)] == pytest.approx(expected)


def test_cosine_equals_cosine_annealing_lr():
    config = Config(scheduler="cosine", epochs=10, warmup_epochs=0, min_lr_scale=0.1)
    expected = torch_lrs(torch.optim.lr_scheduler.CosineAnnealingLR, 10, T_max=10, eta_min=0.1)
    assert [lr_scale(epoch, [], config) for epoch in range(10)] == pytest.approx(expected)


def test_linear_equals_linear_lr():
    config = Config(scheduler="linear", epochs=10, warmup_epochs=0, min_lr_scale=0.2)
    expected = torch_lrs(torch.optim.lr_scheduler.LinearLR, 10, start_factor=1.0, end_factor=0.2, total_iters=10)
    assert [lr_scale(epoch, [], config) for epoch in range(10)] == pytest.approx(expected)


def test_plateau_equals_reduce_lr_on_plateau_with_a_patience_of_one_less():
    accuracies = [0.1, 0.5, 0.4, 0.5, 0.5, 0.3, 0.6, 0.6, 0.6, 0.6, 0.2, 0.2, 0.2, 0.7, 0.7]
    config = Config(scheduler="plateau", plateau_patience=2, gamma=0.5, epochs=15, warmup_epochs=0)
    options = {"mode": "max", "patience": 1, "factor": 0.5, "threshold": 0.0}
    expected = torch_lrs(torch.optim.lr_scheduler.ReduceLROnPlateau, 15, metrics=accuracies, **options)
    assert len(set(expected)) > 2
    assert [lr_scale(epoch, history_of(*accuracies[:epoch]), config) for epoch in range(15)] == pytest.approx(expected)


def test_plateau_never_falls_below_min_lr_scale():
    config = Config(scheduler="plateau", plateau_patience=1, min_lr_scale=0.05, warmup_epochs=0)
    assert lr_scale(9, history_of(*[0.5] * 9), config) == 0.05


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_plateau_and_early_stopping_act_after_the_same_number_of_worse_epochs(patience):
    config = Config(scheduler="plateau", plateau_patience=patience, early_stopping_patience=patience, warmup_epochs=0)
    histories = [history_of(0.5, *[0.4] * worse) for worse in range(6)]
    assert [lr_scale(9, history, config) < 1 for history in histories] == [worse >= patience for worse in range(6)]
    assert [should_stop_early(history, config) for history in histories] == [worse >= patience for worse in range(6)]


@pytest.mark.parametrize("nothing", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_ranks_last(nothing):
    def losses(*values):
        return [{"val": {"accuracy": 0.5, "loss": value}} for value in values]

    config = Config(monitor="loss", early_stopping_patience=2, scheduler="plateau", plateau_patience=2, warmup_epochs=0)
    for values, best in (([nothing, 2.0, 1.0], 2), ([1.0, nothing, 2.0], 0), ([nothing], None)):
        assert best_epoch(losses(*values), config) == best
    assert best_epoch(losses(nothing, 2.0), Config()) == 1 and best_epoch(losses(nothing, nothing), Config()) == 0
    assert should_stop_early(losses(1.0, nothing, nothing), config) and lr_scale(3, losses(1.0, nothing, nothing), config) < 1
    assert should_stop_early(losses(nothing, nothing), config) and not should_stop_early(losses(nothing, 1.0, 2.0), config)
    assert best_epoch([{"val": {"loss": nothing}, "val_ema": {"loss": 3.0}}, {"val": {"loss": 4.0}}], config) == 0


def test_warmup_rises_linearly_from_zero_and_meets_the_schedule():
    config = Config(scheduler="constant", warmup_epochs=4.0, epochs=10)
    assert [lr_scale(progress, [], config) for progress in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert lr_scale(4.0, [], Config(scheduler="cosine", warmup_epochs=4.0, epochs=10)) == 1


def test_a_batch_size_schedule_does_not_bend_the_curve():
    plain = Config(epochs=10)
    grown = Config(epochs=10, batch_size_schedule={5: 512})
    assert [lr_scale(p / 4, [], plain) for p in range(40)] == [lr_scale(p / 4, [], grown) for p in range(40)]


@pytest.mark.parametrize("scaling, factor", [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_batch_lr_scaling_scales_the_learning_rate_with_the_batch_size(scaling, factor):
    config = Config(scheduler="constant", batch_size_schedule={5: 512}, batch_lr_scaling=scaling)
    assert lr_scale(4.99, [], config) == 1.0
    assert lr_scale(5.0, [], config) == factor


def test_the_batch_size_of_the_last_started_epoch_applies():
    config = Config(batch_size_schedule={10: 512, 5: 256}, epochs=20)
    assert [batch_size_at(epoch, config) for epoch in (0, 4, 5, 9, 10, 19)] == [128, 128, 256, 256, 512, 512]


@pytest.mark.parametrize(
    "num_samples, drop_last, steps", [(100, True, 3), (100, False, 4), (96, False, 3), (7, True, 1)]
)
def test_steps_per_epoch(num_samples, drop_last, steps):
    assert steps_per_epoch(num_samples, 32, drop_last) == steps


@pytest.mark.parametrize("num_samples, size", [(10, 16), (1294, 32), (4096, 128), (50_000, 128)])
def test_a_small_set_gets_a_smaller_batch_when_none_is_set(num_samples, size):
    assert fitting_batch_size(num_samples) == size


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_stays_between_zero_and_one(name):
    config = Config(scheduler=name, epochs=10)
    values = [lr_scale(progress / 7, history_of(*[0.5] * (progress // 7)), config) for progress in range(71)]
    assert all(0 <= value <= 1 and math.isfinite(value) for value in values)


def test_the_first_of_equal_epochs_is_the_best():
    assert best_epoch([], Config()) is None
    assert best_epoch(history_of(0.1, 0.7, 0.7, 0.2), Config()) == 1
    assert best_epoch(history_of(0.1, 0.7, 0.7, 0.2), Config(monitor="loss")) == 1


def test_of_equal_accuracies_the_one_with_the_lowest_loss_is_the_best():
    figures = ((0.7, 0.5), (0.9, 0.4), (0.9, 0.3), (0.9, 0.3))
    history = [{"val": {"accuracy": accuracy, "loss": loss}} for accuracy, loss in figures]
    assert best_epoch(history, Config()) == 2
    history[1]["val_ema"] = {"accuracy": 0.95, "loss": 0.6}
    assert best_epoch(history, Config()) == 1
    assert should_stop_early(history[2:], Config(early_stopping_patience=1))  # a lower loss alone is no better epoch


def test_early_stopping_counts_epochs_since_the_best():
    config = Config(early_stopping_patience=2)
    assert not should_stop_early(history_of(0.5, 0.4), config)
    assert should_stop_early(history_of(0.5, 0.4, 0.5), config)
    assert not should_stop_early(history_of(0.5, 0.4, 0.6), config)
    assert not should_stop_early(history_of(*[0.5] * 50), Config())


def test_an_unknown_schedule_is_reported_with_close_matches():
    with pytest.raises(ValueError, match="Unknown scheduler 'cosin'. Did you mean 'cosine'"):
        check_scheduler_name("cosin")
