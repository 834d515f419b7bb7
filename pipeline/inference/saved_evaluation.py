"""Evaluates a saved model on a split of its run's dataset, or of another dataset with classes matched by name."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pipeline.common import console
from pipeline.data.fingerprint import dataset_folder, fingerprint
from pipeline.data.from_settings import load_data, load_for_evaluation
from pipeline.data.image_dataset import ImageDataset, check_dataset_name
from pipeline.data.shards import StreamedSplit
from pipeline.data.splits import Split, joined
from pipeline.distributed.accelerator import fit_to_machine, make_accelerator, system_facts, with_channels_last
from pipeline.images.decode import BadImage
from pipeline.inference.class_matching import ClassMatch, match_classes
from pipeline.inference.saved_model import SavedModel, load_saved_model
from pipeline.loaders.build import make_loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.run_folder.dataset_record import check_own_dataset, differences, read_record
from pipeline.settings.command_line import CommandFailed
from pipeline.settings.config import Config
from pipeline.training.evaluation import evaluate
from pipeline.training.metrics import calibration_error, class_figures, zero_calibration, zero_class_counts

DEFAULT_BATCH_SIZE = 64  # for models without a run


class EvaluatedModel(nn.Module):
    """A model with its logits in the order of a dataset's classes.

    order: the model's class for each class of the dataset, int64 [num_classes]; None keeps the order. flip: average the
    probabilities of each image and its mirror image. loss: as in SavedModel.
    """

    def __init__(self, model: nn.Module, order: Tensor | None, flip: bool, loss: str = "cross_entropy") -> None:
        super().__init__()
        self.model, self.order, self.flip, self.loss = model, order, flip, loss

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if self.flip:
            both = torch.stack([logits, self.model(images.flip(3))]).double()
            if self.loss == "bce":  # the logit of the mean: log p - log(1 - p)
                logits = (logsigmoid(both).logsumexp(dim=0) - logsigmoid(-both).logsumexp(dim=0)).float()
            else:
                logits = both.log_softmax(dim=2).logsumexp(dim=0).sub(math.log(2)).float()
        return logits if self.order is None else logits[:, self.order]


@dataclasses.dataclass(frozen=True)
class OnSplit:
    """A saved model on its device, with the loader of a split in the model's preprocessing.

    match: how the classes were matched; num_left_out: images of the split whose class the model lacks.
    """

    accelerator: Accelerator
    dataset: ImageDataset
    model: nn.Module
    loader: AnyLoader
    split: str
    match: ClassMatch
    num_left_out: int


def put_on_split(
    saved: SavedModel, config: Config, split: str | None, *, device: str = "auto", own_set: bool = True, flip: bool = False
) -> OnSplit:
    """Loads the dataset of the settings and matches its classes to those of the model. Every rank must call it.

    own_set: whether it is the dataset of the model's run; flip: as in EvaluatedModel. split: train, val, test or all; None is
    test, of another dataset without splits all. Raises ValueError if model and dataset do not fit together or the run's
    dataset has changed, CommandFailed for an image that cannot be read.
    """
    accelerator = make_accelerator(config, device)
    if own_set:
        dataset, split = load_data(config, accelerator), split or "test"
        if saved.run_dir is not None:
            check_own_dataset(saved.run_dir, {"given": config.dataset, **fingerprint(dataset)})
        images = all_images(dataset) if split == "all" else getattr(dataset, split)
    else:
        dataset, split = load_for_evaluation(config, split, accelerator)
        images = dataset.test
    match = match_classes(saved, dataset.class_names, dataset.name)
    scored = match.scored(images)
    if accelerator.is_main_process:
        for note in [] if own_set else [*dataset.notes, *match.warnings(saved, dataset.name)]:
            console.warn(note)
    preprocessing = saved.preprocessing
    if own_set:  # folders of earlier versions lack source_size
        preprocessing = dataclasses.replace(preprocessing, source_size=dataset.image_size)
    config = with_channels_last(config, saved.model, accelerator)
    model = fit_to_machine(saved.model, config, accelerator)
    order = None if match.is_identity else torch.tensor(match.order, device=accelerator.device)
    evaluated = EvaluatedModel(model, order, flip, saved.loss)
    dataset = dataclasses.replace(dataset, class_names=match.names)
    try:
        loader = make_loader(config, scored, dataset, preprocessing, accelerator, training=False)
        with accelerator.local_main_process_first():  # as in training: the other ranks read its cache
            loader.load()
    except BadImage as error:
        raise CommandFailed(str(error)) from error
    return OnSplit(accelerator, dataset, evaluated.eval(), loader, split, match, len(images) - len(scored))


def all_images(dataset: ImageDataset) -> Split:
    """The training, validation and test images, each once. Raises ValueError for a stream."""
    if isinstance(dataset.test, StreamedSplit):
        raise ValueError("--split all is not supported for a run with loader stream. Evaluate train, val and test.")
    same = dataset.val.table is dataset.test.table and np.array_equal(dataset.val.table_rows, dataset.test.table_rows)
    return joined([dataset.train, dataset.test] if same else [dataset.train, dataset.val, dataset.test], "all")


def evaluate_saved(args: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of `python -m pipeline.evaluate` on rank 0, None on other ranks. Every rank must call it.

    Raises ValueError if model, dataset and options do not fit together, CommandFailed for an image that cannot be read.
    """
    if args.dataset is not None:
        check_dataset_name(args.dataset)
    saved = load_saved_model(args.model)
    config = settings_of(saved, args)
    moved = settings_of_moved(saved, args)
    config, own_set, flip = moved or config, args.dataset is None or moved is not None, args.tta == "flip"
    on_split = put_on_split(saved, config, args.split, device=args.device, own_set=own_set, flip=flip)
    accelerator, dataset = on_split.accelerator, on_split.dataset
    calibration = zero_calibration(accelerator.device)
    classes = zero_class_counts(len(dataset.class_names), accelerator.device)
    start = perf_counter()
    try:
        figures = evaluate(on_split.model, on_split.loader, accelerator, classes, calibration, loss=saved.loss)
    except BadImage as error:
        raise CommandFailed(str(error)) from error
    seconds = perf_counter() - start
    result = {
        "model": args.model,
        "dataset": config.dataset,
        "split": on_split.split,
        "tta": args.tta,
        **figures,
        "expected_calibration_error": calibration_error(accelerator.reduce(calibration)),
        "images_per_second": round(figures["num_samples"] / seconds, 1),
        **class_figures(accelerator.reduce(classes), dataset.class_names),
        "classes": on_split.match.facts(on_split.num_left_out),
        **system_facts(accelerator),
    }
    return result if accelerator.is_main_process else None


def settings_of_moved(saved: SavedModel, args: argparse.Namespace) -> Config | None:
    """The run's settings, if --dataset is the folder to which the dataset of the run has moved, else None.

    Every rank must call it.
    """
    folder = None if args.dataset is None else dataset_folder(args.dataset)
    record = None if saved.run_dir is None else read_record(saved.run_dir)
    if saved.config is None or record is None or record["path"] is None or folder is None or args.label_column is not None:
        return None
    config = settings_of(saved, argparse.Namespace(**{**vars(args), "dataset": None, "hub_config": None}))
    config = dataclasses.replace(config, dataset=folder)
    try:
        dataset = load_data(config, make_accelerator(config, args.device))
    except ValueError:  # another dataset, for example too small for the settings of the run
        return None
    return None if differences(record, fingerprint(dataset)) else config


def settings_of(saved: SavedModel, args: argparse.Namespace) -> Config:
    """The settings of the run, or the defaults, with the data and speed options of the command line.

    Raises ValueError if there is no dataset, or for an option that requires --dataset.
    """
    if args.dataset is None and saved.config is None:
        raise ValueError(f"{args.model} is not a run and has no dataset. Pass one with --dataset.")
    of_set = {name: getattr(args, name) for name in ("label_column", "hub_config")}
    given = [name for name, value in of_set.items() if value is not None]
    if args.dataset is None and given:
        raise ValueError(f"--{given[0]} requires --dataset; without it the run's dataset is evaluated with the run's settings.")
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
    """The precision of the run's test, from its summary.json; None if there is none."""
    path = None if run_dir is None else run_dir / "summary.json"
    return json.loads(path.read_text()).get("mixed_precision") if path is not None and path.is_file() else None
