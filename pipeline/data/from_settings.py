"""Loads the dataset that the settings name, once per machine."""

import dataclasses

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.common.system import usable_cores
from pipeline.data import image_dataset
from pipeline.data.bad_images import without_bad_images
from pipeline.data.image_dataset import ImageDataset, load_image_dataset
from pipeline.settings.config import Config


def load_data(config: Config, accelerator: Accelerator) -> ImageDataset:
    """The dataset of the settings. All ranks must call it. The first process of each machine fills the cache for the others.

    A streamed dataset is not cached: rank 0 reads its labels and the places of its images, and broadcasts them.
    """
    if config.loader != "stream" or accelerator.num_processes == 1:
        with accelerator.local_main_process_first():
            return load_here(config, accelerator)
    found: list[ImageDataset | ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [load_here(config, accelerator)]
        except ValueError as error:
            found = [error]
    (dataset,) = broadcast_object_list(found)
    if isinstance(dataset, ValueError):
        raise dataset
    return dataset


def load_here(config: Config, accelerator: Accelerator) -> ImageDataset:
    """The dataset of the settings; without bad images if on_bad_image is skip."""
    dataset = load_image_dataset(
        config.dataset,
        label_column=config.label_column,
        hub_config=config.hub_config,
        val_fraction=config.val_fraction,
        seed=config.seed,
        max_train_samples=config.max_train_samples,
        skip_bad_headers=config.on_bad_image == "skip",
        streamed=config.loader == "stream",
    )
    return skip_bad_images(dataset, config, accelerator) if config.on_bad_image == "skip" else dataset


def load_for_evaluation(config: Config, split: str | None, accelerator: Accelerator) -> tuple[ImageDataset, str]:
    """As image_dataset.load_for_evaluation, without bad images if on_bad_image is skip. All ranks must call it."""
    with accelerator.local_main_process_first():
        columns = {"label_column": config.label_column, "hub_config": config.hub_config}
        dataset, split = image_dataset.load_for_evaluation(config.dataset, split, **columns)
        return skip_bad_images(dataset, config, accelerator) if config.on_bad_image == "skip" else dataset, split


def skip_bad_images(dataset: ImageDataset, config: Config, accelerator: Accelerator) -> ImageDataset:
    """The dataset without the images that cannot be decoded. Decodes all images that are not recorded as good."""
    channels, shown = input_channels(config, dataset), accelerator.is_main_process
    screened = without_bad_images([dataset.train, dataset.val, dataset.test], channels, usable_cores(), shown)
    train, val, test = screened.splits
    count = len(screened.messages)
    notes = [*dataset.notes, f"{count:,} images cannot be decoded and are skipped."] if count else dataset.notes
    return dataclasses.replace(dataset, train=train, val=val, test=test, notes=notes, bad_images=screened.messages)


def input_channels(config: Config, dataset: ImageDataset) -> int:
    """3 for pretrained models, else the number of channels of the images."""
    return 3 if config.pretrained else dataset.channels
