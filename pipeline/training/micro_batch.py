"""Finds by trial how many images fit into a device's memory at once."""

import copy
import dataclasses
import math

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from pipeline.distributed.accelerator import synchronizes_in_layers
from pipeline.distributed.sync_batchnorm import has_batchnorm
from pipeline.images.preprocessing import Preprocessing
from pipeline.optim.trial import state_per_weight
from pipeline.settings.batch_size import first_batch_size, num_micro_batches, share_of
from pipeline.settings.config import Config
from pipeline.training.step import kept_buffers

MOMENTS = 2  # least state tensors per parameter to reserve memory for
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
    try:
        with kept_buffers(model):
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
    config: Config, model: nn.Module, preprocessing: Preprocessing, resident_bytes: int, accelerator: Accelerator
) -> Config:
    """The settings with micro_batch_size auto replaced by the largest that fits on every process. Every rank must call it.

    Reserves memory for what is allocated later: the optimizer's state, SAM's copy of the weights, DDP's buckets, the moving
    average and the decoded images (resident_bytes). Raises ValueError if a single image does not fit.
    """
    if config.micro_batch_size != "auto":
        return config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    moments = max(MOMENTS, math.ceil(state_per_weight(config)))
    copies = moments + config.uses_sam + (accelerator.num_processes > 1) + (config.ema_decay is not None)
    most = most_images(config, accelerator.num_processes)
    size = largest_micro_batch(model, preprocessing, most, copies * weights + resident_bytes, accelerator)
    if accelerator.num_processes > 1:
        size = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    if size == 0:
        raise ValueError(
            f"Model {config.model_name} does not fit into the memory of {accelerator.device} with a single image. "
            f"Use a smaller model or image_size; {MEMORY_SETTINGS} also save memory."
        )
    return dataclasses.replace(config, micro_batch_size=None if size == most else size)


def smallest_pass(config: Config, num_samples: int, num_processes: int) -> int:
    """The fewest images that a process passes through the model at once in training; one where its share is empty."""
    sizes = {first_batch_size(config), *config.batch_size_schedule.values()}
    batches = {min(size, num_samples) for size in sizes}
    if not config.drop_last:
        batches |= {num_samples % size for size in sizes} - {0}
    shares = [share_of(batch, rank, num_processes) for batch in batches for rank in range(num_processes)]
    counts = [max(stop - start, 1) for start, stop in shares]
    return min(count // num_micro_batches(count, config) for count in counts)


def check_batchnorm(
    config: Config, model: nn.Module, preprocessing: Preprocessing, num_samples: int, accelerator: Accelerator
) -> None:
    """Raises ValueError when a pass of the run has one image, and the model's BatchNorm cannot normalise its features."""
    if config.sync_batchnorm or smallest_pass(config, num_samples, accelerator.num_processes) > 1:
        return
    if not has_batchnorm(model):
        return
    was_training = model.training
    image = torch.zeros(1, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    try:
        with torch.no_grad(), kept_buffers(model):
            model.train()(image.to(accelerator.device))
    except ValueError as error:
        raise ValueError(
            f"BatchNorm of {config.model_name} needs at least 2 images in a pass, and a pass of this run has 1: {num_samples} "
            f"training images, batch_size {first_batch_size(config)}, processes {accelerator.num_processes}, micro_batch_size "
            f"{config.micro_batch_size}, drop_last {config.drop_last}. Change one of them."
        ) from error
    finally:
        model.train(was_training)


def out_of_memory_advice(
    reason: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    config: Config,
    accelerator: Accelerator,
    new_run: str,
) -> str:
    """What to do after training ran out of memory, with the micro_batch_size that fits, which may change in a resumed run.

    reason: the first line of the error; new_run: the text of Run.new_run, for settings that may not change. The trial
    passes use a copy of the model, without the hooks of DDP.
    """
    used = most_images(config, accelerator.num_processes)
    used = min(config.images_at_once or used, used)
    model.zero_grad(set_to_none=True)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if synchronizes_in_layers(config, accelerator):
        what = f"Resume with --micro_batch_size {math.ceil(used / 2)}"
    elif size := largest_micro_batch(copy.deepcopy(model), preprocessing, math.ceil(used / 2), 0, accelerator):
        what = f"{size} images fit: resume with --micro_batch_size {size}"
    else:
        what = "A single image does not fit: start a new run with a smaller model or image_size"
    return (
        f"Out of memory with {used} images at once ({reason}). {what}. {MEMORY_SETTINGS} also save memory; "
        f"they require {new_run}."
    )
