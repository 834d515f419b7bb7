"""Fine-tuning by peers: a plain torch loop, and the recipe of timm's train.py; both read class folders and draw the head."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.benchmark.peers.loops import find_device
from pipeline.benchmark.stepclock import device_name
from pipeline.models.create import create_model, input_settings
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

# the only command for fine-tuning in timm's documentation: --opt adamw --lr 1e-4 --weight-decay 0.01
# (https://huggingface.co/docs/timm/training_script); all else by the defaults of train.py, without its 5 epochs of warm-up
TIMM_DOCUMENTED = {"opt": "adamw", "lr": 1e-4, "weight_decay": 0.01}
# the defaults of timm's train.py: SGD with 0.1 per 256 images
TIMM_SGD_LR, TIMM_SGD_IMAGES = 0.1, 256
TIMM_SGD = {"opt": "sgd", "momentum": 0.9, "weight_decay": 2e-5}
TIMM_SMOOTHING, TIMM_JITTER = 0.1, 0.4

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What the peers train on. photos: a folder with the class folders of train, val and test; began: when the process started,
    in seconds since 1970.
    """

    settings: list[str]
    photos: str
    num_classes: int
    image_size: int
    seed: int
    workers: int
    began: float

    @property
    def config(self) -> Config:
        return read_config(self.settings)


class Timeline:
    """The weights and the seconds since the start at the end of each epoch; epoch 0 is the moment before the first step."""

    def __init__(self, model: nn.Module, began: float):
        self.model, self.began = model, began
        self.moments: list[tuple[float, dict[str, Tensor]]] = []

    def mark(self) -> None:
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.moments.append((time.time() - self.began, weights))

    def tested(self, test: Batches, device: torch.device) -> dict[str, Any]:
        """The test accuracy of each moment, calculated after the training so that it takes none of its time."""
        epochs = []
        for epoch, (seconds, weights) in enumerate(self.moments):
            self.model.load_state_dict(weights)
            epochs.append({"epoch": epoch, "seconds": seconds, "test_accuracy": accuracy(self.model, test, device)})
        final = epochs[-1]["test_accuracy"]
        return {"epochs": epochs, "test_accuracy": final, "device": device_name(device), "threads": torch.get_num_threads()}


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches, device: torch.device) -> float:
    """The share of images whose largest logit is that of the label."""
    model.eval()
    correct, count = 0, 0
    for images, labels in batches:
        correct += int((model(images.to(device)).argmax(dim=1).cpu() == labels.cpu()).sum())
        count += len(labels)
    return correct / count


def model_with_drawn_head(task: Task, device: torch.device) -> nn.Module:
    """The model with the given weights and a new classifier by timm's initialisation."""
    config = task.config
    torch.manual_seed(task.seed)
    model, _ = create_model(
        config.model_name,
        num_classes=task.num_classes,
        image_size=task.image_size,
        pretrained=config.pretrained,
        stem=config.stem,
        init_from=config.init_from,
    )
    model.reset_classifier(task.num_classes)  # type: ignore[operator]
    return model.to(device)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: dict[str, Batches],
    task: Task,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> dict[str, Any]:
    """Trains, validates after each epoch, and returns the figures of the timeline. after_epoch: called with 1 after the first."""
    device = next(model.parameters()).device
    timeline = Timeline(model, task.began)
    timeline.mark()
    for epoch in range(task.config.num_epochs):
        model.train()
        for images, labels in batches["train"]:
            loss(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracy(model, batches["val"], device)
        after_epoch(epoch + 1)
        timeline.mark()
    return timeline.tested(batches["test"], device)


def plain(folder: str, **given: Any) -> dict[str, Any]:
    """The loop of a tutorial: torchvision's ImageFolder and transforms, and AdamW with torch's default arguments."""
    from torchvision import datasets, transforms

    task, device = Task(**given), find_device()
    model = model_with_drawn_head(task, device)
    theirs = input_settings(model)
    to_input = [transforms.ToTensor(), transforms.Normalize(theirs.mean, theirs.std)]
    crop = [transforms.RandomResizedCrop(task.image_size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(int(task.image_size / theirs.crop_pct)), transforms.CenterCrop(task.image_size)]
    batches: dict[str, Batches] = {}
    for split in ("train", "val", "test"):
        training = split == "train"
        transform = transforms.Compose([*(crop if training else centre), *to_input])
        batches[split] = torch.utils.data.DataLoader(
            datasets.ImageFolder(str(Path(task.photos) / split), transform),
            task.config.batch_size,
            shuffle=training,
            drop_last=training,
            num_workers=task.workers,
        )
    return fit(model, torch.optim.AdamW(model.parameters()), batches, task)


def timm_batches(task: Task, model: nn.Module, device: torch.device) -> dict[str, Batches]:
    """timm's loaders of train, val and test, as train.py makes them by default."""
    from timm.data import ImageDataset, create_loader

    theirs = input_settings(model)
    batches: dict[str, Batches] = {}
    for split in ("train", "val", "test"):
        training = split == "train"
        batches[split] = create_loader(
            ImageDataset(str(Path(task.photos) / split)),
            input_size=(3, task.image_size, task.image_size),
            batch_size=task.config.batch_size,
            is_training=training,
            color_jitter=TIMM_JITTER,
            interpolation="random" if training else theirs.interpolation,
            mean=theirs.mean,
            std=theirs.std,
            crop_pct=theirs.crop_pct,
            num_workers=task.workers,
            persistent_workers=task.workers > 0,
            device=device,
        )
    return batches


def timm_recipe(folder: str, optimizer: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The parts that timm's train.py puts together, with its defaults; optimizer: arguments of timm's create_optimizer_v2."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    task, device = Task(**given), find_device()
    model = model_with_drawn_head(task, device)
    made = create_optimizer_v2(model, **optimizer)
    scheduler, _ = create_scheduler_v2(made, sched="cosine", num_epochs=task.config.num_epochs)
    return fit(
        model, made, timm_batches(task, model, device), task, LabelSmoothingCrossEntropy(TIMM_SMOOTHING), scheduler.step
    )


def timm_documented(**given: Any) -> dict[str, Any]:
    """The arguments that timm's documentation gives for fine-tuning."""
    return timm_recipe(optimizer=TIMM_DOCUMENTED, **given)


def timm_defaults(**given: Any) -> dict[str, Any]:
    """The default optimizer of timm's train.py, with its default rate for this batch size."""
    batch_size = read_config(given["settings"]).batch_size or 1
    return timm_recipe(optimizer={**TIMM_SGD, "lr": TIMM_SGD_LR * batch_size / TIMM_SGD_IMAGES}, **given)
