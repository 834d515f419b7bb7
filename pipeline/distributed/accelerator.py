"""The accelerator: processes, device and precision as launched; and the model and optimizer on them."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from pipeline.common import console
from pipeline.common.system import keep_freed_memory
from pipeline.distributed import fsdp
from pipeline.distributed.sync_batchnorm import convert_batchnorm
from pipeline.settings.config import Config

PRECISIONS = ("no", "fp16", "bf16")
FEWEST_SAFE_CHANNELS = 16  # of the input of a strided 1x1 convolution in channels_last on a CPU
MOST_GRAPHS = 64  # of a compiled model, one for each batch size in training and evaluation
TIMEOUT = timedelta(hours=1)  # of collective operations: one process of a machine may be downloading the dataset


def make_accelerator(config: Config, device: str = "auto") -> Accelerator:
    """The accelerator for the processes of the launcher and the precision of the settings. device: auto, cpu or cuda.

    Raises ValueError if the device does not exist, for fp16 without a GPU, and for settings that the launch does not support.
    """
    # broadcast_buffers: BatchNorm statistics are averaged over ranks before they are used, see state.average_buffers.
    # unused: the parameters of a frozen backbone get no gradients, and DDP must not wait for them.
    unused = config.freeze_epochs > 0
    # Accelerate has only the deprecated name of this option
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    cpu, precision = device == "cpu", config.mixed_precision
    join_after_restart(cpu)
    with without_accelerates_fsdp(), without_accelerates_compiler():
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp, timeout])
    if device not in ("auto", accelerator.device.type):
        raise ValueError(f"No device {device} was found, only {accelerator.device.type}. Use --device auto or cpu.")
    if accelerator.gradient_accumulation_steps != 1:  # Accelerate would divide every gradient by it
        accelerator.gradient_accumulation_steps = 1
        if accelerator.is_main_process:
            console.warn(
                "The launcher's gradient_accumulation_steps has no effect: batch_size is that of an optimizer step. To limit the "
                "images in memory, use --micro_batch_size."
            )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"The launcher's mixed_precision is {accelerator.mixed_precision}; it must be one of {', '.join(PRECISIONS)}."
        )
    check_sharding(config, accelerator)
    check_layer_synchronization(config, accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU. On a CPU, use bf16 or no.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def join_after_restart(cpu: bool) -> None:
    """Initializes the process group of processes that torchrun restarted on one machine, under store keys of their own.

    In torch 2.14 all attempts share the same keys of the launcher's store, and one restart in three connected to a closed port
    of an ended process. On several machines the restart counts of the launchers may differ, so torch's initialization is kept;
    if it fails, torchrun restarts the processes again.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    on_cpu = cpu or not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    own = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("gloo" if on_cpu else "nccl", store=own, rank=rank, world_size=world_size, timeout=TIMEOUT)


@contextlib.contextmanager
def without_accelerates_fsdp() -> Iterator[None]:
    """Hides the request for FSDP from Accelerate, because pipeline.distributed.fsdp shards the model, also on CPUs."""
    requested = os.environ.pop("ACCELERATE_USE_FSDP", None)
    yield
    if requested is not None:
        os.environ["ACCELERATE_USE_FSDP"] = requested


@contextlib.contextmanager
def without_accelerates_compiler() -> Iterator[None]:
    """Inside the context Accelerate does not see a dynamo_backend of the launch file; a warning names the setting to use.

    Accelerate would wrap the model, and the names in checkpoints and in the saved model would change.
    """
    backend = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    yield
    if backend is not None:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = backend
        if backend.lower() != "no" and os.environ.get("RANK", "0") == "0":
            console.warn(
                f"dynamo_backend {backend} of the launch file has no effect. Use --compile true to compile the model."
            )


def check_layer_synchronization(config: Config, accelerator: Accelerator) -> None:
    """Raises ValueError for settings with which the ranks would run different numbers of passes, if layers synchronize them."""
    if not synchronizes_in_layers(config, accelerator):
        return
    what = "sync_batchnorm" if config.sync_batchnorm else "FSDP2"
    if config.loader == "stream":
        raise ValueError(
            f"loader stream gives the processes unequal shares, which {what} does not support. Use --loader workers."
        )
    if config.micro_batch_size == "auto":
        raise ValueError(
            f"micro_batch_size auto tests sizes in each process alone, which {what} does not support. Set a number."
        )


def check_sharding(config: Config, accelerator: Accelerator) -> None:
    """Raises ValueError for settings that a sharded model does not support, or with which it has not been verified."""
    if not fsdp.is_requested():
        return
    wrong = {
        "fsdp_version 1: this trainer shards by FSDP2. Set fsdp_version: 2": fsdp.launch_setting("VERSION", "1") != "2",
        "fsdp_offload_params. Remove it": fsdp.launch_setting("OFFLOAD_PARAMS", "false") == "true",
        "fsdp_activation_checkpointing. Use --gradient_checkpointing true": (
            fsdp.launch_setting("ACTIVATION_CHECKPOINTING", "false") == "true"
        ),
        "fsdp_transformer_layer_cls_to_wrap: the blocks of a model are detected automatically. Remove it": (
            fsdp.launch_setting("TRANSFORMER_CLS_TO_WRAP", "") != ""
        ),
        "SAM: it replaces the weights of the model, but FSDP2 gathers them from its own buffer. Remove sam_rho": (
            config.uses_sam
        ),
        "optimizer muon: it orthogonalises whole matrices. Use adamw": config.optimizer == "muon",
        f"optimizer {config.optimizer}: timm's optimizers are not tested with shards. Use adamw": (
            config.optimizer not in ("sgd", "adam", "adamw", "sam", "muon")
        ),
        "freeze_epochs: FSDP2 gathers frozen and trainable weights together. Use --layer_decay": (
            config.freeze_epochs > 0
        ),
        "channels_last: FSDP2 shards contiguous weights. Remove it": config.channels_last,
        "compile: every all-gather would break the graph. Remove it": config.compile,
        "fp16: its scaler would check each shard alone. Use --mixed_precision bf16": accelerator.mixed_precision
        == "fp16",
    }
    for what, is_set in wrong.items():
        if is_set:
            raise ValueError(
                f"A sharded model (distributed_type FSDP) does not support {what}, or launch with multi_gpu.yaml."
            )


def largest(accelerator: Accelerator, *numbers: int) -> list[int]:
    """The maximum of each number over all ranks, on every rank. Every rank must call it."""
    if accelerator.num_processes == 1:
        return list(numbers)
    gathered = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    return [int(number) for number in gathered.amax(dim=0)]


def processes_here(accelerator: Accelerator) -> int:
    """The number of processes on this machine, which share its cores; all processes if the launcher does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def will_be_sharded(accelerator: Accelerator) -> bool:
    return fsdp.is_requested() and accelerator.num_processes > 1


def launch_facts(accelerator: Accelerator) -> dict[str, Any]:
    """What the launcher and the machine decide, apart from the precision, which is a setting."""
    return {"device": accelerator.device.type, "FSDP": will_be_sharded(accelerator)}


def prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Model and optimizer, prepared by Accelerate. It prepares a sharded model only for mixed precision."""
    if will_be_sharded(accelerator):
        model = accelerator.prepare_model(model, evaluation_mode=True)  # evaluation_mode: without DDP
        return model, accelerator.prepare_optimizer(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def with_precision(config: Config, accelerator: Accelerator) -> Config:
    """The settings with mixed_precision filled in: the launcher may have set it, and a run keeps it on resume."""
    return dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)


def with_channels_last(config: Config, model: nn.Module, accelerator: Accelerator) -> Config:
    """The settings with channels_last filled in: true for a convolutional model, unless it is sharded or unsafe on the CPU.

    The single convolution that embeds the patches of a transformer does not count. Raises ValueError when channels_last
    is set for a model whose backward pass would corrupt memory.
    """
    unsafe = unsafe_in_channels_last(model) if accelerator.device.type == "cpu" else None
    if config.channels_last is None:
        num_convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        chosen = num_convolutions > 1 and unsafe is None and not will_be_sharded(accelerator)
        return dataclasses.replace(config, channels_last=chosen)
    if config.channels_last and unsafe is not None:
        raise ValueError(
            f"channels_last true would corrupt memory on a CPU: convolution {unsafe} of {config.model_name} has a 1x1 kernel, "
            f"a stride and fewer than {FEWEST_SAFE_CHANNELS} input channels (oneDNN issue 6035). Remove channels_last."
        )
    return config


def unsafe_in_channels_last(model: nn.Module) -> str | None:
    """The name of a convolution whose backward pass writes beyond its buffer in channels_last on a CPU; None without one.

    oneDNN's weight gradient of a strided 1x1 convolution overruns its workspace when the input has fewer channels than a
    block (8 with AVX2, 16 with AVX-512): https://github.com/uxlfoundation/oneDNN/issues/6035. With torch 2.14.1 and AVX2,
    2, 3, 4, 8, 12 and 15 channels ended in a segmentation fault or a damaged heap, in float32 and bfloat16; 16 channels,
    stride 1, larger kernels, groups and contiguous tensors did not.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels < FEWEST_SAFE_CHANNELS:
            if module.kernel_size == (1, 1) and max(module.stride) > 1:
                return name
    return None


def fit_to_machine(model: nn.Module, config: Config, accelerator: Accelerator) -> nn.Module:
    """Moves the model to its device and applies the settings of speed and memory. Raises ValueError for an unsupported one."""
    timm_model: Any = model
    if config.gradient_checkpointing:
        try:
            timm_model.set_grad_checkpointing()
        except (AttributeError, AssertionError, NotImplementedError) as error:  # timm's vgg, dla and others only assert
            raise ValueError(
                f"Model {config.model_name} has no gradient checkpointing. Remove the setting, or lower micro_batch_size."
            ) from error
    if config.sync_batchnorm and accelerator.num_processes > 1:
        model = convert_batchnorm(model)
    if not will_be_sharded(accelerator):  # else fsdp.shard moves it shard by shard, as it may not fit as a whole
        model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        compile_in_place(model, config, accelerator.device)
    return model


def compile_in_place(model: nn.Module, config: Config, device: torch.device) -> None:
    """Compiles the forward pass. The names of the model's tensors stay, as checkpoints need them.

    If batch sizes vary, one graph serves all of them on a CPU. On a GPU each size has a graph of its own: on an H100 and an H200
    with torch 2.11, a backward pass with a dynamic batch size failed in channels_last, because the compiler expected a
    convolution on maps of one pixel to return its gradient in that order.
    """
    check_compiler(device)
    if not sizes_vary(config):
        model.compile(dynamic=None, mode=config.compile_mode)
    elif device.type == "cpu":
        model.compile(dynamic=None, mode=config.compile_mode)
        compile_for_any_batch_size(model)
    else:
        torch._dynamo.config.recompile_limit = MOST_GRAPHS  # with more sizes than its default of 8, torch would give up
        model.compile(dynamic=False, mode=config.compile_mode)


def compile_for_any_batch_size(model: nn.Module) -> None:
    """Makes the first graph of a compiled model serve all batch sizes. Only the batch dimension is dynamic."""
    compiled: Any = model._compiled_call_impl

    def call(images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        output: torch.Tensor = compiled(images)
        return output

    model._compiled_call_impl = call


def check_compiler(device: torch.device) -> None:
    """Compiles a small function. Raises ValueError if that fails, as where there is no C++ compiler."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except RuntimeError as error:  # torch._dynamo's and torch._inductor's errors are all of this type
        cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"compile needs a working compiler: {cause} Install g++ (gcc on a GPU), or remove compile."
        ) from error


def sizes_vary(config: Config) -> bool:
    """Whether training passes have several batch sizes."""
    return bool(not config.drop_last or config.batch_size_schedule or config.micro_batch_size)


def synchronizes_in_layers(config: Config, accelerator: Accelerator) -> bool:
    """Whether layers communicate between ranks in every pass, so that no rank can run a pass alone."""
    return accelerator.num_processes > 1 and (config.sync_batchnorm or fsdp.is_requested())


def system_facts(accelerator: Accelerator) -> dict[str, Any]:
    """Device, number of processes and package versions, on which results depend."""
    import platform
    from importlib.metadata import version

    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "torchvision", "timm", "accelerate", "datasets")
    return {
        "device": f"{device.type} ({name})",
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }
