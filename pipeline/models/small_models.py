"""The small models of this project, with the interface of timm and registered there: SimpleMLP and SmallConvNet."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class SimpleMLP(nn.Module):
    """Linear layers with ReLU on the flattened image, with the interface of timm; without BatchNorm."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        hidden_sizes: Sequence[int] = (512, 512),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = hidden_sizes[-1]
        sizes = [in_chans * height * width, *hidden_sizes]
        layers = [[nn.Linear(inputs, outputs), nn.ReLU()] for inputs, outputs in zip(sizes, sizes[1:])]
        self.hidden = nn.Sequential(*(module for layer in layers for module in layer))
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for num_classes, or by the identity for 0. global_pool is ignored."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, C, H, W]; returns features [B, num_features]."""
        return self.hidden(images.flatten(1))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features: [B, num_features]; returns logits [B, num_classes], or with pre_logits the input of the classifier."""
        features = self.head_drop(features)
        return features if pre_logits else self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


class SmallConvNet(nn.Module):
    """A convolutional network for 32-pixel images that trains on a CPU in minutes, with the interface of timm.

    A fixed transform of 2x2 patches, then three stages of 3x3 convolution, max-pooling and a second convolution at the smaller
    size, each with BatchNorm and ReLU, like the CIFAR-10 speed records (https://arxiv.org/abs/2404.00498). Grey images and other
    sizes are supported. shortcuts: gives each stage a third convolution and a shortcut around the last two, as in the record for
    96 % (https://github.com/KellerJordan/cifar10-airbench).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] = (32, 72, 144),
        shortcuts: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        patches = PatchTransform(in_chans)
        stem_width = len(patches.weight)
        self.stem = nn.Sequential(patches, nn.BatchNorm2d(stem_width), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(*(conv_stage(*pair, shortcuts) for pair in zip((stem_width, *widths), widths)))
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for num_classes, or by the identity for 0. Pooling is always the mean."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, C, H, W]; returns features [B, num_features, (H - 1) // 8, (W - 1) // 8], at least one pixel."""
        return self.stages(self.stem(images))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features: from forward_features; returns logits [B, num_classes], or with pre_logits the input of the classifier."""
        pooled = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


class PatchTransform(nn.Module):
    """The cosine transform of each patch of an image over rows, columns and channels. It has no trainable parameters.

    Over red, green and blue the transform gives luma and two opponent colours. These are close to the principal axes of patches
    of natural images, so a following BatchNorm whitens the patches. Otherwise the first layer has to learn this; the speed
    records compute it from their training set (https://arxiv.org/abs/2404.00498). Each filter also occurs negated, to keep the
    values that a ReLU sets to zero.

    weight: float [2 * in_chans * size**2, in_chans, size, size]; its first half is orthonormal.
    """

    weight: torch.Tensor

    def __init__(self, in_chans: int, size: int = 2) -> None:
        super().__init__()
        colours, lines = cosine_basis(in_chans), cosine_basis(size)
        filters = torch.einsum("ac,by,dx->abdcyx", colours, lines, lines).reshape(-1, in_chans, size, size)
        self.register_buffer("weight", torch.cat([filters, -filters]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, C, H, W]; returns float [B, len(weight), H - size + 1, W - size + 1]."""
        return nn.functional.conv2d(images, self.weight)


def cosine_basis(size: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II), one basis vector per row; float [size, size]."""
    basis = torch.cos(math.pi / size * torch.arange(size)[:, None] * (torch.arange(size) + 0.5))
    return basis / basis.norm(dim=1, keepdim=True)


class Pool(nn.MaxPool2d):
    """2x2 max-pooling. Features with a side of one pixel are unchanged."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) if min(features.shape[-2:]) > 1 else features


class Shortcut(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + super().forward(features)


def conv_and_norm(width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]


def conv_stage(inputs: int, outputs: int, shortcut: bool) -> nn.Sequential:
    """A stage of SmallConvNet; it halves the side of its input."""
    # first the first layer: initial weights are drawn in the order in which layers are built
    first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    if shortcut:
        later: list[nn.Module] = [Shortcut(*conv_and_norm(outputs), nn.ReLU(inplace=True), *conv_and_norm(outputs))]
    else:
        later = conv_and_norm(outputs)
    return nn.Sequential(
        first,
        Pool(),  # before norm and activation, which then process a quarter of the values
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        *later,
        nn.ReLU(inplace=True),
    )


# timm reads this name from the module of a registered model
default_cfgs = generate_default_cfgs(
    {
        "simple_mlp": dict(input_size=(3, 32, 32), fixed_input_size=True, first_conv="hidden.0", classifier="head"),
        "small_convnet": dict(input_size=(3, 32, 32), classifier="head"),
        "small_convnet_wide": dict(input_size=(3, 32, 32), classifier="head"),
        "small_convnet_deep": dict(input_size=(3, 32, 32), classifier="head"),
    }
)


@register_model
def simple_mlp(pretrained: bool = False, **kwargs: Any) -> SimpleMLP:
    """SimpleMLP for timm.create_model; two hidden layers of 512 by default (`hidden_sizes`)."""
    return build_model_with_cfg(SimpleMLP, "simple_mlp", pretrained, **kwargs)


@register_model
def small_convnet(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """SmallConvNet for timm.create_model; stages of 32, 72 and 144 channels by default (`widths`)."""
    return build_model_with_cfg(SmallConvNet, "small_convnet", pretrained, **kwargs)


@register_model
def small_convnet_wide(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """SmallConvNet with stages of 64, 256 and 256 channels, five times the work of small_convnet."""
    return build_model_with_cfg(SmallConvNet, "small_convnet_wide", pretrained, **{"widths": (64, 256, 256), **kwargs})


@register_model
def small_convnet_deep(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """SmallConvNet with stages of 128, 384 and 384 channels and shortcuts, for a GPU: 19 times the work of small_convnet."""
    arguments = {"widths": (128, 384, 384), "shortcuts": True, **kwargs}
    return build_model_with_cfg(SmallConvNet, "small_convnet_deep", pretrained, **arguments)
