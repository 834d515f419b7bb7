"""A saved model's figures on a split: its own run's, or another set's with the classes matched by name."""

import argparse
import dataclasses
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.common import console
from pipeline.data.from_settings import load_data
from pipeline.data.image_dataset import ImageDataset, check_dataset_name
from pipeline.distributed.accelerator import fit_to_machine, make_accelerator, system_facts, with_channels_last
from pipeline.images.decode import BadImage
from pipeline.inference.saved_model import SavedModel, load_saved_model
from pipeline.loaders.build import make_loader
from pipeline.settings.command_line import CommandFailed
from pipeline.settings.config import Config
from pipeline.training.evaluation import evaluate
from pipeline.training.metrics import calibration_error, per_class_accuracy, zero_calibration

DEFAULT_BATCH_SIZE = 64  # of models that come without a run


class Answers(nn.Module):
    """A model's logits in the order of a set's classes; with flip, those of the mean probabilities of both images.

    order: for each class of the set, the model's class, int64 [num_classes]; None leaves the order as it is.
    """

    def __init__(self, model: nn.Module, order: Tensor | None, flip: bool) -> None:
        super().__init__()
        self.model, self.order, self.flip = model, order, flip

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if self.flip:
            both = torch.stack([logits, self.model(images.flip(3))]).double().log_softmax(dim=2)
            logits = both.logsumexp(dim=0).sub(torch.log(both.new_tensor(2.0))).float()
        return logits if self.order is None else logits[:, self.order]


def evaluate_saved(args: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of `python -m pipeline.evaluate` on the first rank, None on others; every rank calls it.

    Raises ValueError for what does not fit together, CommandFailed for an image that cannot be read.
    """
    if args.dataset is not None:
        check_dataset_name(args.dataset)
    saved = load_saved_model(args.model)
    config = settings_of(saved, args)
    accelerator = make_accelerator(config, args.device)
    dataset = load_data(config, accelerator)
    if accelerator.is_main_process:
        for note in dataset.notes if args.dataset is not None else []:
            console.warn(note)
    order = class_order(saved, dataset, shown=accelerator.is_main_process)
    preprocessing = saved.preprocessing
    if args.dataset is None:  # folders of earlier versions do not say it
        preprocessing = dataclasses.replace(preprocessing, source_size=dataset.image_size)
    config = with_channels_last(config, saved.model, accelerator)
    model = fit_to_machine(saved.model, config, accelerator)
    answers = Answers(model, order if order is None else order.to(accelerator.device), args.tta == "flip")
    split = getattr(dataset, args.split)
    calibration = zero_calibration(accelerator.device)
    try:
        loader = make_loader(config, split, dataset, preprocessing, accelerator, training=False)
        with accelerator.local_main_process_first():  # as in training: the others find what it decoded
            loader.load()
        start = perf_counter()
        figures, confusion = evaluate(answers, loader, accelerator, calibration)
        seconds = perf_counter() - start
    except BadImage as error:
        raise CommandFailed(str(error)) from error
    result = {
        "model": args.model,
        "dataset": config.dataset,
        "split": args.split,
        "tta": args.tta,
        **figures,
        "expected_calibration_error": calibration_error(accelerator.reduce(calibration)),
        "images_per_second": round(figures["num_samples"] / seconds, 1),
        "per_class_accuracy": dict(zip(dataset.class_names, per_class_accuracy(confusion))),
        "confusion_matrix": confusion.tolist(),
        **system_facts(accelerator),
    }
    return result if accelerator.is_main_process else None


def settings_of(saved: SavedModel, args: argparse.Namespace) -> Config:
    """The run's settings, or the defaults, with what the command line says about data and speed.

    Raises ValueError when there is no dataset, or options that only another one can have.
    """
    if args.dataset is None and saved.config is None:
        raise ValueError(f"{args.model} is no run, so it has no dataset of its own. Name one with --dataset.")
    of_set = {name: getattr(args, name) for name in ("label_column", "hub_config")}
    given = [name for name, value in of_set.items() if value is not None]
    if args.dataset is None and given:
        raise ValueError(f"--{given[0]} goes with --dataset; without it the run's own set is evaluated as it was.")
    config = saved.config or Config(micro_batch_size=DEFAULT_BATCH_SIZE)
    changes: dict[str, Any] = {"gradient_checkpointing": False, "log_with": None}
    changes["mixed_precision"] = args.mixed_precision or precision_of(saved.run_dir) or config.mixed_precision
    if args.batch_size is not None:
        changes["micro_batch_size"] = args.batch_size
    if args.num_workers is not None:
        changes["num_workers"] = args.num_workers
    if args.dataset is not None:
        changes |= {"dataset": args.dataset, "max_train_samples": None, "loader": "auto", **of_set}
        changes["val_fraction"] = Config().val_fraction
    return dataclasses.replace(config, **changes)


def precision_of(run_dir: Path | None) -> str | None:
    """The precision that a run was tested in, whoever chose it; None where no run says."""
    path = None if run_dir is None else run_dir / "summary.json"
    return json.loads(path.read_text()).get("mixed_precision") if path is not None and path.is_file() else None


def class_order(saved: SavedModel, dataset: ImageDataset, shown: bool) -> Tensor | None:
    """For each class of the set the number of the model's class of that name, int64 [num_classes]; None: as they are.

    Names are the model's label names or their descriptions. Where neither are the set's, classes are matched by number,
    which is warned about if `shown`. Raises ValueError when the numbers of classes differ.
    """
    theirs = dataset.class_names
    if saved.num_classes != len(theirs):
        raise ValueError(
            f"{saved.source} tells {saved.num_classes} classes apart and {dataset.name} has {len(theirs)} "
            f"({', '.join(theirs[:5])}{', ...' if len(theirs) > 5 else ''}). Take a set or a model with the same classes."
        )
    for ours in (saved.label_names or [], saved.shown_names):
        if ours == theirs:
            return None
        if len(set(ours)) == len(theirs) and set(ours) == set(theirs):
            return torch.tensor([ours.index(name) for name in theirs])
    if shown:
        pairs = zip(saved.shown_names, theirs)
        number, (name, other) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
        console.warn(
            f"The classes of {saved.source} and {dataset.name} have other names (class {number} is {name!r} and "
            f"{other!r}): they are matched by number."
        )
    return None
