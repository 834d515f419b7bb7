"""SAM and the step around it: the papers' formulas to the last digit, and skipped steps that never were."""

import copy
import math

import pytest
import timm
import torch
from steps import batch, cpu_scaler, everything, make_state, same
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline.optim.ema import create_ema, update_ema
from pipeline.optim.optimizers import create_optimizer, set_lr
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.settings.config import Config
from pipeline.training.run import SMALLEST_SCALE, TrainingFailed, check_scale
from pipeline.training.step import train_step

OVERFLOW = math.inf


class Quadratic(nn.Module):
    """f(w) = sum(a w^2) / 2, whose gradient is a w."""

    def __init__(self, weights, curvatures):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.curvatures = torch.tensor(curvatures)

    def forward(self):
        return (self.curvatures * self.weights.square()).sum() / 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_gradient_on_a_quadratic_is_that_of_the_closed_form(adaptive):
    model, rho = Quadratic([3.0, -0.5, 1.0], [1.0, 4.0, 0.25]), 0.1
    w, a = model.weights.detach().clone(), model.curvatures
    g = a * w
    offset = rho * w.square() * g / (w.abs() * g).norm() if adaptive else rho * g / g.norm()
    model().backward()
    with perturbed(model, rho, adaptive, sharpness_norm(model, adaptive)):
        assert model.weights.grad is None
        assert torch.allclose(model.weights, w + offset, rtol=1e-6)
        model().backward()
    assert torch.equal(model.weights, w)
    assert torch.allclose(model.weights.grad, a * (w + offset), rtol=1e-6)


def test_the_loss_scale_cancels():
    gradients = []
    for scale in (1.0, 4096.0):
        model = Quadratic([3.0, -0.5], [1.0, 4.0])
        (model() * scale).backward()
        with perturbed(model, 0.1, False, sharpness_norm(model, False)):
            (model() * scale).backward()
        gradients.append(model.weights.grad / scale)
    assert torch.equal(*gradients)


def test_weights_and_batchnorm_are_restored_after_an_exception_too():
    model = timm.create_model("test_resnet", num_classes=3)
    cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    before = copy.deepcopy(model.state_dict())
    flags = [module.track_running_stats for module in model.modules() if hasattr(module, "track_running_stats")]
    with pytest.raises(KeyError):
        with perturbed(model, 0.05, False, sharpness_norm(model, False)):
            model(torch.randn(4, 3, 32, 32)).sum().backward()
            raise KeyError("anything")
    assert flags and all(flags)
    assert [m.track_running_stats for m in model.modules() if hasattr(m, "track_running_stats")] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_of_zeros_perturbs_nothing():
    model = Quadratic([0.0, 0.0], [1.0, 1.0])
    model().backward()
    with perturbed(model, 0.05, True, sharpness_norm(model, True)):
        assert torch.equal(model.weights, torch.zeros(2))


def test_a_step_of_sam_and_adamw_is_the_hand_written_double_pass():
    config = Config(optimizer="adamw", sam_rho=0.1, weight_decay=0.1)
    state, accelerator = make_state(config)
    reference = copy.deepcopy(state.model)
    by_hand = create_optimizer(reference, config, "no")
    for optimizer in (state.optimizer, by_hand):
        set_lr(optimizer, 0.01)
    share = batch()
    train_step(state, share, config, accelerator)

    cross_entropy(reference(share.images), share.labels).backward()
    weights = [parameter.detach().clone() for parameter in reference.parameters()]
    norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * parameter.grad / norm
            parameter.grad = None
    buffers = [buffer.clone() for buffer in reference.buffers()]
    cross_entropy(reference(share.images), share.labels).backward()
    with torch.no_grad():
        for parameter, weight in zip(reference.parameters(), weights):
            parameter.copy_(weight)
        for buffer, earlier in zip(reference.buffers(), buffers):
            buffer.copy_(earlier)
    by_hand.step()
    for (name, ours), theirs in zip(state.model.state_dict().items(), reference.state_dict().values()):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_micro_batches_of_any_size_give_the_same_step(optimizer, sam_rho):
    steps = {}
    for micro_batch_size in (None, 8, 2, 1):
        config = Config(optimizer=optimizer, sam_rho=sam_rho, micro_batch_size=micro_batch_size, clip_grad_norm=1.0)
        state, accelerator = make_state(config, model_name="simple_mlp")
        set_lr(state.optimizer, 0.01)
        train_step(state, batch(), config, accelerator)
        steps[micro_batch_size] = torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])
    for weights in steps.values():
        assert torch.allclose(weights, steps[None], rtol=1e-6, atol=1e-6 if optimizer == "muon" else 1e-9)


def test_sam_every_perturbs_every_so_many_steps():
    config, plain = Config(sam_rho=0.1, sam_every=2), Config()
    state, accelerator = make_state(config)
    other, _ = make_state(plain)
    for step, is_plain in ((0, False), (1, True)):
        other.model.load_state_dict(state.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
        for each in (state, other):
            each.step = step
            set_lr(each.optimizer, 0.1)
        train_step(state, batch(), config, accelerator)
        train_step(other, batch(), plain, accelerator)
        assert same(everything(state), everything(other)) == is_plain


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_scaled_step_is_the_unscaled_one(optimizer, sam_rho, micro_batch_size):
    config = Config(optimizer=optimizer, sam_rho=sam_rho, micro_batch_size=micro_batch_size, clip_grad_norm=0.5)
    plain, accelerator = make_state(config)
    set_lr(plain.optimizer, 0.01)
    train_step(plain, batch(), config, accelerator)
    scaled, accelerator = make_state(config, cpu_scaler())
    set_lr(scaled.optimizer, 0.01)
    train_step(scaled, batch(), config, accelerator)
    assert scaled.skipped_steps == 0
    for (name, ours), theirs in zip(scaled.model.state_dict().items(), plain.model.state_dict().values()):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 if optimizer == "muon" else 1e-9), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("overflow_in", ["both passes", "first pass", "second pass", "plain step"])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_an_overflow_skips_the_whole_step_and_changes_nothing(optimizer, overflow_in, micro_batch_size, monkeypatch):
    rho = 0.0 if overflow_in == "plain step" else 0.05
    config = Config(
        optimizer=optimizer, sam_rho=rho, clip_grad_norm=1.0, ema_decay=0.5, micro_batch_size=micro_batch_size
    )
    state, accelerator = make_state(config, cpu_scaler(), dtype=torch.float32)
    set_lr(state.optimizer, 0.01)
    train_step(state, batch(dtype=torch.float32), config, accelerator)
    before, scale = everything(state), accelerator.scaler.get_scale()
    share = batch(seed=1, dtype=torch.float32)
    if overflow_in in ("first pass", "second pass"):
        backward, calls, per_pass = accelerator.backward, [], 1 if micro_batch_size is None else 4

        def overflowing(loss):
            calls.append(loss)
            is_hit = len(calls) > per_pass if overflow_in == "second pass" else len(calls) == 1
            backward(loss * (OVERFLOW if is_hit else 1.0))

        monkeypatch.setattr(accelerator, "backward", overflowing)
    else:
        share.images[0, 0, 0, 0] = OVERFLOW
    train_step(state, share, config, accelerator)
    assert same(everything(state), before)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.skipped_steps == 1 and accelerator.scaler.get_scale() == scale / 2
    assert (state.step, state.bad_step.item()) == (2, -1)
    monkeypatch.undo()
    train_step(state, batch(seed=2, dtype=torch.float32), config, accelerator)
    assert state.skipped_steps == 1 and not same(everything(state), before)


def test_a_collapsed_scale_stops_the_run_with_advice():
    check_scale(SMALLEST_SCALE, 3, "a new run")
    with pytest.raises(TrainingFailed, match="loss scale fell to.*17 steps were skipped.*bf16.*requires a new run"):
        check_scale(SMALLEST_SCALE / 2, 17, "a new run")


def test_the_average_follows_its_formula_and_does_not_depend_on_the_batch_size():
    averages = []
    for parts in (1, 4):
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(0.0)
        ema = create_ema(model, Config(ema_decay=0.5))
        with torch.no_grad():
            model.weight.fill_(1.0)
        for _ in range(parts):
            update_ema(ema, model, 0.5, epochs=1 / parts, step=1000)
        averages.append(ema.module.weight.item())
    assert averages == pytest.approx([0.5, 0.5])
    update_ema(ema, model, 0.999, epochs=1.0, step=0)
    assert ema.module.weight.item() == pytest.approx(0.1 * 0.5 + 0.9)


def test_the_norm_is_measured_in_fp32_over_all_parameters():
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).sum().backward()
    expected = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert sharpness_norm(model, False).item() == pytest.approx(expected)
    assert sharpness_norm(model.bfloat16(), False).dtype == torch.float32
