"""Our own small models in timm's interface, registered with it: SimpleMLP and SmallConvNet."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class SimpleMLP(nn.Module):
    """Linear layers with ReLU on the flattened image, in timm's interface; nothing in it depends on the batch."""

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
        """A fresh classifier for so many classes; with 0, the features themselves. There is no pooling to choose."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, C, H, W]; returns features [B, num_features]."""
        return self.hidden(images.flatten(1))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features: [B, num_features]; returns logits [B, num_classes], or with pre_logits what the classifier sees."""
        features = self.head_drop(features)
        return features if pre_logits else self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


class SmallConvNet(nn.Module):
    """A convolutional network for 32-pixel images that a CPU trains in minutes, in timm's interface.

    A stride-2 stem and three stages of 3x3 convolution, max-pooling and a second convolution at the smaller size, each with
    BatchNorm and ReLU: few layers without shortcuts, as the CIFAR-10 speed records have them
    (https://github.com/KellerJordan/cifar10-airbench). Grey images and other sizes will do.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        stem_width, *stage_widths = widths
        stem = nn.Conv2d(in_chans, stem_width, 4, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(stem_width), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(*(conv_stage(*pair) for pair in zip(widths, stage_widths)))
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for so many classes; with 0, the pooled features. The pooling is always the mean."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, C, H, W]; returns features [B, num_features, H / 16, W / 16]."""
        return self.stages(self.stem(images))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features as of forward_features; returns logits [B, num_classes], or with pre_logits what the classifier sees."""
        pooled = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def conv_stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.MaxPool2d(2, ceil_mode=True),  # before norm and activation, which then work on a quarter of the values
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


# timm looks for this name in the module of a registered model
default_cfgs = generate_default_cfgs(
    {
        "simple_mlp": dict(input_size=(3, 32, 32), fixed_input_size=True, first_conv="hidden.0", classifier="head"),
        "small_convnet": dict(input_size=(3, 32, 32), first_conv="stem.0", classifier="head"),
    }
)


@register_model
def simple_mlp(pretrained: bool = False, **kwargs: Any) -> SimpleMLP:
    """SimpleMLP for timm.create_model; two hidden layers of 512 unless `hidden_sizes` says otherwise."""
    return build_model_with_cfg(SimpleMLP, "simple_mlp", pretrained, **kwargs)


@register_model
def small_convnet(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """SmallConvNet for timm.create_model; stem and stages of 32 to 256 channels unless `widths` says otherwise."""
    return build_model_with_cfg(SmallConvNet, "small_convnet", pretrained, **kwargs)
