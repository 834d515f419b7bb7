"""`loaders`: images per second of the loaders alone, ours and the peers', for small PNG images and for JPEG photos."""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.benchmark.children import run_child
from pipeline.benchmark.contenders import MADE, prepared
from pipeline.benchmark.measuring import Row, Section, in_turns, summarise
from pipeline.benchmark.sets import PHOTO_SIZE
from pipeline.common.console import plural
from pipeline.settings.parser import read_config

DEVICE = "ours, device"
FEWEST_BATCHES = 8  # per epoch, so that the start and the end of an epoch do not dominate
SETTINGS = ["--model_name=simple_mlp"]  # only determines the preprocessing


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """A table per kind of image, or one for a given dataset; ratios refer to timm's loader with the most workers."""
    dataset = read_config([f"--dataset={MADE}", *settings]).dataset
    kinds = kinds_of(args)
    if dataset != MADE:
        kinds = {dataset: Kind(args.batch_size * FEWEST_BATCHES)}
    for title, kind in kinds.items():
        yield section_of(title, kind, args, settings)


@dataclass(frozen=True)
class Kind:
    """A synthetic set: square PNG images of `side` pixels, or JPEG photos if it is None; and settings for it."""

    num_images: int
    side: int | None = None
    settings: tuple[str, ...] = ()


def kinds_of(args: Namespace) -> dict[str, Kind]:
    """The synthetic sets, by the titles of their tables."""
    width, height = PHOTO_SIZE
    return {
        f"PNG {args.made_size}x{args.made_size}": Kind(args.num_images, args.made_size),
        f"JPEG {width}x{height} to 224x224": Kind(args.num_photos, settings=("--image_size=224",)),
    }


def section_of(title: str, kind: Kind, args: Namespace, settings: list[str]) -> Section:
    """The table of one kind of image."""
    own = Namespace(num_images=kind.num_images, made_size=kind.side)
    batch_size = min(args.batch_size, max(kind.num_images // FEWEST_BATCHES, 1))
    given = [*SETTINGS, f"--batch_size={batch_size}", *kind.settings, *settings]
    with prepared(own, given) as (complete, environment, folder):
        parquet = str(folder / "peers.parquet")
        arguments = {"settings": complete, "parquet": parquet, "workers": args.workers, "seconds": args.seconds}
        environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
        turns = in_turns({title: lambda: run_child("loaders.measure", arguments, environment=environment)}, args.rounds)
    results = turns[title]
    samples = {name: [result["rates"][name] for result in results] for name in results[0]["rates"]}
    extras: dict[str, Row] = {
        name: {"device": results[0]["device"], "threads": results[0]["threads"]} for name in samples
    }
    reference = f"timm, {plural(max(args.workers), 'worker')}"
    rows = summarise(samples, "images/s", reference, extras)
    return Section(f"{title}, batches of {results[0]['batch_size']}", rows, "images/s")


def measure(settings: list[str], parquet: str, workers: list[int], seconds: float, folder: str) -> dict[str, Any]:
    """Runs in a child process. Returns images per second of each loader on the set, measured one after another.

    Each loader first runs one epoch as a warm-up, in which its workers start, then whole epochs for `seconds`.
    """
    import torch

    from pipeline.benchmark.peers.loaders import plain_loader, timm_loader
    from pipeline.benchmark.sets import peer_set
    from pipeline.benchmark.stepclock import device_name
    from pipeline.distributed.accelerator import make_accelerator
    from pipeline.training.build import assemble

    data = peer_set(settings, parquet, folder)
    config = read_config(settings)
    assert config.batch_size is not None
    accelerator = make_accelerator(config)
    device, num_batches = accelerator.device, data["num_images"] // config.batch_size

    def ours(*more: str) -> Callable[[], Iterator[Any]]:
        loader = assemble(read_config([*settings, *more]), accelerator).loaders["train"]
        epochs = itertools.count()
        return lambda: loader.train_epoch(next(epochs), config.batch_size or 1, num_batches)

    def theirs(make: Callable[..., Any], count: int) -> Callable[[], Iterator[Any]]:
        loader = make(data, config.augment, config.batch_size, count, device)
        return lambda: (images.to(device, non_blocking=True) for images, _ in loader)

    rates: dict[str, float] = {}
    if data["source_size"] is not None:
        rates[DEVICE] = rate(ours("--loader=device"), config.batch_size, seconds, device)
    for count in workers:
        for name, epoch in {
            "ours": ours("--loader=workers", f"--num_workers={count}"),
            "datasets and torchvision": theirs(plain_loader, count),
            "timm": theirs(timm_loader, count),
        }.items():
            rates[f"{name}, {plural(count, 'worker')}"] = rate(epoch, config.batch_size, seconds, device)
    return {
        "rates": rates,
        "batch_size": config.batch_size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def rate(epoch: Callable[[], Iterator[Any]], batch_size: int, seconds: float, device: Any) -> float:
    """Images per second over whole epochs, without the first."""
    from pipeline.benchmark.stepclock import wait_for

    images, began = 0, time.perf_counter()
    for number in range(10**6):
        if number == 1:
            wait_for(device)
            images, began = 0, time.perf_counter()
        elif number > 1 and time.perf_counter() - began >= seconds:
            break
        images += batch_size * sum(1 for _ in epoch())
        wait_for(device)
    return images / (time.perf_counter() - began)
