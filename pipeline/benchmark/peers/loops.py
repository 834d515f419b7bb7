"""The bare loop and the peers as contenders: the same model, optimizer, precision and batch, with other loaders and loops."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.benchmark.peers.loaders import plain_loader, timm_loader
from pipeline.benchmark.stepclock import HALVES, StepClock
from pipeline.benchmark.waiting import waiting
from pipeline.models.create import create_model
from pipeline.optim.optimizers import create_optimizer, peak_lr, set_lr
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

RESIDENT_BATCHES = 8


def find_device() -> torch.device:
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def make_model(config: Config, data: dict[str, Any], device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and optimizer as in our runs; data: the result of sets.peer_set."""
    torch.manual_seed(config.seed)
    model, _ = create_model(
        config.model_name,
        num_classes=data["num_classes"],
        in_chans=data["channels"],
        image_size=data["image_size"],
        pretrained=config.pretrained,
        stem=config.stem,
    )
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile(mode=config.compile_mode)
    optimizer = create_optimizer(model, config, config.mixed_precision or "no")
    set_lr(optimizer, peak_lr(config))
    return model.train(), optimizer


def loop(batches: Iterable[Any], config: Config, data: dict[str, Any], clock: StepClock) -> dict[str, Any]:
    """The shortest training loop in plain torch; returns the clock's figures.

    batches: endless pairs of images float [B, C, S, S] and labels int64 [B], on any device.
    """
    device = clock.device
    model, optimizer = make_model(config, data, device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    precision = config.mixed_precision or "no"
    half = HALVES.get(precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    for images, labels in waiting(batches, clock):
        images = images.to(device, non_blocking=True, memory_format=layout)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, half) if half else contextlib.nullcontext():
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if clock.step(len(labels)):
            break
    return clock.figures()


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def bare(settings: list[str], data: dict[str, Any], folder: str, **clock: Any) -> dict[str, Any]:
    """The loop on a few normalised batches that are already on the device: the time of the model alone."""
    config, device = read_config(settings), find_device()
    assert config.batch_size is not None
    shape = (config.batch_size, data["channels"], data["image_size"], data["image_size"])
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    batches: list[tuple[Tensor, Tensor]] = []
    for _ in range(RESIDENT_BATCHES):
        labels = torch.randint(data["num_classes"], (config.batch_size,))
        batches.append((torch.randn(shape).to(device, memory_format=layout), labels.to(device)))
    return loop(itertools.cycle(batches), config, data, StepClock(device, **clock))


def from_loader(
    make: Callable[..., Iterable[Any]],
    settings: list[str],
    data: dict[str, Any],
    workers: int,
    clock: dict[str, Any],
) -> dict[str, Any]:
    config, device = read_config(settings), find_device()
    assert config.batch_size is not None
    loader = make(data, config.augment, config.batch_size, workers, device)
    return loop(endless(loader), config, data, StepClock(device, **clock))


def plain(settings: list[str], data: dict[str, Any], workers: int, folder: str, **clock: Any) -> dict[str, Any]:
    """The loop with `datasets`, torchvision's transforms and torch's DataLoader."""
    return from_loader(plain_loader, settings, data, workers, clock)


def timm(settings: list[str], data: dict[str, Any], workers: int, folder: str, **clock: Any) -> dict[str, Any]:
    """The loop with timm's loader and its prefetcher, which normalises on the device."""
    return from_loader(timm_loader, settings, data, workers, clock)


def timm_script(
    settings: list[str], data: dict[str, Any], workers: int, folder: str, **clock: Any
) -> dict[str, Any]:
    """The training loop of timm's train.py, made of timm's parts, with the model and the optimizer of the other contenders.

    Like the script, it reads the loss of each step for its running mean, which waits for the device, and sets the learning
    rate by timm's scheduler (https://github.com/huggingface/pytorch-image-models/blob/main/train.py).
    """
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter, NativeScaler

    config, device = read_config(settings), find_device()
    assert config.batch_size is not None
    timer = StepClock(device, **clock)
    loader: Any = timm_loader(data, config.augment, config.batch_size, workers, device)
    model, optimizer = make_model(config, data, device)
    scheduler = CosineLRScheduler(optimizer, t_initial=1000 * len(loader), t_in_epochs=False)
    half = HALVES.get(config.mixed_precision or "no")
    scaler: Any = NativeScaler(device.type) if half == torch.float16 else None
    losses = AverageMeter()
    for number, (images, labels) in enumerate(waiting(endless(loader), timer), 1):
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, half) if half else contextlib.nullcontext():
            loss = cross_entropy(model(images), labels)
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        losses.update(loss.item(), len(labels))
        optimizer.zero_grad()
        scheduler.step_update(number, losses.avg)
        if timer.step(len(labels)):
            break
    return timer.figures()


def pytorch_accelerated(
    settings: list[str], data: dict[str, Any], workers: int, folder: str, **clock: Any
) -> dict[str, Any]:
    """pytorch-accelerated's Trainer with the plain loader (https://pytorch-accelerated.readthedocs.io)."""
    from accelerate import Accelerator
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import TrainerCallback

    config, device = read_config(settings), find_device()
    assert config.batch_size is not None
    batch_size, timer = config.batch_size, StepClock(device, **clock)
    loader: Any = plain_loader(data, config.augment, batch_size, workers, device)
    model, optimizer = make_model(config, data, device)

    class TimeUp(Exception):
        """Raised when the clock has ended."""

    class Timing(TrainerCallback):
        def on_train_step_end(self, trainer: Any, **kwargs: Any) -> None:
            if timer.step(batch_size):
                raise TimeUp

    class TimedTrainer(Trainer):
        def _create_accelerator(self) -> Accelerator:
            return Accelerator(mixed_precision=config.mixed_precision, cpu=device.type == "cpu")

        def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> Any:
            return loader

    trainer = TimedTrainer(model=model, loss_func=cross_entropy, optimizer=optimizer, callbacks=[Timing])
    try:
        trainer.train(loader.dataset, num_epochs=10**6, per_device_batch_size=batch_size)
    except TimeUp:
        pass
    return timer.figures()
