"""Every optimizer of timm: its defaults, our groups and SAM around it, an exact resume, and what is refused."""

import math

import pytest
import timm
import torch
from conftest import assert_identical, cut_back
from safetensors.torch import load, save
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from pipeline.optim.optimizer_state import load_state_tensors, state_tensors
from pipeline.optim.optimizers import OPTIMIZERS, check_optimizer_name, create_optimizer, optimizer_row, peak_lr, set_lr
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.optim.trial import check_optimizer_args, state_per_weight
from pipeline.settings.config import Config

REFUSED = [name for name in list_optimizers() if name.startswith(("bnb", "fused")) or name == "adahessian"]
USABLE = [name for name in list_optimizers() if name not in REFUSED]


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("simple_mlp", num_classes=3, in_chans=1, img_size=5, hidden_sizes=(24, 24))


def descend(model, optimizer, config, steps):
    """Steps down |f(x) - y|^2 over fixed images; returns the loss of each step."""
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(16, 1, 5, 5, generator=generator), torch.randn(16, 3, generator=generator)
    losses = []
    for step in steps:
        set_lr(optimizer, peak_lr(config) * (1 - step / 20))
        loss = (model(images) - targets).square().mean()
        loss.backward()
        if config.sam_rho:
            with perturbed(model, config.sam_rho, False, sharpness_norm(model, False)):
                (model(images) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", USABLE)
def test_with_and_without_sam_a_saved_copy_continues_bitwise(name):
    for rho in (0.0, 0.05):
        config = Config(optimizer=name, sam_rho=rho)
        check_optimizer_name(name)
        model, copy = small_model(), small_model()
        used, other = (create_optimizer(each, config, "no") for each in (model, copy))
        assert all(map(math.isfinite, descend(model, used, config, range(4))))
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), copy.parameters()))
        saved = load(save({key: value.detach().contiguous().clone() for key, value in state_tensors(used, model).items()}))
        copy.load_state_dict(model.state_dict())
        load_state_tensors(other, copy, saved)
        torch.manual_seed(5)  # must not matter
        assert descend(model, used, config, range(4, 8)) == descend(copy, other, config, range(4, 8))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), copy.parameters()))


@pytest.mark.parametrize("name", [name for name in USABLE if name not in OPTIMIZERS and "kron" not in name])
def test_a_step_is_that_of_timms_own_factory(name):
    config = Config(optimizer=name, weight_decay=0.01, momentum=0.9, muon_momentum=0.9)
    model, theirs = small_model(), small_model()
    optimizer = create_optimizer(model, config, "no")
    fallback = {"use_fallback": True} if "muon" in name else {}
    matrices = [parameter for group in optimizer.param_groups if group["weight_decay"] and group.get("use_muon", True)
                for parameter in group["params"]]  # fmt: skip
    groups: dict[bool, list] = {True: [], False: []}
    for ours, parameter in zip(model.parameters(), theirs.parameters()):
        groups[any(ours is matrix for matrix in matrices)].append(parameter)
    if fallback:
        others = [{"params": [p for p in groups[False] if p.ndim > 1], "weight_decay": 0.01, **fallback},
                  {"params": [p for p in groups[False] if p.ndim <= 1], "weight_decay": 0.0, **fallback}]  # fmt: skip
    else:
        others = [{"params": groups[False], "weight_decay": 0.0}]
    reference = create_optimizer_v2(
        [{"params": groups[True], "weight_decay": 0.01}, *others], name, lr=peak_lr(config), momentum=0.9
    )
    for group in reference.param_groups:
        group["lr_scale"] = 1.0
    assert descend(model, optimizer, config, range(4)) == descend(theirs, reference, config, range(4))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_resume_exactly_is_refused_with_the_reason(name):
    reason = "differentiates the gradient" if name == "adahessian" else "an exact resume is not tested"
    with pytest.raises(ValueError, match=rf"optimizer {name} is not supported: .*{reason}.* Use \w+\."):
        check_optimizer_name(name)


def test_kron_without_opt_einsum_is_refused(monkeypatch):
    monkeypatch.setattr("timm.optim.kron.has_opt_einsum", False)
    with pytest.raises(ValueError, match="optimizer kronw needs the package opt_einsum"):
        check_optimizer_name("kronw")


def test_our_own_rows_keep_their_names_and_timm_has_more():
    assert list(OPTIMIZERS) == ["sgd", "adam", "adamw", "sam", "muon"] and len(USABLE) > 70
    assert all(optimizer_row(name) is row for name, row in OPTIMIZERS.items())


def test_the_row_has_timms_defaults():
    assert (optimizer_row("lion").lr, optimizer_row("lamb").weight_decay) == (1e-4, 0.01)
    assert optimizer_row("madgrad").settings == ("momentum",) and optimizer_row("lion").settings == ()
    optimizer = create_optimizer(small_model(), Config(optimizer="rmsproptf", momentum=0.8), "no")
    assert all((group["momentum"], group["alpha"]) == (0.8, 0.9) for group in optimizer.param_groups)
    assert get_optimizer_info("rmsproptf").defaults == {"alpha": 0.9}


def test_a_corrected_weight_decay_knows_the_peak_of_its_group():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2)
    optimizer = create_optimizer(model, Config(optimizer="adamc", lr=0.02, layer_decay=0.5), "no")
    assert {group["max_lr_snapshot"] for group in optimizer.param_groups} == {0.02, 0.01, 0.005, 0.0025}


def test_optimizer_args_arrive_in_every_group_also_of_our_own_rows():
    for name in ("lion", "adamw", "adan"):
        betas = [0.8, 0.9, 0.95] if name == "adan" else [0.9, 0.95]
        config = Config(optimizer=name, optimizer_args={"betas": betas})
        check_optimizer_args(config)
        optimizer = create_optimizer(small_model(), config, "no")
        assert len(optimizer.param_groups) == 2 and all(group["betas"] == tuple(betas) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("lion", {"beta": [0.9, 0.99]}, "must not contain 'beta'. Did you mean 'betas'"),
        ("lion", {"betas": [0.9, 1.5]}, r"lion does not accept optimizer_args \{'betas': \[0.9, 1.5\]\}: Invalid beta parameter"),
        ("lamb", {"lr": 0.1}, "Use the setting lr"),
        ("sgd", {"nesterov": False}, "Use the setting nesterov"),
        ("nmuon", {"momentum": 0.5}, "Use the setting muon_momentum"),
        ("kron", {"deterministic": False}, "must not contain 'deterministic'"),
        ("adan", {"betas": "wide"}, "adan does not accept"),
    ],
)
def test_optimizer_args_that_do_not_fit_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer_args(Config(optimizer=name, optimizer_args=args))


def test_similar_names_are_suggested_from_all_optimizers():
    for wrong, right in (("lionn", "lion"), ("madgrd", "madgrad"), ("sgdd", "sgd"), ("san", "sam")):
        with pytest.raises(ValueError, match=f"Did you mean .*'{right}'"):
            check_optimizer_name(wrong)


def test_the_memory_of_the_state_is_that_of_a_step():
    assert [state_per_weight(Config(optimizer=name)) for name in ("sgd", "adamw", "muon", "adan")] == [
        pytest.approx(expected, abs=0.01) for expected in (1, 2, 1, 4)
    ]


@pytest.mark.parametrize("name", ["adan", "lamb", "kron"])
def test_a_run_that_resumes_within_an_epoch_is_the_uninterrupted_run(name, run_training, tmp_path):
    settings = {"optimizer": name, "lr": 1e-3, "checkpoint_every_steps": 2, "keep_checkpoints": 9, "max_train_samples": 60}
    _, whole = run_training(run_name="whole", **settings)
    part = tmp_path / "part"
    cut_back(whole, part, step=2)
    run_training(run_name="part", **settings)
    assert_identical(part, whole)
