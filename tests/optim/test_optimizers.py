"""Optimizers: every parameter in exactly one group, and the combinations that people run."""

import itertools
import re

import pytest
import timm
import torch

from pipeline.optim.optimizer_state import load_state_tensors, state_tensors
from pipeline.optim.optimizers import (
    DEPTHWISE,
    EMBEDDING,
    HEAD,
    MATRIX,
    OPTIMIZERS,
    STEM,
    VECTOR,
    check_optimizer_name,
    create_optimizer,
    ignored_optimizer_settings,
    layer_scales,
    parameter_groups,
    parameter_roles,
    peak_lr,
    set_lr,
)
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.optim.schedule import SCHEDULES, lr_scale
from pipeline.settings.config import Config

MODELS = ["resnet18", "resnet50_small_stem", "resnest14d", "simple_mlp", "vit_tiny_patch16_224", "convnext_atto"]


@pytest.fixture(scope="module")
def models():
    return {
        name: timm.create_model(name, num_classes=10)
        for name in [*MODELS, "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_trainable_parameter_is_in_exactly_one_group(models, name, optimizer):
    model = models[name]
    groups = parameter_groups(model, Config(optimizer=optimizer))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters()) and grouped
    for group in groups:
        if group["name"].endswith(VECTOR):
            assert group["weight_decay"] == 0 and all(
                parameter.ndim <= 1 or parameter.numel() < 1000 for parameter in group["params"]
            )


def test_roles_follow_what_muons_author_keeps_off_it(models):
    roles = parameter_roles(models["resnet18"])
    assert roles["conv1.weight"] == STEM and roles["fc.weight"] == HEAD
    assert roles["layer1.0.conv1.weight"] == roles["layer2.0.downsample.0.weight"] == MATRIX
    assert roles["bn1.weight"] == roles["fc.bias"] == VECTOR
    vit = parameter_roles(models["vit_tiny_patch16_224"])
    assert vit["pos_embed"] == vit["cls_token"] == EMBEDDING and vit["patch_embed.proj.weight"] == STEM
    assert vit["blocks.0.attn.qkv.weight"] == MATRIX
    distilled = parameter_roles(models["deit_tiny_distilled_patch16_224"])
    assert distilled["head.weight"] == distilled["head_dist.weight"] == HEAD
    assert DEPTHWISE in parameter_roles(models["mobilenetv3_small_050"]).values()
    assert parameter_roles(models["convnext_atto"])["stages.0.blocks.0.conv_dw.weight"] == DEPTHWISE


def test_muon_gets_the_matrices_only_and_adamw_its_own_rate_and_decay(models):
    config = Config(optimizer="muon", adamw_lr_scale=0.5, adamw_weight_decay=0.01)
    groups = {group["name"]: group for group in parameter_groups(models["resnet18"], config)}
    assert [name for name, group in groups.items() if group["use_muon"]] == ["muon: matrices"]
    assert all(parameter.ndim == 4 for parameter in groups["muon: matrices"]["params"])
    assert groups["adamw: head"]["lr_scale"] == 0.5 and groups["adamw: head"]["weight_decay"] == 0.01
    assert groups["muon: matrices"]["lr_scale"] == 1 and groups["muon: matrices"]["weight_decay"] == 0.1


def test_the_learning_rate_fits_the_batch_size_and_given_weights_when_none_is_set():
    assert peak_lr(Config()) == 0.1 and peak_lr(Config(lr=0.3, batch_size=32)) == 0.3
    assert peak_lr(Config(batch_size=32)) == pytest.approx(0.05)
    assert peak_lr(Config(batch_size=32, pretrained=True)) == pytest.approx(0.0005)
    assert peak_lr(Config(init_from="runs/x", optimizer="adamw")) == pytest.approx(1e-4)
    assert peak_lr(Config(init_from="runs/x", optimizer="lion")) == pytest.approx(peak_lr(Config(optimizer="lion")) / 10)


def test_layer_decay_falls_from_the_head_to_the_stem(models):
    scales = layer_scales(models["vit_tiny_patch16_224"], 0.5)
    assert scales["head.weight"] == 1.0 and scales["blocks.11.attn.qkv.weight"] == 0.5
    assert scales["patch_embed.proj.weight"] == 0.5**13
    with pytest.raises(ValueError, match="group_matcher"):
        layer_scales(models["simple_mlp"], 0.5)
    optimizer = create_optimizer(models["vit_tiny_patch16_224"], Config(optimizer="adamw", layer_decay=0.5), "no")
    set_lr(optimizer, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5**layer for layer in range(14)}


def quadratic() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("simple_mlp", num_classes=3, in_chans=1, img_size=3, hidden_sizes=(8, 8))
    return model


def descend(model, optimizer, config, steps, first=0):
    """Steps down |f(x) - y|^2 over fixed images; returns the loss of each."""
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(16, 1, 3, 3, generator=generator), torch.randn(16, 3, generator=generator)
    losses = []
    for step in range(first, first + steps):
        set_lr(optimizer, 0.02 * lr_scale((step + 0.5) / 8, [{"val": {"accuracy": 0.5}}] * (step // 8), config))
        loss = (model(images) - targets).square().mean()
        loss.backward()
        if config.sam_rho:
            with perturbed(model, config.sam_rho, config.sam_adaptive, sharpness_norm(model, config.sam_adaptive)):
                (model(images) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer, scheduler, rho", list(itertools.product(OPTIMIZERS, SCHEDULES, [0.0, 0.05])))
def test_every_combination_descends_and_a_saved_copy_continues_bitwise(optimizer, scheduler, rho):
    config = Config(optimizer=optimizer, scheduler=scheduler, sam_rho=rho, epochs=5, weight_decay=0.0)
    model = quadratic()
    used = create_optimizer(model, config, "no")
    losses = descend(model, used, config, 20)
    assert losses[-1] < 0.9 * losses[0]
    copy = quadratic()
    copy.load_state_dict(model.state_dict())
    other = create_optimizer(copy, config, "no")
    load_state_tensors(other, copy, {name: value.clone() for name, value in state_tensors(used, model).items()})
    assert descend(model, used, config, 10, first=20) == descend(copy, other, config, 10, first=20)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), copy.parameters()))


def test_a_state_of_another_model_is_refused():
    model = quadratic()
    optimizer = create_optimizer(model, Config(), "no")
    with pytest.raises(ValueError, match="elsewhere/momentum_buffer"):
        load_state_tensors(optimizer, model, {"elsewhere/momentum_buffer": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        load_state_tensors(optimizer, model, {"head.weight/momentum_buffer": torch.zeros(3)})


def test_unknown_names_and_ignored_settings_are_reported():
    with pytest.raises(ValueError, match="Did you mean .*'adamw'"):
        check_optimizer_name("adamv")
    assert ignored_optimizer_settings(Config(optimizer="adamw", momentum=0.5)) == [
        "momentum 0.5 has no effect with optimizer adamw."
    ]
    assert ignored_optimizer_settings(Config(sam_every=2)) == ["sam_every 2 has no effect without sam_rho."]
    assert ignored_optimizer_settings(Config(optimizer="sam", sam_every=2, momentum=0.5)) == []


def test_help_names_every_optimizer_and_schedule():
    from pipeline.settings.config import FIELDS

    for setting, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES)):
        names = re.findall(r"`(\w+)`(?:,| or|\.)", FIELDS[setting].metadata["help"].partition(", which")[0] + ",")
        assert sorted(names) == sorted(known)
