"""The model on its device: the memory format that the CPU's kernels can take."""

import pytest
import timm
from accelerate import Accelerator
from torch import nn

from pipeline.distributed.accelerator import unsafe_in_channels_last, with_channels_last
from pipeline.settings.config import Config


@pytest.mark.parametrize(
    "convolution, unsafe",
    [
        (nn.Conv2d(3, 48, 1, stride=2), True),
        (nn.Conv2d(15, 48, 1, stride=(2, 1)), True),
        (nn.Conv2d(16, 48, 1, stride=2), False),
        (nn.Conv2d(3, 48, 1), False),
        (nn.Conv2d(3, 48, 3, stride=2), False),
        (nn.Conv2d(8, 8, 1, stride=2, groups=8), False),
    ],
)
def test_strided_1x1_convolutions_of_few_channels_are_unsafe_in_channels_last(convolution, unsafe):
    assert (unsafe_in_channels_last(nn.Sequential(nn.ReLU(), convolution)) == "1") == unsafe


def test_a_model_with_an_unsafe_convolution_stays_contiguous_on_a_cpu():
    """Without this, fastvit_t8 ends in a segmentation fault or a damaged heap (oneDNN issue 6035)."""
    accelerator = Accelerator(cpu=True)
    fastvit, resnet = timm.create_model("fastvit_t8", num_classes=2), timm.create_model("resnet18", num_classes=2)
    assert unsafe_in_channels_last(fastvit) == "stem.0.conv_scale.conv"
    assert with_channels_last(Config(), fastvit, accelerator).channels_last is False
    assert with_channels_last(Config(), resnet, accelerator).channels_last is True
    with pytest.raises(ValueError, match="stem.0.conv_scale.conv of fastvit_t8.*Leave channels_last out"):
        with_channels_last(Config(model_name="fastvit_t8", channels_last=True), fastvit, accelerator)
