"""The plan of a run, printed before it starts and by --dry_run."""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from pipeline.common import console
from pipeline.data.image_dataset import ImageDataset
from pipeline.distributed.accelerator import system_facts
from pipeline.distributed.fsdp import blocks_of
from pipeline.models.timm_folder import starts_anew
from pipeline.optim.optimizers import lr_of_step, peak_lr
from pipeline.settings.batch_size import batch_size_at, largest_share, num_micro_batches, steps_per_epoch
from pipeline.settings.config import Config
from pipeline.training.build import Parts
from pipeline.training.given_weights import classifier_start

FIRST_CLASSES, LAST_CLASSES = 8, 3  # that the plan names


def plan_text(config: Config, parts: Parts, accelerator: Accelerator) -> str:
    """Dataset, model, optimizer, batch, device and folder; with dry_run also the parameter groups and a line per epoch."""
    data, shape = parts.dataset, parts.preprocessing
    facts = system_facts(accelerator)
    sizes = ", ".join(
        f"{len(split):,} {name}" for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    )
    num_parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    batch_size = batch_size_at(0, config)
    num_steps = steps_per_epoch(len(data.train), batch_size, config.drop_last)
    size = f"{shape.channels} x {shape.image_size} x {shape.image_size}"
    rows = [
        ("dataset", f"{config.dataset} ({data.source}): {sizes} images, {len(data.class_names)} classes"),
        ("classes", classes_text(data)),
        *(("", note) for note in data.notes),
        ("input", f"{size}, loader {loader_text(parts)}, augment {config.augment}"),
        ("model", f"{architecture(parts.model)}, {num_parameters:,} parameters"),
        *(("", line) for line in (str(parts.load_report).splitlines() if parts.load_report else [])),
        *([("classifier", classifier_text(config, parts))] if config.has_given_weights else []),
        ("optimizer", f"{config.optimizer}, lr {peak_lr(config):g}, schedule {config.scheduler}"),
        ("batch", f"{batch_size}, {console.plural(num_steps, 'step')} per epoch, {epochs_in_words(config)}"),
        (
            "device",
            f"{facts['device']}, processes: {facts['num_processes']}, mixed precision {facts['mixed_precision']}",
        ),
        *([("sharded", f"FSDP2, in {len(blocks_of(parts.skeleton))} blocks")] if parts.skeleton is not None else []),
        ("run", str(Path(config.run_dir))),
    ]
    text = console.table(rows)
    return (
        f"{text}\n\n{groups_text(parts)}\n\n{epochs_text(config, len(data.train), accelerator.num_processes)}"
        if config.dry_run
        else text
    )


def epochs_in_words(config: Config) -> str:
    if config.time_limit is None:
        return console.plural(config.num_epochs, "epoch")
    most = "" if config.epochs is None else f", at most {config.epochs}"
    return f"as many epochs as fit into {config.time_limit}{most}"


def classifier_text(config: Config, parts: Parts) -> str:
    """What head_init does with the classifier of given weights, and whether BatchNorm keeps its statistics."""
    choice, reason = classifier_start(parts.model, parts, config)
    if choice == "fitted":
        text = f"fitted to {min(config.head_init_samples, len(parts.dataset.train)):,} images before the first step"
    elif choice == "zero":
        text = f"set to zero{reason}"
    else:
        is_new = starts_anew(parts.model, parts.load_report, parts.dataset.class_names)
        text = "as it was drawn" if is_new else "that of the weights"
    return text + ("; BatchNorm keeps its statistics" if config.freeze_batchnorm else "")


def classes_text(data: ImageDataset) -> str:
    """Each class with its number of images in train, val and test; of many classes, the first and last few."""
    names, splits = data.class_names, (data.train, data.val, data.test)
    counts = np.stack([np.bincount(split.labels, minlength=len(names)) for split in splits], axis=1).tolist()
    texts = [f"{console.on_one_line(name)} {' '.join(f'{count:,}' for count in own)}" for name, own in zip(names, counts)]
    if len(texts) > FIRST_CLASSES + LAST_CLASSES + 1:
        texts = [*texts[:FIRST_CLASSES], "...", *texts[-LAST_CLASSES:]]
    return f"{'; '.join(texts)} (images in train, val, test)"


def loader_text(parts: Parts) -> str:
    """The kind of the training loader and, if decoded images stay on the device, the memory that they need there."""
    resident = sum(loader.resident_bytes for loader in set(parts.loaders.values()))
    kind = parts.loaders["train"].kind
    return f"{kind} ({max(resident / 2**20, 0.1):,.1f} MiB)" if resident else kind


def architecture(model: Any) -> str:
    return str(model.pretrained_cfg["architecture"])


def groups_text(parts: Parts) -> str:
    """A line per parameter group: number of tensors and parameters, learning-rate factor, weight decay."""
    lines = [f"{'parameter group':<24} {'tensors':>8} {'parameters':>12} {'lr factor':>10} {'weight decay':>13}"]
    for group in parts.optimizer.param_groups:
        numel = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<24} {len(group['params']):>8} {numel:>12,} {group['lr_scale']:>10g} {group['weight_decay']:>13g}"
        )
    return "\n".join(lines)


def epochs_text(config: Config, num_samples: int, num_processes: int) -> str:
    """A line per epoch: batch size, steps, learning rates of the first and last step, and micro-batches per step.

    The learning rates ignore plateaus, which are not known in advance. The micro-batches are those of the process with most.
    """
    if config.epochs is None:
        return "The number of epochs, and so the learning rates, are chosen after the first steps."
    lines = [f"{'epoch':>5} {'batch':>7} {'steps':>7} {'first lr':>16} {'last lr':>10} {'micro-batches':>14}"]
    for epoch in range(config.epochs):
        batch_size = batch_size_at(epoch, config)
        steps = steps_per_epoch(num_samples, batch_size, config.drop_last)
        first, last = (lr_of_step(epoch, batch, steps, [], config) for batch in (0, steps - 1))
        most = largest_share(min(batch_size, num_samples), num_processes)
        passes = num_micro_batches(most, config)
        lines.append(f"{epoch + 1:>5} {batch_size:>7} {steps:>7} {first:>16.4g} {last:>10.4g} {passes:>14}")
    if config.scheduler == "plateau":
        lines.append("(each plateau of the monitored value lowers the learning rate further)")
    return "\n".join(lines)
