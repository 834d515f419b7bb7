"""What the values of settings must and must not be, each alone and together."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.settings.config import DEFAULTS, FIELDS, Config

LONGEST_NAME = 255  # of a file or folder, in bytes


def check_limits(config: Config) -> None:
    """Raises ValueError if a number is outside the limits of its field or settings contradict each other."""
    holds = {
        "above": lambda value, bound: value > bound,
        "at_least": lambda value, bound: value >= bound,
        "at_most": lambda value, bound: value <= bound,
        "below": lambda value, bound: value < bound,
    }
    for name, field in FIELDS.items():
        value = getattr(config, name)
        for word, bound in field.metadata["limits"].items():
            if isinstance(value, (int, float)) and not holds[word](value, bound):
                raise ValueError(f"Setting {name} is {value}; it must be {word.replace('_', ' ')} {bound}.")
    for wrong, message in contradictions(config):
        if wrong:
            raise ValueError(message)


def contradictions(config: Config) -> Iterable[tuple[bool, str]]:
    """Each combination of settings that is refused: whether config has it, and the message for it."""
    schedule = config.batch_size_schedule
    epochs = config.num_epochs if config.time_limit_seconds is None else math.inf  # it may choose fewer epochs than these need
    steps = config.step_epochs if isinstance(config.step_epochs, list) else [config.step_epochs or 1.0]
    yield config.pretrained and config.init_from is not None, (
        "pretrained and init_from both select the initial weights. Set only one of them."
    )
    yield config.epochs == 0 and not config.has_given_weights, (
        "epochs 0 trains nothing. It needs weights to start from: --pretrained true or --init_from."
    )
    yield 0 < epochs <= config.warmup_epochs and config.warmup_epochs != DEFAULTS.warmup_epochs, (
        f"warmup_epochs {config.warmup_epochs} must be below epochs {epochs}."
    )
    yield any(epoch < 1 or size < 1 for epoch, size in schedule.items()), (
        f"batch_size_schedule {schedule} must map epochs of at least 1 to batch sizes of at least 1. "
        "Set the batch size of epoch 0 with batch_size."
    )
    yield epochs > 0 and any(epoch >= epochs for epoch in schedule), (
        f"batch_size_schedule {schedule} has an entry after the end of the run. Its epochs must be below epochs {epochs}."
    )
    yield config.loader == "stream" and config.on_bad_image == "skip", (
        "loader stream does not support on_bad_image skip, which decodes every image before training. Repair or remove the bad "
        "images, or use loader workers."
    )
    yield config.loader == "stream" and config.sampler == "balanced", (
        "loader stream does not support sampler balanced: a stream reads each shard once per epoch and cannot repeat images. Use "
        "class_weights balanced, or loader workers."
    )
    yield config.class_weights == "balanced" and config.sampler == "balanced", (
        "class_weights balanced and sampler balanced together would correct twice. Set only one of them."
    )
    yield config.compile_mode is not None and (config.micro_batch_size is not None or config.uses_sam), (
        "compile reduce-overhead needs one pass per step, but micro_batch_size and SAM make several. Use compile true."
    )
    yield not all(step > 0 for step in steps) or steps != sorted(steps), (
        f"step_epochs {config.step_epochs} must be above 0, and a list must be in ascending order."
    )
    yield config.run_name is not None and not is_folder_name(config.run_name), (
        f"run_name {config.run_name!r} must be a plain folder name of at most {LONGEST_NAME} bytes. Set the folder that contains "
        "it with output_dir."
    )


def is_folder_name(name: str) -> bool:
    """Whether it names a folder directly below another one, on one line and short enough for file systems."""
    is_line = name.splitlines() == [name] and "\0" not in name
    return is_line and Path(name).name == name != ".." and len(os.fsencode(name)) <= LONGEST_NAME


def ignored_settings(config: Config) -> list[str]:
    """A sentence for each setting that differs from its default and has no effect because of another setting."""
    needs = {
        "gamma": ("scheduler step or plateau", config.scheduler in ("step", "plateau")),
        "step_epochs": ("scheduler step", config.scheduler == "step"),
        "plateau_patience": ("scheduler plateau", config.scheduler == "plateau"),
        "min_lr_scale": ("scheduler plateau, cosine or linear", config.scheduler in ("plateau", "cosine", "linear")),
        "batch_lr_scaling": ("a batch_size_schedule", bool(config.batch_size_schedule)),
        "shuffle_buffer": ("loader stream", config.loader == "stream"),
        "num_workers": ("loader workers", config.loader != "device"),
        "log_model": ("log_with wandb", "wandb" in (config.log_with or []) or "WANDB_SWEEP_ID" in os.environ),
        "head_init": ("pretrained or init_from", config.has_given_weights),
        "head_init_samples": (
            "a classifier to fit: pretrained or init_from, and head_init auto or fitted",
            config.has_given_weights and config.head_init in ("auto", "fitted"),
        ),
        "flip": ("an augment other than none", config.augment != "none"),
    }
    sentences = [
        f"{name} {getattr(config, name)} has no effect: it needs {need}."
        for name, (need, met) in needs.items()
        if not met and getattr(config, name) != getattr(DEFAULTS, name)
    ]
    return sentences if config.time_limit is not None else sentences + shortened(config)


def shortened(config: Config) -> list[str]:
    """A sentence for each setting of the schedule that does not fit into the number of epochs."""
    epochs, warmup = config.num_epochs, config.warmup_epochs
    unused = sorted(start for start in config.batch_size_schedule if start >= epochs)
    sentences = []
    if warmup != DEFAULTS.warmup_epochs and warmup > epochs / 2:
        sentences.append(f"warmup_epochs {warmup:g} is shortened to half of the run, {epochs / 2:g} epochs.")
    if unused:
        sentences.append(f"batch_size_schedule from epoch {unused[0]} on has no effect: the run has {epochs} epochs.")
    return sentences
