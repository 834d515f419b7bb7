"""Small-image stems: timm convnets that keep the full resolution until their first stage.

An ImageNet stem reduces the resolution fourfold before the first block, which is too much for a 32x32 image. A small stem uses
stride 1, filters of at most 3x3 and no pooling (as in He et al., section 4.2, https://arxiv.org/abs/1512.03385). Each such
model is registered with timm as `<name>_small_stem`, so that timm can load a saved folder after `import pipeline`.
"""

import fnmatch
import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BlurPool2d
from timm.models import (
    get_arch_name,
    get_model_input_config,
    list_models,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from torch import nn

SMALL_STEM_SUFFIX = "_small_stem"
SMALL_IMAGE_SIZE = 64

# timm module, pattern of model names in it, submodules of their stem
_STEMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("resnet", "*", ("conv1", "maxpool")),
    ("resnest", "*", ("conv1", "maxpool")),
    ("res2net", "*", ("conv1", "maxpool")),
    ("sknet", "*", ("conv1", "maxpool")),
    ("senet", "*", ("layer0", "pool0")),
    ("resnetv2", "*", ("stem",)),
    ("densenet", "*", ("features.conv0", "features.pool0")),
    ("dpn", "*", ("features.conv1_1", "features.conv1_pool")),
    ("hrnet", "*", ("conv1", "conv2")),
    ("efficientnet", "*", ("conv_stem",)),
    ("mobilenetv3", "*", ("conv_stem",)),
    ("hardcorenas", "*", ("conv_stem",)),
    ("ghostnet", "*", ("conv_stem",)),
    ("repghost", "*", ("conv_stem",)),
    ("regnet", "*", ("stem",)),
    ("byobnet", "*", ("stem",)),
    ("rexnet", "*", ("stem",)),
    ("vovnet", "*", ("stem",)),
    ("selecsls", "*", ("stem",)),
    ("cspnet", "cspres*", ("stem",)),
    ("cspnet", "cs3*", ("stem",)),
    ("cspnext", "*", ("stem",)),
    ("hgnet", "hgnet_*", ("stem",)),
    ("lcnetv2", "*", ("stem",)),
    ("nfnet", "*nfnet_*", ("stem",)),
    ("nfnet", "nf_regnet*", ("stem",)),
    ("xception_aligned", "*", ("stem",)),
    ("convnext", "*", ("stem",)),
    ("inception_next", "*", ("stem",)),
    ("rdnet", "*", ("stem",)),
    ("starnet", "*", ("stem",)),
    ("mambaout", "*", ("stem",)),
    ("fasternet", "*", ("patch_embed",)),
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, BlurPool2d, nn.ConstantPad2d)  # resnetv2 pads in a separate layer


def _find_stems() -> dict[str, tuple[str, ...]]:
    """The submodules of the stem, for every timm architecture that supports a small stem."""
    return {
        name: submodules
        for module, pattern, submodules in _STEMS
        for name in fnmatch.filter(list_models(module=module), pattern)
    }


def is_small_stem(name: str) -> bool:
    """Whether the name, with or without a tag, is that of a model with a small stem, such as `resnet18_small_stem`."""
    return get_arch_name(name).endswith(SMALL_STEM_SUFFIX)


def is_small_stem_possible(name: str) -> bool:
    """Whether the timm model, with or without a tag, supports a small stem or has one."""
    return get_arch_name(name).removesuffix(SMALL_STEM_SUFFIX) in SMALL_STEMS


def with_small_stem(name: str) -> str:
    """The registered name of the model with a small stem: resnet18.a1_in1k gives resnet18_small_stem.a1_in1k.

    Raises ValueError if the model does not support one.
    """
    architecture, dot, tag = name.partition(".")
    if not is_small_stem_possible(name):
        families = ", ".join(sorted({module for module, _, _ in _STEMS}))
        raise ValueError(
            f"stem 'small' does not apply to {name!r}: it has no stem of strided convolutions that is known to work at "
            f"stride 1. Use stem 'auto' or 'imagenet', or a model of timm's families {families}."
        )
    return architecture.removesuffix(SMALL_STEM_SUFFIX) + SMALL_STEM_SUFFIX + dot + tag


def _keep_resolution(conv: nn.Conv2d) -> None:
    """Sets the convolution to stride 1 and at most 3x3, in place.

    A larger filter is replaced by its 3x3 centre, scaled to the norm of the original. For white noise, the output then keeps the
    scale that later layers expect, and a Kaiming fan-out initialisation of the large filter becomes that of the small one.
    """
    conv.stride = (1, 1)
    size = conv.kernel_size[0]
    if size <= 3:
        return
    with torch.no_grad():
        centre = conv.weight.narrow(2, (size - 3) // 2, 3).narrow(3, (size - 3) // 2, 3).clone()
        centre *= conv.weight.norm() / centre.norm()
    conv.weight = nn.Parameter(centre)
    conv.kernel_size, conv.padding = (3, 3), (1, 1)


def _shrink_stem(model: nn.Module, submodules: tuple[str, ...]) -> None:
    """Replaces the stem of the model by a small one, in place."""
    for submodule in submodules:
        for name, module in list(model.get_submodule(submodule).named_modules(prefix=submodule)):
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
                _keep_resolution(module)
            elif isinstance(module, _POOLS):
                model.set_submodule(name, nn.Identity())


def _build(base: str, pretrained: bool, pretrained_cfg: Any, **kwargs: Any) -> nn.Module:
    """The timm model with a small stem.

    Pretrained ImageNet weights are loaded before the stem is replaced. Weights of a folder that was saved with the small stem
    (`pretrained_cfg` is a dict) are loaded after.
    """
    if kwargs.get("features_only"):
        raise ValueError(f"{base}{SMALL_STEM_SUFFIX} does not support features_only.")
    is_saved = isinstance(pretrained_cfg, dict)
    model = model_entrypoint(base)(pretrained=pretrained and not is_saved, pretrained_cfg=pretrained_cfg, **kwargs)
    _shrink_stem(model, SMALL_STEMS[base])
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": base + SMALL_STEM_SUFFIX}
    model.default_cfg = model.pretrained_cfg
    if pretrained and is_saved:
        load_pretrained(model, num_classes=model.num_classes, in_chans=get_model_input_config(model)["input_size"][0])
    return model


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build `<base>_small_stem`."""

    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        return _build(base, pretrained, pretrained_cfg, **kwargs)

    build.__name__ = build.__qualname__ = base + SMALL_STEM_SUFFIX
    return build


SMALL_STEMS = _find_stems()
for _base in SMALL_STEMS:
    # register_model also lists the name in this module's __all__, so it must be an attribute
    setattr(sys.modules[__name__], _base + SMALL_STEM_SUFFIX, register_model(_entrypoint(_base)))
