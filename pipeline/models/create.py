"""Creates models by name: any timm model, optionally with a stem for small images, or a small model of this project."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_model_input_config,
    parse_model_name,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import nn

from pipeline.common.suggestions import check_known, did_you_mean
from pipeline.models.small_stems import (
    SMALL_IMAGE_SIZE,
    SMALL_STEM_SUFFIX,
    is_small_stem,
    is_small_stem_possible,
    with_small_stem,
)
from pipeline.models.timm_folder import (
    CONFIG_FILE,
    LoadReport,
    check_model_folder,
    classifier_names,
    load_weights,
    read_config,
    weights_file,
)

STEM_CHOICES = ("auto", "imagenet", "small")


@dataclass(frozen=True)
class InputSettings:
    """The input that a model expects: mean and std per channel in units of 0..1, and input_size (C, H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    input_size: tuple[int, int, int]


def check_model_name(name: str) -> None:
    """Raises ValueError for a name that create_model cannot build. Uses no network.

    Valid names are those of timm, with or without a tag (`resnet18.a1_in1k`), of small_models, `hf-hub:owner/name` and
    `local-dir:PATH`.
    """
    source, location = parse_model_name(name)  # raises ValueError for unknown sources and bare paths
    if source == "local-dir":
        check_model_folder(location)
    if source:
        return
    architecture, tag = split_model_name_tag(name)
    if architecture in get_deprecated_models():
        current = get_deprecated_models()[architecture]
        raise ValueError(
            f"Model {name!r} is {f'now named {current!r} in timm; use that' if current else 'no longer in timm'}."
        )
    if not timm.is_model(architecture):
        known = [model for model in timm.list_models() if not is_small_stem(model)]
        raise ValueError(
            f"Unknown model {name!r}.{did_you_mean(architecture, known)} "
            f"timm.list_models() returns all {len(known)}; hf-hub:OWNER/NAME and local-dir:PATH are also supported."
        )
    base = architecture.removesuffix(SMALL_STEM_SUFFIX)
    tags = [split_model_name_tag(model)[1] for model in get_arch_pretrained_cfgs(base)]
    if tag and tag not in tags:
        known_tags = ", ".join(filter(None, tags)) or "none"
        raise ValueError(f"Unknown tag {tag!r} of model {base!r}.{did_you_mean(tag, tags)} Known tags: {known_tags}.")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Converts exceptions of timm and the Hub while they download or build a model to a ValueError that states what to do."""
    try:
        yield
    except OSError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Could not fetch {name!r} from the Hugging Face Hub ({type(error).__name__}: {cause}). Check the name and "
            "the network. Without a network: copy the cache from another machine, set pretrained to false, or set "
            "init_from to a local file."
        ) from error
    except AssertionError as error:
        raise ValueError(f"Model {name!r} cannot be built so: {error}. Try another image_size.") from error


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """The pretrained_cfg of the model in timm; for a small stem, that of its base model."""
    with _explained(name):
        return resolve_model_input_args(_base_name(name))["pretrained_cfg"]


def _base_name(name: str) -> str:
    """The name without the suffix of a small stem. Names with a source are unchanged."""
    return name if ":" in name else name.replace(SMALL_STEM_SUFFIX, "", 1)


def _check_has_weights(name: str, pretrained_cfg: dict[str, Any]) -> None:
    if ":" not in name and not any(pretrained_cfg.get(key) for key in ("url", "file", "hf_hub_id")):
        with_weights = timm.list_models(pretrained=True)
        raise ValueError(
            f"timm has no pretrained weights for {name!r}.{did_you_mean(name, with_weights)} "
            "timm.list_models(pretrained=True) returns all models with weights; or set pretrained to false."
        )


def default_image_size(name: str, pretrained: bool) -> int:
    """The image size in pixels for which the model, or its pretrained weights, was designed. Does not build the model.

    Raises ValueError for an unknown model, or with `pretrained` for a model without weights.
    """
    check_model_name(name)
    pretrained_cfg = _pretrained_cfg(name)
    if pretrained:
        _check_has_weights(name, pretrained_cfg)
    return int(pretrained_cfg["input_size"][-1])


def _with_stem(name: str, stem: str, image_size: int, pretrained: bool, init_from: str | Path | None) -> str:
    """The name of the model to build: `name`, or its registered variant with a small stem."""
    check_known("stem", stem, STEM_CHOICES)
    if ":" in name:
        if stem != "auto":
            raise ValueError(
                f"stem {stem!r} does not apply to {name!r}: a saved model keeps its stem. Use stem 'auto'."
            )
        return name
    if is_small_stem(name):
        if stem == "imagenet":
            raise ValueError(f"Model {name!r} has a small stem; for stem 'imagenet', use {_base_name(name)!r}.")
        return name
    if stem == "auto" and is_small_stem_possible(name):
        saved = weights_file(init_from).with_name(CONFIG_FILE) if init_from else None
        if saved and saved.exists():  # weights keep the stem they were trained with
            return with_small_stem(name) if is_small_stem(read_config(saved)["architecture"]) else name
        stem = "small" if image_size <= SMALL_IMAGE_SIZE and not pretrained else "imagenet"
    return with_small_stem(name) if stem == "small" else name


def create_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: int,
    pretrained: bool = False,
    stem: str = "auto",
    init_from: str | Path | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> tuple[nn.Module, LoadReport | None]:
    """The model in training mode on the CPU, and the report of its loaded weights (None: random initialisation).

    stem: auto selects a small stem if the model supports it, the images have at most 64 pixels and pretrained is false; with
    `init_from`, it selects the stem of the saved model. Raises ValueError for an argument that the model does not support.
    """
    check_model_name(name)
    if pretrained and init_from:
        raise ValueError(f"pretrained and init_from {str(init_from)!r} both set the weights; use only one of them.")
    pretrained_cfg = _pretrained_cfg(name)
    if pretrained:
        _check_has_weights(name, pretrained_cfg)
    name = _with_stem(name, stem, image_size, pretrained, init_from)
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if pretrained_cfg.get("fixed_input_size"):
        arguments["img_size"] = image_size
    # only non-zero rates: not every model accepts both
    arguments |= {key: rate for key, rate in dict(drop_rate=drop_rate, drop_path_rate=drop_path_rate).items() if rate}
    with _explained(name):
        model = _build(name, pretrained, arguments)
    _check_takes_images(model, name, num_classes, in_chans, image_size)
    if init_from:
        return model, load_weights(model, init_from)
    return model, _pretrained_report(model, name) if pretrained else None


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """The timm model. Raises ValueError that names the argument which it does not take.

    A TypeError does not say reliably which argument caused it, so the optional ones are left out in turn, without weights.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        for refused in [argument for argument in arguments if argument not in ("num_classes", "in_chans")]:
            others = {argument: value for argument, value in arguments.items() if argument != refused}
            try:
                with torch.device("meta"):
                    timm.create_model(name, **others)
            except TypeError:
                continue
            raise ValueError(f"Model {name!r} does not support {refused}. Remove it, or use another model.") from error
        raise ValueError(
            f"Model {name!r} does not support {', '.join(arguments)} ({error}). Use another model."
        ) from error


def _check_takes_images(model: nn.Module, name: str, num_classes: int, in_chans: int, image_size: int) -> None:
    """Raises ValueError unless the model maps one black image of this size to logits [1, num_classes]."""
    size = f"{in_chans}x{image_size}x{image_size}"
    model.eval()
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, in_chans, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"Model {name!r} cannot take {size} images ({error}). Try another image_size.") from error
    if shape != (1, num_classes):
        raise ValueError(
            f"Model {name!r} returns shape {shape} for a {size} image, not logits of {num_classes} classes. Use another model."
        )
    model.train()


def _pretrained_report(model: nn.Module, name: str) -> LoadReport:
    """How timm loaded the pretrained weights, inferred from the shapes of the model they were made for."""
    with torch.device("meta"):
        source = timm.create_model(_base_name(name)).state_dict()
    target, classifier = model.state_dict(), classifier_names(model)
    changed = [key for key in target if key not in source or source[key].shape != target[key].shape]
    return LoadReport(
        source=f"the pretrained weights of {_base_name(name)}",
        loaded=tuple(key for key in target if key not in changed),
        adapted=tuple(key for key in changed if key not in classifier),
        reinitialised=tuple(key for key in changed if key in classifier),
    )


def load_published(name: str) -> nn.Module:
    """The published model of a timm name or of `hf-hub:owner/name`, in training mode on the CPU.

    Raises ValueError for an unknown name, a model without weights, and a failed download or build.
    """
    check_model_name(name)
    try:
        _check_has_weights(name, resolve_model_input_args(name)["pretrained_cfg"])
        return timm.create_model(name, pretrained=True)
    except OSError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Could not fetch {name!r} from the Hugging Face Hub ({type(error).__name__}: {cause}). "
            "Check the name and the network; a private model needs HF_TOKEN."
        ) from error
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{name!r} is not a model that timm {timm.__version__} can load: {error}.") from error


def input_settings(model: nn.Module) -> InputSettings:
    """The input that a timm model expects. Mean and std are averaged if the model does not have three channels."""
    pretrained_cfg, input_size = vars(model)["pretrained_cfg"], get_model_input_config(model)["input_size"]
    mean, std = (
        values if len(values) == input_size[0] else (sum(values) / len(values),) * input_size[0]
        for values in (tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"]))
    )
    return InputSettings(mean, std, pretrained_cfg["interpolation"], pretrained_cfg["crop_pct"], input_size)


def unseen_rows(model: nn.Module, in_chans: int, image_size: int) -> tuple[int, int]:
    """How many of the last rows of an image the model does not see, because its patches do not cover them; and the patch size.

    The patch size, in pixels, is the stride of the last features: every multiple of it is covered. A row is unseen if the
    gradient of the features with respect to it is zero.
    """
    sides: list[tuple[nn.Conv2d, int]] = []

    def remember(module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        sides.append((module, inputs[0].shape[-1]))

    patching = [module for module in model.modules() if isinstance(module, nn.Conv2d) and is_patching(module)]
    if not patching:
        return 0, 1
    hooks = [module.register_forward_pre_hook(remember) for module in patching]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, in_chans, image_size, image_size, generator=generator).requires_grad_()
    was_training = model.training
    model.eval()
    features = getattr(model, "forward_features", model)(images)
    for hook in hooks:
        hook.remove()
    model.train(was_training)
    uncovered = [module.stride[0] for module, side in sides if side % module.stride[0]]
    if not isinstance(features, torch.Tensor) or not uncovered:
        return 0, 1
    projected = (features * torch.randn(features.shape, generator=generator)).sum()
    (gradient,) = torch.autograd.grad(projected, images)
    seen = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    stages = getattr(model, "feature_info", None) or [{"reduction": max(uncovered)}]
    return image_size - 1 - int(seen[-1]), int(stages[-1]["reduction"])


def is_patching(module: nn.Conv2d) -> bool:
    """Whether a convolution cuts its input into patches that do not overlap, without padding."""
    return module.kernel_size == module.stride and module.stride[0] > 1 and module.padding in ((0, 0), "valid")
