"""Finds by trial how many images fit into a device's memory at once."""

import dataclasses
import math

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from pipeline.distributed.accelerator import synchronizes_in_layers
from pipeline.images.preprocessing import Preprocessing
from pipeline.settings.batch_size import first_batch_size
from pipeline.settings.config import Config

MOMENTS = 2  # most state tensors per parameter of any optimizer
MEMORY_SETTINGS = "--gradient_checkpointing true and --mixed_precision bf16"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, Exception) and should_reduce_batch_size(error)


def most_images(config: Config, num_processes: int) -> int:
    """The most images that a process gets of any global batch of the run."""
    return math.ceil(max(first_batch_size(config), *config.batch_size_schedule.values(), 1) / num_processes)


def passes_fit(
    model: nn.Module, images_shape: tuple[int, int, int, int], reserve: int, accelerator: Accelerator
) -> bool:
    """Whether a forward and a backward pass over a batch of this shape fit besides `reserve` bytes that are needed later.

    images_shape: [B, C, S, S]. Weights and buffers are unchanged afterwards; gradients are dropped.
    """
    device = accelerator.device
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        reserved = torch.empty(reserve, dtype=torch.uint8, device=device)
        with accelerator.autocast():
            logits = model(torch.zeros(images_shape, device=device))
        logits.float().logsumexp(dim=1).sum().backward()
        del reserved
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        for buffer, earlier in zip(model.buffers(), before):
            buffer.copy_(earlier)
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def largest_micro_batch(
    model: nn.Module, preprocessing: Preprocessing, most: int, reserve: int, accelerator: Accelerator
) -> int:
    """`most`, halved until a batch of that many images fits; 0 if a single image does not. For this process only."""
    size, side = most, preprocessing.image_size
    while not passes_fit(model, (size, preprocessing.channels, side, side), reserve, accelerator):
        if size == 1:
            return 0
        size = math.ceil(size / 2)
    return size


def with_micro_batch_size(
    config: Config, model: nn.Module, preprocessing: Preprocessing, accelerator: Accelerator
) -> Config:
    """The settings with micro_batch_size auto replaced by the largest that fits on every process. Every rank must call it.

    Reserves memory for what is allocated later: the optimizer's state, SAM's copy of the weights, DDP's buckets. Raises
    ValueError if a single image does not fit.
    """
    if config.micro_batch_size != "auto":
        return config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = MOMENTS + config.uses_sam + (accelerator.num_processes > 1)
    most = most_images(config, accelerator.num_processes)
    size = largest_micro_batch(model, preprocessing, most, copies * weights, accelerator)
    if accelerator.num_processes > 1:
        size = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    if size == 0:
        raise ValueError(
            f"Model {config.model_name} does not fit into the memory of {accelerator.device} with a single image. "
            f"Use a smaller model or image_size; {MEMORY_SETTINGS} also save memory."
        )
    return dataclasses.replace(config, micro_batch_size=None if size == most else size)


def out_of_memory_advice(
    error: BaseException,
    model: nn.Module,
    preprocessing: Preprocessing,
    config: Config,
    accelerator: Accelerator,
    new_run: str,
) -> str:
    """What to do after training ran out of memory, with the micro_batch_size that fits, which may change in a resumed run.

    new_run: the text of Run.new_run, for settings that may not change.
    """
    used = most_images(config, accelerator.num_processes)
    used = min(config.images_at_once or used, used)
    first_line = str(error).strip().splitlines()[0]
    model.zero_grad(set_to_none=True)
    if synchronizes_in_layers(config, accelerator):
        what = f"Resume with --micro_batch_size {math.ceil(used / 2)}"
    elif size := largest_micro_batch(model, preprocessing, math.ceil(used / 2), 0, accelerator):
        what = f"{size} images fit: resume with --micro_batch_size {size}"
    else:
        what = "A single image does not fit: start a new run with a smaller model or image_size"
    return (
        f"Out of memory with {used} images at once ({first_line}). {what}. {MEMORY_SETTINGS} also save memory; "
        f"they require {new_run}."
    )
