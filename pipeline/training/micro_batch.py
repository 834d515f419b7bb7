"""How many images fit into a device's memory at once, found by trying."""

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

MOMENTS = 2  # tensors of an optimizer's state for each parameter, at most


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, Exception) and should_reduce_batch_size(error)


def most_images(config: Config, num_processes: int) -> int:
    """The most images that a process gets of any global batch of the run."""
    return math.ceil(max(first_batch_size(config), *config.batch_size_schedule.values(), 1) / num_processes)


def passes_fit(
    model: nn.Module, images_shape: tuple[int, int, int, int], reserve: int, accelerator: Accelerator
) -> bool:
    """Whether a forward and a backward pass over that many images fit beside `reserve` bytes that are still to be taken.

    images_shape: [B, C, S, S]. Weights and buffers are left as they were, gradients are dropped.
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
    """`most` images, halved until their passes fit; 0 when not even one image's do. Of this process alone."""
    size, side = most, preprocessing.image_size
    while not passes_fit(model, (size, preprocessing.channels, side, side), reserve, accelerator):
        if size == 1:
            return 0
        size = math.ceil(size / 2)
    return size


def with_micro_batch_size(
    config: Config, model: nn.Module, preprocessing: Preprocessing, accelerator: Accelerator
) -> Config:
    """The settings with micro_batch_size auto filled in: the largest that fits every process. Every rank calls it.

    Room is left for what comes later: the optimizer's state, SAM's copy of the weights, DDP's buckets. Raises ValueError
    when one image is too much.
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
            "Use a smaller model or image_size, --gradient_checkpointing true, or --mixed_precision bf16."
        )
    return dataclasses.replace(config, micro_batch_size=None if size == most else size)


def out_of_memory_advice(
    error: BaseException,
    model: nn.Module,
    preprocessing: Preprocessing,
    config: Config,
    accelerator: Accelerator,
) -> str:
    """What to do after training ran out of memory, with a micro_batch_size that would fit."""
    used = most_images(config, accelerator.num_processes)
    used = min(config.images_at_once or used, used)
    first_line = str(error).strip().splitlines()[0]
    model.zero_grad(set_to_none=True)
    if synchronizes_in_layers(config, accelerator):
        what = f"Try --micro_batch_size {math.ceil(used / 2)}"
    elif size := largest_micro_batch(model, preprocessing, math.ceil(used / 2), 0, accelerator):
        what = f"The passes of {size} images would fit: go on with --micro_batch_size {size}"
    else:
        what = "Not even one image's passes would fit: use a smaller model or image_size"
    return (
        f"Out of memory with {used} images at once ({first_line}). {what}; --gradient_checkpointing true and "
        "--mixed_precision bf16 save memory too."
    )
