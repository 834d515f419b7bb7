"""The image set that the settings name, loaded once per machine and checked."""

import dataclasses

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.common.system import usable_cores
from pipeline.data.bad_images import without_bad_images
from pipeline.data.image_dataset import ImageDataset, load_image_dataset
from pipeline.settings.config import Config


def load_data(config: Config, accelerator: Accelerator) -> ImageDataset:
    """The dataset; the first process of each machine fetches and prepares it, the others then find it in the cache.

    A stream leaves nothing in a cache: one process reads its labels and places, and sends them to the others.
    """
    if config.loader != "stream" or accelerator.num_processes == 1:
        with accelerator.local_main_process_first():
            return load_as_set(config, accelerator)
    found: list[ImageDataset | ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [load_as_set(config, accelerator)]
        except ValueError as error:
            found = [error]
    (dataset,) = broadcast_object_list(found)
    if isinstance(dataset, ValueError):
        raise dataset
    return dataset


def load_as_set(config: Config, accelerator: Accelerator) -> ImageDataset:
    """What the settings name, without bad images where that is asked for."""
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
    return leave_out_bad_images(dataset, config, accelerator) if config.on_bad_image == "skip" else dataset


def leave_out_bad_images(dataset: ImageDataset, config: Config, accelerator: Accelerator) -> ImageDataset:
    """The dataset without the images that cannot be decoded; all are decoded that are not known to be good."""
    channels, shown = input_channels(config, dataset), accelerator.is_main_process
    screened = without_bad_images([dataset.train, dataset.val, dataset.test], channels, usable_cores(), shown)
    train, val, test = screened.splits
    count = len(screened.complaints)
    notes = [*dataset.notes, f"{count:,} images cannot be decoded and are left out."] if count else dataset.notes
    return dataclasses.replace(dataset, train=train, val=val, test=test, notes=notes, bad_images=screened.complaints)


def input_channels(config: Config, dataset: ImageDataset) -> int:
    """Three for pretrained models, else as many as the set's images have."""
    return 3 if config.pretrained else dataset.channels
