"""An epoch of training and an evaluation under device_watch: on the CPU, or on a fake GPU without a backward pass."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from device_watch import WaitsForDevice, Watch, device_watch, our_line
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from pipeline.distributed.accelerator import make_accelerator
from pipeline.images.augment import AUGMENTS, line_starts
from pipeline.images.randaugment import magnitude_bins
from pipeline.loaders import build as loaders_build
from pipeline.loaders import sources
from pipeline.settings.config import Config
from pipeline.training import build
from pipeline.training.confident_mistakes import ConfidentMistakes
from pipeline.training.evaluation import evaluate
from pipeline.training.loop import train_epoch
from pipeline.training.metrics import zero_calibration, zero_class_counts
from pipeline.training.run import Run
from pipeline.training.state import begin_state

# 16 digits of 8x8 pixels in batches of 12 and 4
SMALL: dict[str, Any] = {
    "model_name": "small_convnet", "max_train_samples": 20, "val_fraction": 0.2, "batch_size": 12, "drop_last": False,
    "augment": "none", "warmup_epochs": 0.0, "log_every": 1000,
}  # fmt: skip


class BareRun(Run):
    """A run without folder, signals and trackers."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.tracker = self.writer = None
        self.signals: Any = SimpleNamespace(received=0)
        self.last_read, self.submitted = 0.0, -1


def watched_epoch(device: str = "cpu", scaler: Any = None, **settings: Any) -> Watch:
    """Trains an epoch with SMALL and the settings, and evaluates, under device_watch. device: "cpu", or "cuda" for a fake GPU.

    scaler: of the loss, as with fp16, on the CPU. Loading the images is not watched, nor are tables that are computed once per
    process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(Config(**{**SMALL, **settings}), device="cpu")
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(fake_gpu(accelerator))
        parts = build.assemble(Config(**{**SMALL, **settings}), accelerator)
        build.load_images(parts, accelerator)
        policy, size = AUGMENTS[parts.config.augment].policy, parts.preprocessing.fitted_size
        if policy is not None:
            with unset_fake_temporarily():
                magnitude_bins(policy, size)
        accelerator.scaler = scaler
        state = begin_state(parts.model, parts.optimizer, accelerator, parts.ema)
        classes = zero_class_counts(len(parts.dataset.class_names), accelerator.device)
        calibration = zero_calibration(accelerator.device)
        run = BareRun(parts.config, accelerator)
        if device == "cuda":
            accelerator.backward = given_gradients(parts.model)
            run.check_finite = lambda *arguments: None  # fake tensors have no values
        with device_watch(device) as watch:
            train_epoch(state, parts.loaders["train"], run)
            assert state.batch == state.step == 2
            for model in [state.bare_model] if state.ema is None else [state.bare_model, state.ema.module]:
                more: dict[str, Any] = {"mistakes": ConfidentMistakes(), "loss": parts.config.loss}
                evaluate(model, parts.loaders["val"], accelerator, classes, calibration, run.signals, **more)
    return watch


def given_gradients(model: nn.Module) -> Any:
    """A backward pass that adds gradients without values: autograd needs a real GPU for tensors of one."""

    def backward(loss: torch.Tensor) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                gradient = torch.empty_like(parameter)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    return backward


def copy_of(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """For deepcopy: torch's own copy of a fake tensor reads memory that the tensor does not have."""
    copy = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]


def undecoded(split: Any, shape: tuple[int, ...], *others: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Black images instead of resident_images, whose threads are outside FakeTensorMode."""
    return torch.zeros(len(split), *shape, dtype=torch.uint8), np.arange(len(split))


def wait(*arguments: Any) -> None:
    raise WaitsForDevice(f"{our_line()}: synchronize waits for the device.")


@contextlib.contextmanager
def fake_gpu(accelerator: Accelerator) -> Iterator[None]:
    """Makes `cuda` the accelerator's device; its tensors are fake. Replaces what needs a driver, or values."""
    plain_to, make_model = nn.Module.to, build.make_fitting_model

    def to(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        """torch cannot move a module of fake tensors."""
        if any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
            return module
        return plain_to(module, *arguments, **keywords)

    def make_real_model(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return make_model(*arguments)

    generator, stream = torch.Generator(), SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True):
        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            patch.setitem(shared, "device", torch.device("cuda"))
        patch.setattr(nn.Module, "to", to)
        patch.setattr(build, "make_fitting_model", make_real_model)
        patch.setattr(FakeTensor, "__deepcopy__", copy_of, raising=False)
        patch.setattr(sources, "resident_images", undecoded)
        patch.setattr(loaders_build, "device_memory", lambda device: 2**30)
        patch.setattr(torch, "Generator", lambda device="cpu": generator)
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "synchronize", wait)
        patch.setattr(torch.accelerator, "synchronize", wait)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        line_starts.cache_clear()  # it keeps tensors of the device
        try:
            yield
        finally:
            line_starts.cache_clear()
