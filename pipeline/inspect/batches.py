"""The first training batches, exactly as a run with the same settings makes them."""

import dataclasses

from pipeline.data.fingerprint import with_absolute_paths
from pipeline.distributed.accelerator import make_accelerator, with_precision
from pipeline.settings.batch_size import batch_size_at, steps_per_epoch
from pipeline.settings.config import Config
from pipeline.training.build import Parts, assemble, check_settings
from pipeline.training.samples import batch_png

NUM_BATCHES = 2


def parts_of_run(config: Config) -> Parts:
    """The parts of a run with these settings. Raises ValueError as a run does, and for a stream."""
    if config.loader == "stream":
        raise ValueError("Inspection reads images in any order, which loader stream does not support. Use --loader auto.")
    check_settings(config)
    accelerator = make_accelerator(config)
    config = with_absolute_paths(with_precision(config, accelerator))
    # the batches do not depend on the number of workers, and starting them takes longer than decoding two batches
    num_workers = config.num_workers if config.loader == "device" else 0
    return assemble(dataclasses.replace(config, num_workers=num_workers, compile=False), accelerator)


def first_batches(parts: Parts) -> list[bytes]:
    """A picture of each of the first NUM_BATCHES training batches of the first epoch, as PNG. Raises BadImage."""
    loader = parts.loaders["train"]
    batch_size = batch_size_at(0, parts.config)
    number = min(NUM_BATCHES, steps_per_epoch(len(loader), batch_size, parts.config.drop_last))
    batches = loader.train_epoch(0, batch_size, number)
    return [batch_png(batch, parts.preprocessing, parts.dataset.class_names) for batch in batches]
