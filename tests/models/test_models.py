"""Models: names, creation, initial weights, saving and loading."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, run_process
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.models import timm_folder
from pipeline.models.create import (
    check_model_name,
    create_model,
    default_image_size,
    input_settings,
    unseen_rows,
)
from pipeline.models.small_stems import SMALL_STEM_SUFFIX, SMALL_STEMS, is_small_stem_possible, with_small_stem
from pipeline.models.timm_folder import load_model, load_weights, save_model


def save(model: nn.Module, folder: Path, image_size: int, in_chans: int = 3) -> None:
    save_model(
        model,
        folder,
        label_names=[f"class {label}" for label in range(model.num_classes)],
        image_size=image_size,
        in_chans=in_chans,
        mean=[0.25] * in_chans,
        std=[0.5] * in_chans,
        interpolation="bilinear",
        crop_pct=1.0,
        readme="# A model\n",
    )


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(images)


def train_one_step(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    nn.functional.cross_entropy(model(images), torch.arange(len(images)) % model.num_classes).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
            parameter.grad = None


def images_of(size: int, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(4, in_chans, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, image_size, in_chans, architecture",
    [
        ("simple_mlp", 8, 1, "simple_mlp"),
        ("simple_mlp", 28, 3, "simple_mlp"),
        ("resnet18", 8, 3, "resnet18_small_stem"),
        ("resnet18", 80, 3, "resnet18"),
        ("resnet50", 16, 1, "resnet50_small_stem"),
        ("resnest14d", 16, 3, "resnest14d_small_stem"),
        ("resnest26d", 16, 1, "resnest26d_small_stem"),
        ("convnext_atto", 32, 1, "convnext_atto_small_stem"),
        ("vit_tiny_patch16_224", 32, 1, "vit_tiny_patch16_224"),
    ],
)
def test_a_model_trains_and_is_restored_bit_for_bit(tmp_path, name, image_size, in_chans, architecture):
    model, report = create_model(name, num_classes=5, in_chans=in_chans, image_size=image_size)
    assert report is None and model.training
    images = images_of(image_size, in_chans)
    before = logits(model, images)
    train_one_step(model, images)
    expected = logits(model, images)
    assert expected.shape == (4, 5) and expected.isfinite().all() and not torch.equal(expected, before)

    save(model, tmp_path / "model", image_size, in_chans)
    assert torch.equal(logits(load_model(tmp_path / "model"), images), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == architecture
    assert config["label_names"] == [f"class {label}" for label in range(5)]
    assert config["num_classes"] == 5 and "num_classes" not in config["model_args"]  # transformers passes it as well
    assert config["model_args"].get("in_chans", 3) == in_chans
    described = config["pretrained_cfg"]
    assert described["input_size"] == [in_chans, image_size, image_size]
    assert (described["mean"], described["std"]) == ([0.25] * in_chans, [0.5] * in_chans)
    assert (described["interpolation"], described["crop_pct"]) == ("bilinear", 1.0)


@pytest.mark.slow
def test_timm_loads_a_saved_folder_after_import_pipeline(tmp_path):
    """Whatever is imported first after torch, in processes that know nothing else of ours."""
    expected = {}
    for name in ("resnet18", "simple_mlp"):
        model, _ = create_model(name, num_classes=3, image_size=16)
        save(model, tmp_path / name, 16)
        expected[name] = logits(model, images_of(16)).tolist()
    ways = ["import pipeline, timm", "import timm, pipeline"]
    ways += [f"import pipeline.models.{name}, timm" for name in ("small_models", "small_stems")]
    program = f"""
import json, os, torch
for imports in {ways}:  # each in a fork
    if os.fork() == 0:
        exec(imports)
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        models = {{name: timm.create_model(f"local-dir:{{name}}", pretrained=True).eval() for name in {list(expected)}}}
        print(json.dumps({{name: model(x).tolist() for name, model in models.items()}}), flush=True)
        os._exit(0)
    os.wait()
"""
    done = run_process("-c", program, cwd=tmp_path, fresh=True, PYTHONPATH=str(ROOT))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 4, done.stderr


def test_import_pipeline_imports_neither_timm_nor_torch():
    program = "import sys, pipeline; sys.exit('timm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT), "PATH": ""}).returncode == 0


def test_small_convnet_is_a_timm_model():
    model = timm.create_model("small_convnet", num_classes=4, in_chans=1, widths=(12, 16, 24), drop_rate=0.5).eval()
    images = torch.randn(3, 1, 28, 28)
    features = model.forward_features(images)
    assert features.shape == (3, 24, 3, 3) and model.forward_features(images[:, :, :8, :8]).shape == (3, 24, 1, 1)
    assert torch.equal(model(images), model.get_classifier()(model.forward_head(features, pre_logits=True)))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))
    model.reset_classifier(0)
    assert model(images).shape == (3, 24)
    assert model.pretrained_cfg["classifier"] == "head"


def test_shortcuts_of_small_convnet_skip_the_last_two_convolutions_of_a_stage():
    plain, model = (timm.create_model("small_convnet", widths=(8, 12, 16), shortcuts=shortcuts) for shortcuts in (False, True))
    convolutions = [sum(isinstance(module, nn.Conv2d) for module in one.stages.modules()) for one in (plain, model)]
    assert convolutions == [6, 9]
    stage, images = model.eval().stages[1], torch.randn(2, 8, 7, 7)
    before, block = stage[:4](images), nn.Sequential(*stage[4])
    assert stage(images).shape == (2, 12, 3, 3) and torch.equal(stage(images), (before + block(before)).relu())
    deep = timm.create_model("small_convnet_deep", num_classes=4)
    assert sum(isinstance(module, nn.Conv2d) for module in deep.stages.modules()) == 9 and deep.num_features == 384


def test_the_initial_weights_of_small_convnet_are_drawn_layer_by_layer():
    torch.manual_seed(0)
    drawn = [nn.Conv2d(*sizes, 3, bias=False).weight for sizes in ((24, 8), (8, 8), (8, 12), (12, 12))]
    torch.manual_seed(0)
    model = timm.create_model("small_convnet", widths=(8, 12))
    layers = [module.weight for module in model.stages.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 4 and all(torch.equal(*pair) for pair in zip(layers, drawn))


def test_the_patch_transform_is_orthonormal_fixed_and_sees_luma_and_opponent_colours():
    model = timm.create_model("small_convnet")
    filters, negatives = model.stem[0].weight.chunk(2)
    assert torch.allclose(filters.flatten(1) @ filters.flatten(1).T, torch.eye(12), atol=1e-6)
    assert torch.equal(negatives, -filters) and not any("stem.0" in name for name, _ in model.named_parameters())
    colours = filters[[0, 4, 8]].sum(dim=(2, 3))  # of the filters that do not vary in space
    expected = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    assert torch.allclose(nn.functional.normalize(colours), nn.functional.normalize(expected), atol=1e-6)


def test_simple_mlp_is_a_timm_model():
    assert timm.list_models("simple*") == ["simple_mlp"]
    model = timm.create_model("simple_mlp", num_classes=4, in_chans=1, img_size=8, hidden_sizes=(16, 12), drop_rate=0.5)
    images = images_of(8, 1)
    features = model.forward_features(images)
    assert features.shape == (4, 12) == (4, model.num_features)
    assert torch.equal(model.eval()(images), model.get_classifier()(features))
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    assert model.head_drop.p == 0.5 and not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model.reset_classifier(7)
    assert model(images).shape == (4, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(images), features)


def test_the_hidden_sizes_are_rebuilt(tmp_path):
    model = timm.create_model("simple_mlp", num_classes=4, img_size=8, hidden_sizes=(16, 12))
    save(model, tmp_path / "model", 8)
    assert torch.equal(logits(load_model(tmp_path / "model"), images_of(8)), logits(model, images_of(8)))


@pytest.mark.parametrize(
    "name, shrinks",
    [
        ("resnet18", 8),
        ("resnet18d", 8),
        ("resnetblur18", 8),
        ("skresnet18", 8),
        ("resnest14d", 8),
        ("resnetv2_18", 8),
        ("convnext_atto", 8),
        ("convnext_atto_ols", 8),
        ("regnetx_002", 16),
        ("efficientnet_b0", 16),
        ("mobilenetv3_small_100", 16),
        ("repvgg_a0", 16),
    ],
)
def test_a_small_stem_keeps_the_resolution(name, shrinks):
    """The ImageNet model reduces the resolution 32 times; here the stages after the stem reduce it 8 or 16 times."""
    with torch.device("meta"):
        usual, small = timm.create_model(name), timm.create_model(with_small_stem(name))
        images = torch.zeros(1, 3, 64, 64)
        assert usual.eval().forward_features(images).shape[-2:] == (2, 2)
        assert small.eval().forward_features(images).shape[-2:] == (64 // shrinks, 64 // shrinks)


def test_a_small_stem_of_resnet_is_one_3x3_convolution_without_pooling():
    model, _ = create_model("resnet18", num_classes=10, image_size=32, stem="small")
    assert isinstance(model.maxpool, nn.Identity)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962  # the usual CIFAR ResNet-18


def test_small_stems_of_pretrained_weights_are_the_centres_of_the_filters(tmp_path):
    usual = timm.create_model("resnet18")
    save_file(usual.state_dict(), tmp_path / "resnet18.safetensors")
    small = timm.create_model(
        "resnet18_small_stem", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "resnet18.safetensors")}
    )
    old, new = usual.conv1.weight, small.conv1.weight
    torch.testing.assert_close(new / new.norm(), old[:, :, 2:5, 2:5] / old[:, :, 2:5, 2:5].norm())
    torch.testing.assert_close(new.norm(), old.norm())
    expected = usual.state_dict()
    others = [name for name in expected if name != "conv1.weight"]
    assert len(others) == 121 and all(torch.equal(small.state_dict()[name], expected[name]) for name in others)


@pytest.mark.parametrize(
    "name, image_size, stem, small",
    [
        ("resnet18", 64, "auto", True),
        ("resnet18", 65, "auto", False),
        ("resnet18", 32, "imagenet", False),
        ("resnet18", 96, "small", True),
        ("resnet18_small_stem", 96, "auto", True),
        ("simple_mlp", 32, "auto", False),
        ("mobilevit_xxs", 32, "auto", False),
    ],
)
def test_stem_auto_is_small_for_small_images(name, image_size, stem, small):
    model, _ = create_model(name, num_classes=2, image_size=image_size, stem=stem)
    assert model.pretrained_cfg["architecture"].endswith(SMALL_STEM_SUFFIX) == small


def test_every_small_stem_is_registered():
    assert len(SMALL_STEMS) > 400 and all(timm.is_model(name + SMALL_STEM_SUFFIX) for name in SMALL_STEMS)
    assert is_small_stem_possible("resnet18.a1_in1k") and not is_small_stem_possible("vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> tuple[nn.Module, Path]:
    model, _ = create_model("resnet18", num_classes=5, image_size=16)
    train_one_step(model, images_of(16))
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    save(model, run / "model", 16)
    return model, run


@pytest.fixture
def saved(saved_once, tmp_path) -> tuple[nn.Module, Path]:
    """A small model of 5 classes and its run folder: copies, which a test may change."""
    model, run = saved_once
    shutil.copytree(run, tmp_path / "run")
    return copy.deepcopy(model), tmp_path / "run"


@pytest.mark.parametrize("where", [".", "model", "model/model.safetensors"])
def test_init_from_continues_a_run_a_folder_or_a_file(saved, where):
    model, run = saved
    continued, report = create_model("resnet18", num_classes=5, image_size=16, init_from=run / where)
    assert torch.equal(logits(continued, images_of(16)), logits(model, images_of(16)))
    assert set(report.loaded) == set(model.state_dict()) and report.reinitialised == report.unused == ()
    assert "122 of 122 tensors" in str(report) and str(run) in str(report)


def test_init_from_replaces_the_classifier_for_other_classes(saved):
    model, run = saved
    continued, report = create_model("resnet18", num_classes=7, image_size=16, init_from=run)
    assert set(report.reinitialised) == {"fc.weight", "fc.bias"} and "reinitialised: fc.weight, fc.bias" in str(report)
    assert logits(continued, images_of(16)).shape == (4, 7)
    images = images_of(16)
    assert torch.equal(continued.eval().forward_features(images), model.eval().forward_features(images))


def test_init_from_takes_the_stem_of_the_folder_at_any_size(saved):
    continued, _ = create_model("resnet18", num_classes=5, image_size=96, init_from=saved[1])
    assert continued.pretrained_cfg["architecture"] == "resnet18_small_stem"


def test_init_from_adapts_the_first_convolution_to_other_channels(saved):
    """A grey image keeps its response, whichever way."""
    model, run = saved
    grey = images_of(16).mean(dim=1, keepdim=True)
    narrow, report = create_model("resnet18", num_classes=5, in_chans=1, image_size=16, init_from=run)
    assert report.adapted == ("conv1.weight",) and report.reinitialised == () and "122 of 122 tensors" in str(report)
    assert torch.allclose(logits(narrow, grey), logits(model, grey.repeat(1, 3, 1, 1)), atol=1e-5)
    save(narrow, run / "narrow", 16, in_chans=1)
    wide, _ = create_model("resnet18", num_classes=5, image_size=16, init_from=run / "narrow")
    assert torch.allclose(logits(wide, grey.repeat(1, 3, 1, 1)), logits(narrow, grey), atol=1e-5)


def test_init_from_refuses_weights_that_do_not_fit(saved, tmp_path):
    run = saved[1]
    with pytest.raises(ValueError, match=r"conv1.weight \(64, 3, 3, 3\), the model has \(64, 3, 7, 7\)"):
        create_model("resnet18", num_classes=5, image_size=16, stem="imagenet", init_from=run)
    with pytest.raises(ValueError, match="shares no tensor .* Set model_name to resnet18_small_stem.$"):
        create_model("simple_mlp", num_classes=5, image_size=16, init_from=run)
    with pytest.raises(ValueError, match="both set the weights"):
        create_model("resnet18", num_classes=5, image_size=16, init_from=run, pretrained=True)
    (tmp_path / "weights.pth").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="pickled weights"):
        create_model("resnet18", num_classes=5, image_size=16, init_from=tmp_path / "weights.pth")


def test_unused_tensors_are_reported(saved, tmp_path):
    tensors = load_file(saved[1] / "model" / "model.safetensors")
    missing = tensors.pop("bn1.bias")
    save_file({**tensors, "teacher.weight": missing}, tmp_path / "more.safetensors")
    report = load_weights(saved[0], tmp_path / "more.safetensors")
    assert (report.unused, report.reinitialised) == (("teacher.weight",), ("bn1.bias",))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_damaged_weights_file_is_reported_with_its_path(saved, content):
    file = saved[1] / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10] if content is None else content)
    for broken in (
        lambda: load_model(file.parent),
        lambda: check_model_name(f"local-dir:{file.parent}"),
        lambda: create_model("resnet18", num_classes=5, image_size=16, init_from=saved[1]),
    ):
        with pytest.raises(ValueError, match=f"{file} is not an intact safetensors file"):
            broken()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"architecture": "resnet118"}'])
def test_a_damaged_config_is_reported_with_its_path(saved, text):
    file = saved[1] / "model" / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=str(file)):
        load_model(file.parent)


def test_load_model_reports_weights_of_another_model(saved):
    folder = saved[1] / "model"
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load_model(folder)


def test_a_saved_folder_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    model, run = saved
    images = images_of(16)
    before = logits(model, images)
    train_one_step(model, images)

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk is full"):
            save(model, run / "model", 16)
    assert torch.equal(logits(load_model(run / "model"), images), before)
    assert [path.name for path in run.iterdir()] == ["model"]

    (run / f".model.{os.getpid()}@{os.uname().nodename}.tmp").mkdir()  # as a killed process leaves it
    save(model, run / "model", 16)
    assert torch.equal(logits(load_model(run / "model"), images), logits(model, images))
    assert not torch.equal(logits(model, images), before)
    assert [path.name for path in run.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_loses_nothing(saved, monkeypatch):
    model, run = saved
    (run / "model").rename(run / ".model.1@another.machine.old")
    monkeypatch.setattr(timm_folder, "save_for_hf", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, run / "model", 16)
    assert torch.equal(logits(load_model(run / "model"), images_of(16)), logits(model, images_of(16)))


def test_label_names_must_be_as_many_as_the_classes(saved):
    model, run = saved
    model.reset_classifier(4)
    with pytest.raises(ValueError, match="5 label names for a model of 4 classes"):
        timm_folder.save_model(
            model,
            run / "model",
            label_names=list("abcde"),
            image_size=16,
            in_chans=3,
            mean=[0.5] * 3,
            std=[0.5] * 3,
            interpolation="bilinear",
            crop_pct=1.0,
            readme="",
        )


def test_channels_last_models_are_saved_and_stay_channels_last(tmp_path):
    model, _ = create_model("resnet18", num_classes=5, image_size=16)
    model = model.to(memory_format=torch.channels_last)
    save(model, tmp_path / "model", 16)
    assert not model.layer1[0].conv1.weight.is_contiguous()
    restored = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet118", r"Unknown model 'resnet118'. Did you mean 'resnet18'"),
        ("simple_mpl", "Did you mean 'simple_mlp'"),
        ("resnet18.a1_in2k", "Unknown tag 'a1_in2k' of model 'resnet18'. Did you mean 'a1_in1k'.*Known tags: a1"),
        ("simple_mlp.a1", "Known tags: none"),
        ("tv_resnet50", "is now named 'resnet50.tv_in1k'"),
        ("timm/resnet18", "hf-hub:timm/resnet18"),
        ("hub:timm/resnet18", "Unknown model source 'hub'"),
        ("local-dir:nowhere", "config.json and model.safetensors missing"),
    ],
)
def test_unknown_names_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        check_model_name(name)


def test_known_names_are_accepted(saved):
    for name in ("resnet18", "resnet18.a1_in1k", "resnet18_small_stem", "resnet18_small_stem.a1_in1k", "simple_mlp"):
        check_model_name(name)
    check_model_name("hf-hub:owner/name")
    check_model_name(f"local-dir:{saved[1] / 'model'}")


def test_a_saved_folder_is_a_pretrained_model(saved):
    model, run = saved
    name = f"local-dir:{run / 'model'}"
    again, report = create_model(name, num_classes=5, image_size=16, pretrained=True)
    assert torch.equal(logits(again, images_of(16)), logits(model, images_of(16))) and report.reinitialised == ()
    gray, report = create_model(name, num_classes=9, in_chans=1, image_size=16, pretrained=True)
    assert logits(gray, images_of(16, 1)).shape == (4, 9)
    assert (report.adapted, set(report.reinitialised)) == (("conv1.weight",), {"fc.weight", "fc.bias"})
    torch.testing.assert_close(gray.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    assert default_image_size(name, pretrained=True) == 16


def test_pretrained_positions_are_resampled_and_reported(tmp_path):
    model, _ = create_model("vit_tiny_patch16_224", num_classes=5, image_size=32)
    save(model, tmp_path / "vit", 32)
    larger, report = create_model(f"local-dir:{tmp_path / 'vit'}", num_classes=5, image_size=64, pretrained=True)
    assert logits(larger, images_of(64)).shape == (4, 5) and report.adapted == ("pos_embed",)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("simple_mlp", {"drop_path_rate": 0.1}, "'simple_mlp' does not support drop_path_rate"),
        ("simple_mlp", {"pretrained": True}, "no pretrained weights for 'simple_mlp'"),
        ("simple_mlp", {"stem": "small"}, "stem 'small' does not apply to 'simple_mlp'"),
        ("vit_tiny_patch16_224", {"stem": "small"}, "stem 'small' does not apply"),
        ("resnet18_small_stem", {"stem": "imagenet"}, "for stem 'imagenet', use 'resnet18'"),
        ("resnet18", {"stem": "smal"}, "Unknown stem 'smal'. Did you mean 'small'"),
        ("vit_tiny_patch16_224", {"image_size": 8}, "cannot take 3x8x8 images"),
        ("resnet118", {}, "Unknown model"),
    ],
)
def test_settings_that_a_model_does_not_support_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 5, "image_size": 32, **arguments})


def test_an_unreachable_hub_is_explained(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("resnet18.a1_in1k", "hf-hub:nobody/nothing"):
        with pytest.raises(ValueError, match=f"Could not fetch '{name}' from the Hugging Face Hub"):
            create_model(name, num_classes=5, image_size=32, pretrained=True)


def test_drop_rates_reach_the_model():
    model, _ = create_model("resnet18", num_classes=5, image_size=16, drop_rate=0.3, drop_path_rate=0.2)
    assert model.drop_rate == 0.3
    assert max(module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)) == 0.2


def test_input_settings_and_sizes_are_those_of_the_weights():
    model, _ = create_model("resnet18", num_classes=5, in_chans=1, image_size=32)
    settings = input_settings(model)
    assert settings.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,)) and settings.std == pytest.approx((0.226,))
    assert (settings.interpolation, settings.crop_pct, settings.input_size) == ("bicubic", 0.95, (1, 224, 224))
    vit, _ = create_model("vit_tiny_patch16_224", num_classes=5, image_size=32)
    assert input_settings(vit).input_size == (3, 32, 32) and input_settings(vit).mean == (0.5, 0.5, 0.5)
    assert default_image_size("tf_efficientnet_b3", pretrained=True) == 300
    assert default_image_size("simple_mlp", pretrained=False) == 32
    with pytest.raises(ValueError, match="no pretrained weights"):
        default_image_size("simple_mlp", pretrained=True)


@pytest.mark.parametrize(
    "name, image_size, expected",
    [
        ("vit_tiny_patch16_224", 90, (10, 16)),
        ("vit_tiny_patch16_224", 96, (0, 1)),
        ("convnext_atto", 90, (2, 32)),
        ("convnext_atto", 96, (0, 1)),
    ],
)
def test_rows_that_patches_do_not_cover(name, image_size, expected):
    model, _ = create_model(name, num_classes=3, image_size=image_size)
    assert unseen_rows(model, 3, image_size) == expected and model.training
    seen = image_size - max(expected[0], 1)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images[1, :, :seen, :seen] = images[0, :, :seen, :seen]
    model.eval()
    with torch.no_grad():
        first, second = model.forward_features(images)
    assert torch.equal(first, second) == bool(expected[0])


def test_overlapping_convolutions_cover_every_size():
    model, _ = create_model("resnet18", num_classes=3, image_size=90)
    assert unseen_rows(model, 3, 90) == (0, 1)


def test_a_size_that_a_model_is_not_built_for_is_refused():
    with pytest.raises(ValueError, match="xcit_nano_12_p16_224.*patch_size. should divide.*Try another image_size"):
        create_model("xcit_nano_12_p16_224", num_classes=3, image_size=90)
