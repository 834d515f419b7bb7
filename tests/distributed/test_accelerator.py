"""The model on its device: the memory format that the CPU's kernels can take."""

import pytest
import timm
from accelerate import Accelerator
from conftest import flags, run_process
from torch import nn

from pipeline.distributed.accelerator import fit_to_machine, unsafe_in_channels_last, with_channels_last
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
    with pytest.raises(ValueError, match="stem.0.conv_scale.conv of fastvit_t8.*Remove channels_last"):
        with_channels_last(Config(model_name="fastvit_t8", channels_last=True), fastvit, accelerator)


@pytest.mark.parametrize("name", ["vgg11", "dla34", "simple_mlp"])
def test_a_model_without_gradient_checkpointing_is_refused(name):
    model = timm.create_model(name, **({"img_size": 8} if name == "simple_mlp" else {}))
    config = Config(model_name=name, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=f"Model {name} has no gradient checkpointing"):
        fit_to_machine(model, config, Accelerator(cpu=True))


@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_before_training(tmp_path):
    arguments = flags(output_dir=tmp_path, compile=True)
    environment = {"CXX": str(tmp_path / "no" / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = run_process("train.py", *arguments, fresh=True, **environment)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "compile needs a working compiler" in ended.stderr and "Install g++" in ended.stderr


def test_a_dynamo_backend_of_the_launch_file_has_no_effect_and_says_so(tmp_path):
    ended = run_process("train.py", *flags(output_dir=tmp_path), ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    assert ended.returncode == 0, ended.stderr
    assert "dynamo_backend INDUCTOR of the launch file has no effect. Use --compile true" in ended.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_an_ascii_terminal_prints_escapes(tmp_path):
    ended = run_process("train.py", "--loader=bögen", fresh=True, PYTHONIOENCODING="ascii")
    assert ended.returncode == 2 and "b\\xf6gen" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
