"""Builds the parts of a run from its settings: dataset, preprocessing, loaders, model, optimizer."""

import dataclasses

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.common.randomness import address
from pipeline.data.from_settings import input_channels, load_data
from pipeline.data.image_dataset import ImageDataset, check_dataset_name
from pipeline.distributed import fsdp
from pipeline.distributed.accelerator import fit_to_machine, will_be_sharded, with_channels_last
from pipeline.distributed.sync_batchnorm import has_batchnorm
from pipeline.images.preprocessing import Preprocessing
from pipeline.loaders.build import make_loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.models.create import (
    InputSettings,
    check_model_name,
    create_model,
    default_image_size,
    input_settings,
    unseen_rows,
)
from pipeline.models.timm_folder import LoadReport, starts_anew
from pipeline.optim.ema import create_ema
from pipeline.optim.optimizers import check_optimizer_name, create_optimizer, ignored_optimizer_settings
from pipeline.optim.schedule import check_scheduler_name
from pipeline.optim.trial import check_optimizer_args
from pipeline.settings.batch_size import fitting_batch_size
from pipeline.settings.checks import ignored_settings
from pipeline.settings.config import Config
from pipeline.training.micro_batch import check_batchnorm, with_micro_batch_size
from pipeline.training.tracking import tracker_names

INITIAL_WEIGHTS = 3  # purpose in the addresses of randomness


def check_settings(config: Config) -> None:
    """Checks what can be checked before data is loaded or a device is used. Raises ValueError."""
    check_scheduler_name(config.scheduler)
    check_optimizer_name(config.optimizer)
    check_optimizer_args(config)
    check_dataset_name(config.dataset)
    check_model_name(config.model_name)
    tracker_names(config)


def warnings_of(config: Config) -> list[str]:
    """A sentence for each setting that has no effect."""
    return ignored_settings(config) + ignored_optimizer_settings(config)


def choose_image_size(config: Config, dataset: ImageDataset) -> int:
    """image_size; if null, the dataset's size if it is small and the model is not pretrained, else the model's default."""
    if config.image_size is not None:
        return config.image_size
    if dataset.image_size is not None and not config.pretrained:
        return dataset.image_size
    return default_image_size(config.model_name, config.pretrained)


def make_model(config: Config, dataset: ImageDataset, image_size: int) -> tuple[nn.Module, LoadReport | None]:
    """The model on the CPU and, if weights were loaded, the report about them. Initial weights depend on the seed only."""
    torch.manual_seed(address(config.seed, INITIAL_WEIGHTS))
    return create_model(
        config.model_name,
        num_classes=len(dataset.class_names),
        in_chans=input_channels(config, dataset),
        image_size=image_size,
        pretrained=config.pretrained,
        stem=config.stem,
        init_from=config.init_from,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
    )


def make_fitting_model(config: Config, dataset: ImageDataset) -> tuple[int, nn.Module, LoadReport | None, list[str]]:
    """The input size, the model of make_model for it, and a note if its patches do not cover the image.

    The size of small images is then rounded up to a multiple of the patches, the model's own size is kept, and an image_size
    of the settings raises ValueError.
    """
    image_size, channels = choose_image_size(config, dataset), input_channels(config, dataset)
    model, report = make_model(config, dataset, image_size)
    unseen, patch = unseen_rows(model, channels, image_size)
    if not unseen:
        return image_size, model, report, []
    text = f"{config.model_name} does not see the last {unseen} rows and columns of {image_size} x {image_size} images"
    fitting = [size for size in (image_size // patch * patch, -(-image_size // patch) * patch) if size]
    if config.image_size is not None:
        sizes = " or ".join(map(str, fitting))
        raise ValueError(f"{text}: its patches cover multiples of {patch} pixels. Use --image_size {sizes}.")
    if image_size != dataset.image_size:
        return image_size, model, report, [f"{text}, the size that it was made for."]
    model, report = make_model(config, dataset, fitting[-1])
    return fitting[-1], model, report, [f"{text}: they are enlarged to {fitting[-1]} x {fitting[-1]}."]


def with_batchnorm(config: Config, model: nn.Module, report: LoadReport | None, dataset: ImageDataset) -> Config:
    """The settings with freeze_batchnorm filled in: true for given weights with BatchNorm whose classifier starts anew.

    The new images would replace the statistics that the weights were trained with after a few batches of a few images.
    """
    if config.freeze_batchnorm is not None:
        return config
    is_frozen = has_batchnorm(model) and starts_anew(model, report, dataset.class_names)
    return dataclasses.replace(config, freeze_batchnorm=is_frozen)


def make_preprocessing(config: Config, dataset: ImageDataset, image_size: int, model: nn.Module) -> Preprocessing:
    """The preprocessing: normalised as the published weights require if pretrained, else by the dataset's mean and std."""
    theirs: InputSettings = input_settings(model)
    channels = input_channels(config, dataset)
    mean, std = (theirs.mean, theirs.std) if config.pretrained else (dataset.mean, dataset.std)
    small = dataset.image_size is not None
    return Preprocessing(
        image_size=image_size,
        channels=channels,
        mean=mean if len(mean) == channels else mean * channels,
        std=std if len(std) == channels else std * channels,
        interpolation=theirs.interpolation,
        crop_pct=1.0 if small else theirs.crop_pct,
        source_size=dataset.image_size,
        grey_max=dataset.grey_max,
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    config: the settings with batch_size, channels_last and micro_batch_size filled in; loaders: this rank's loaders of the
    train, val and test splits; skeleton: the model without weights if the model is sharded, else None.
    """

    config: Config
    dataset: ImageDataset
    preprocessing: Preprocessing
    model: nn.Module
    load_report: LoadReport | None
    optimizer: torch.optim.Optimizer
    loaders: dict[str, AnyLoader]
    ema: ModelEmaV3 | None
    skeleton: nn.Module | None = None


def assemble(config: Config, accelerator: Accelerator) -> Parts:
    """Loads the data and builds loaders, model and optimizer. Raises ValueError for parts that do not fit together."""
    dataset = load_data(config, accelerator)
    if config.monitor == "roc_auc" and len(dataset.class_names) != 2:
        raise ValueError(
            f"monitor roc_auc needs two classes, and {config.dataset} has {len(dataset.class_names)}. Use balanced_accuracy or "
            "macro_f1."
        )
    if config.batch_size is None:
        config = dataclasses.replace(config, batch_size=fitting_batch_size(len(dataset.train)))
    with accelerator.local_main_process_first():  # pretrained weights are downloaded once per machine
        image_size, model, load_report, note = make_fitting_model(config, dataset)
    dataset = dataclasses.replace(dataset, notes=[*dataset.notes, *note])
    config = with_batchnorm(with_channels_last(config, model, accelerator), model, load_report, dataset)
    model = fit_to_machine(model, config, accelerator)
    preprocessing = make_preprocessing(config, dataset, image_size, model)
    loaders = {
        "train": make_loader(config, dataset.train, dataset, preprocessing, accelerator, training=True),
        "val": make_loader(config, dataset.val, dataset, preprocessing, accelerator, training=False),
    }
    if dataset.test is dataset.val:
        loaders["test"] = loaders["val"]
    else:
        loaders["test"] = make_loader(config, dataset.test, dataset, preprocessing, accelerator, training=False)
    resident_bytes = sum(loader.resident_bytes for loader in set(loaders.values()))
    config = with_micro_batch_size(config, model, preprocessing, resident_bytes, accelerator)
    check_batchnorm(config, model, preprocessing, len(dataset.train), accelerator)
    for loader in loaders.values():
        loader.eval_batch_size = config.images_at_once or loader.eval_batch_size
    ema, skeleton = create_ema(model, config), None
    if will_be_sharded(accelerator):
        skeleton = fsdp.skeleton_of(model)
        for whole in [model] if ema is None else [model, ema.module]:
            fsdp.shard(whole, accelerator.device)
    optimizer = create_optimizer(model, config, accelerator.mixed_precision)
    return Parts(config, dataset, preprocessing, model, load_report, optimizer, loaders, ema, skeleton)


def load_images(parts: Parts, accelerator: Accelerator) -> None:
    """Decodes the images that stay on the device, on the first process of each machine; the others read its cache.

    Raises BadImage.
    """
    with accelerator.local_main_process_first():
        for loader in parts.loaders.values():
            loader.load()
