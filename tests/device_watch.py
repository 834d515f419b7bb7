"""Modes that fail where Python waits for the device, or where a tensor of the CPU meets one of a GPU, and name our line.

On a CPU every tensor counts as one of the device, except at the places in ALLOWED. Inside FakeTensorMode tensors of the CPU
differ from those of a fake GPU, which have no values; then blocking copies between the two count as well.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Tags of torch: the result is a Python number, or the number of its elements depends on values.
READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operations that wait inside their kernel for a GPU, where torch does not tag them: to check for errors of the solver, the
# probabilities, or the range of the values.
CHECKING = (
    *(aten._linalg_check_errors.default, aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_eig.default),
    *(aten.multinomial.default, aten.histc.default),
)
MASKABLE = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
CONVERSIONS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "__array__", "cpu", "__repr__")}

# The places that may read a tensor, by the end of the file's path and the function, with the reason.
ALLOWED = {
    ("pipeline/training/run.py", "fetch"): "a log line or a checkpoint: one transfer each",
    ("pipeline/training/run.py", "log_training"): "a log line: the scale of the fp16 loss",
    ("pipeline/training/metrics.py", "figures"): "the end of an epoch or of an evaluation: one transfer each",
    ("pipeline/training/metrics.py", "counts_by_class"): "the end of an evaluation: one transfer",
    ("pipeline/training/evaluation.py", "from_all_ranks"): "the end of an evaluation with two classes: one transfer",
    ("pipeline/training/metrics.py", "roc_auc"): "the end of an evaluation with two classes: on the CPU",
    ("torch/amp/grad_scaler.py", "_maybe_opt_step"): "fp16: the scaler skips a step whose gradient overflowed",
    ("torch/optim/optimizer.py", "_get_value"): "Adam and AdamW count their steps in a tensor of the CPU, unless fused",
    ("torch/utils/data/dataloader.py", "__init__"): "the seed of the loader's workers, drawn on the CPU once per epoch",
}

OTHER = ("", "any other place")


class WaitsForDevice(AssertionError):
    """Python read a tensor of the device, or waited for a copy."""


class MixesDevices(AssertionError):
    """An operation got tensors of the CPU and of the GPU."""


class Watch:
    """What the two modes have seen. device: "cpu", or "cuda" inside FakeTensorMode.

    only_counts: whether to count a read that is not allowed, as OTHER, instead of raising.
    reads: how often each place of ALLOWED has read a tensor. fault: the first error that was raised.
    """

    def __init__(self, device: str, only_counts: bool) -> None:
        self.device, self.only_counts, self.process = device, only_counts, os.getpid()
        self.reads: Counter[tuple[str, str]] = Counter()
        self.fault: AssertionError | None = None

    @property
    def is_off(self) -> bool:
        """True in a worker of the loader, which was forked inside the modes."""
        return os.getpid() != self.process

    def read(self, what: str) -> None:
        """Counts a read at a place of ALLOWED; raises WaitsForDevice anywhere else, unless only_counts."""
        for frame in frames_to_our_line():
            for path, function in ALLOWED:
                if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(path):
                    self.reads[path, function] += 1
                    return
        if not self.only_counts:
            self.fail(WaitsForDevice, f"{what} waits for the device")
        self.reads[OTHER] += 1

    def fail(self, kind: type[AssertionError], what: str) -> None:
        self.fault = kind(f"{our_line()}: {what}.")
        raise self.fault

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises WaitsForDevice or MixesDevices for an operation at fault."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if device_of(tensor) == self.device]
        if func in (aten._to_copy.default, aten.copy_.default):
            self.check_copy(func, args, kwargs)
        elif ours and any(tensor.ndim and device_of(tensor) != self.device for tensor in tensors):
            self.fail(MixesDevices, f"{func} got tensors of the CPU and of the GPU")
        if ours and is_read(func, args):
            self.read(str(func))

    def check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises WaitsForDevice for a copy between devices that Python waits for."""
        source = target = device_of(args[0])
        non_blocking = kwargs.get("non_blocking", False)
        if func is aten.copy_.default:
            source = device_of(args[1])
            non_blocking = args[2] if len(args) > 2 else non_blocking
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
        if source != target and (target == "cpu" or not non_blocking):
            self.read(f"{func} from {source} to {target}")


class Operations(TorchDispatchMode):
    """Checks every operation below autograd, those of the backward pass too."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watch.is_off or func.namespace == "prim":  # prim.device asks a fake tensor for its device
            return func(*args, **kwargs)
        # in inference mode composite operations arrive whole; elsewhere autograd has decomposed them
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.watch.check(func, args, kwargs)
        if self.watch.device != "cpu":
            if func is aten._local_scalar_dense.default:
                return 2.0 if args[0].dtype.is_floating_point else 1  # fake tensors have no values
            if "_fused_" in func.name():
                return None  # in place, and without an implementation for fake tensors
        return func(*args, **kwargs)


class Conversions(TorchFunctionMode):
    """Checks conversions, which read a tensor of the CPU without an operation that a dispatch mode sees."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVERSIONS and device_of(args[0]) == self.watch.device and not self.watch.is_off:
            self.watch.read(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def device_watch(device: str = "cpu", only_counts: bool = False) -> Iterator[Watch]:
    """Raises WaitsForDevice or MixesDevices at the first fault in this thread, and again at the end if that was caught."""
    watch = Watch(device, only_counts)
    with Operations(watch), Conversions(watch):
        yield watch
    if watch.fault is not None:
        raise watch.fault


def device_of(tensor: torch.Tensor) -> str:
    return tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type


def is_read(func: Any, args: Any) -> bool:
    """Whether Python, or the allocator, needs values to know the result or its shape."""
    if func in MASKABLE:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(READING_TAGS & set(func.tags)) or func in CHECKING


def frames_to_our_line() -> list[FrameType]:
    """The frames from here outwards to the first function of pipeline/; all frames if there is none."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        is_ours = frame.f_code.co_filename.startswith(str(ROOT / "pipeline") + os.sep)
        if is_ours and not frame.f_code.co_name.startswith("<"):  # a comprehension or a lambda
            return frames
        frame = frame.f_back
    return frames


def our_line() -> str:
    """The innermost line of pipeline/ that is being run, as `path:line in function`."""
    frame = frames_to_our_line()[-1]
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{frame.f_lineno} in {frame.f_code.co_name}"
