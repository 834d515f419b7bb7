"""The machine as it was launched: accelerator, device, precision, and the model and optimizer on them."""

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

from pipeline.common.system import keep_freed_memory
from pipeline.distributed import fsdp
from pipeline.distributed.sync_batchnorm import convert_batchnorm
from pipeline.settings.config import Config

PATIENCE = timedelta(hours=1)  # of processes with one that is alive: the first of a machine may be fetching the set


def make_accelerator(config: Config, device: str = "auto") -> Accelerator:
    """Device, precision and processes as the launcher and the settings say; device: auto, cpu or cuda.

    Raises ValueError for fp16 without a GPU, and where the device is not there.
    """
    # BatchNorm statistics are averaged over ranks before they are used, see state.average_buffers.
    # A backbone that is frozen at first has no gradients to wait for.
    unused = config.freeze_epochs > 0
    # Accelerate knows no other name
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    cpu, precision = device == "cpu", config.mixed_precision
    join_after_restart(cpu)
    with without_accelerates_fsdp():
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp, patience])
    if device not in ("auto", accelerator.device.type):
        raise ValueError(f"No device {device} was found, but {accelerator.device.type}. Use --device auto or cpu.")
    check_sharding(config, accelerator)
    check_meetings(config, accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def join_after_restart(cpu: bool) -> None:
    """Lets processes that torchrun has restarted on one machine meet where their dead predecessors left no addresses.

    torch 2.14 has all starts use the same keys of the launcher's store, and one restart in three met a closed port there. On
    several machines the launchers' counts of restarts may differ: there torch's way is kept, and another restart mends it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
    on_cpu = cpu or not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    own = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("gloo" if on_cpu else "nccl", store=own, rank=rank, world_size=world_size, timeout=PATIENCE)


@contextlib.contextmanager
def without_accelerates_fsdp() -> Iterator[None]:
    """Inside, Accelerate does not see that FSDP is asked for: pipeline.distributed.fsdp does it, on CPUs too."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    yield
    if asked is not None:
        os.environ["ACCELERATE_USE_FSDP"] = asked


def check_meetings(config: Config, accelerator: Accelerator) -> None:
    """Raises ValueError for what cannot be while the processes meet in every layer, which each must enter equally often."""
    if not meet_in_layers(config, accelerator):
        return
    what = "sync_batchnorm" if config.sync_batchnorm else "FSDP2"
    if config.loader == "stream":
        raise ValueError(
            f"loader stream gives processes unequal shares, which {what} does not take. Use loader workers."
        )
    if config.micro_batch_size == "auto":
        raise ValueError(
            f"micro_batch_size auto tries for each process alone, which {what} does not take. Give a number."
        )


def check_sharding(config: Config, accelerator: Accelerator) -> None:
    """Raises ValueError for what a sharded model cannot do, or has not been shown to do right."""
    if not fsdp.is_asked_for():
        return
    wrong = {
        "fsdp_version 1: this trainer shards by FSDP2. Set fsdp_version: 2": fsdp.launcher_says("VERSION", "1") != "2",
        "fsdp_offload_params. Leave it out": fsdp.launcher_says("OFFLOAD_PARAMS", "false") == "true",
        "fsdp_activation_checkpointing. Use --gradient_checkpointing true": (
            fsdp.launcher_says("ACTIVATION_CHECKPOINTING", "false") == "true"
        ),
        "fsdp_transformer_layer_cls_to_wrap: a model's blocks are found by themselves. Leave it out": (
            fsdp.launcher_says("TRANSFORMER_CLS_TO_WRAP", "") != ""
        ),
        "SAM: it puts other weights in place of the model's, and FSDP2 gathers from a buffer of its own. Leave sam_rho out": (
            config.uses_sam
        ),
        "optimizer muon: it orthogonalises whole matrices. Use adamw": config.optimizer == "muon",
        "freeze_epochs: FSDP2 gathers weights that are frozen and weights that are not together. Use --layer_decay": (
            config.freeze_epochs > 0
        ),
        "channels_last: FSDP2 shards contiguous weights. Leave it out": config.channels_last,
        "compile: it would trace around every gathering. Leave it out": config.compile,
        "fp16: its scaler would judge each shard alone. Use --mixed_precision bf16": accelerator.mixed_precision
        == "fp16",
    }
    for what, met in wrong.items():
        if met:
            raise ValueError(
                f"A sharded model (distributed_type FSDP) does not go with {what}, or launch with multi_gpu.yaml."
            )


def processes_here(accelerator: Accelerator) -> int:
    """The run's processes on this machine, which share its cores; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def is_to_be_sharded(accelerator: Accelerator) -> bool:
    return fsdp.is_asked_for() and accelerator.num_processes > 1


def prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Model and optimizer as Accelerate wraps them. A sharded model it only wraps for mixed precision."""
    if is_to_be_sharded(accelerator):
        model = accelerator.prepare_model(model, evaluation_mode=True)  # no DDP around it
        return model, accelerator.prepare_optimizer(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def with_channels_last(config: Config, model: nn.Module, accelerator: Accelerator) -> Config:
    """The settings with channels_last filled in: for a model of convolutions, unless it is sharded.

    The one convolution that cuts an image into patches for a transformer does not count.
    """
    if config.channels_last is not None:
        return config
    num_convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return dataclasses.replace(config, channels_last=num_convolutions > 1 and not is_to_be_sharded(accelerator))


def fit_to_machine(model: nn.Module, config: Config, accelerator: Accelerator) -> nn.Module:
    """The model on its device as the settings about precision and speed want it. Raises ValueError where it cannot be."""
    timm_model: Any = model
    if config.gradient_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(
                f"Model {config.model_name} has no gradient checkpointing. Leave it out, or lower micro_batch_size."
            )
        timm_model.set_grad_checkpointing()
    if config.sync_batchnorm and accelerator.num_processes > 1:
        from timm.layers import convert_sync_batchnorm

        model = convert_batchnorm(model) if accelerator.device.type == "cpu" else convert_sync_batchnorm(model)
    if not is_to_be_sharded(accelerator):  # what does not fit goes there shard by shard
        model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        # In place: the names in checkpoints stay as they are. Where batches differ, one graph for all sizes from the start,
        # so that none compiles anew in the middle of a run; else one for the very size, which is faster.
        model.compile(dynamic=True if sizes_vary(config) else None, mode=config.compile_mode)
    return model


def sizes_vary(config: Config) -> bool:
    """Whether training passes are of several batch sizes."""
    return bool(not config.drop_last or config.batch_size_schedule or config.micro_batch_size)


def meet_in_layers(config: Config, accelerator: Accelerator) -> bool:
    """Whether every pass of a process waits for the others', so that none can try one alone."""
    return accelerator.num_processes > 1 and (config.sync_batchnorm or fsdp.is_asked_for())


def system_facts(accelerator: Accelerator) -> dict[str, Any]:
    """Device, number of processes and the versions that figures depend on."""
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
