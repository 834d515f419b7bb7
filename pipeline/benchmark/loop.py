"""`loop`: images per second from encoded images to updated weights, compared with the bare loop and the peers."""

from argparse import Namespace
from collections.abc import Iterator

from pipeline.benchmark.contenders import (
    BARE,
    FAST,
    MADE,
    OURS,
    OURS_CONTIGUOUS,
    PEERS,
    check_comparable,
    contenders,
    peer_data,
    prepared,
)
from pipeline.benchmark.measuring import Row, Section, column, in_turns, largest, summarise
from pipeline.common.console import plural
from pipeline.settings.parser import read_config

MEMORY_NOTE = (
    "Peak memory: the largest sampled PSS of the process and its workers; pages shared with other programs count by their "
    "share."
)


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """One table. Each measurement runs in a new process, one at a time, so that memory is measured per contender."""
    clock = {"warmup_steps": args.warmup_steps, "seconds": args.seconds}
    with prepared(args, settings) as (settings, environment, folder):
        config = read_config(settings)
        name = MADE if environment else config.dataset
        check_comparable(config)
        data = peer_data(settings, environment, folder)
        results = in_turns(contenders(args, settings, environment, data, clock), args.rounds)
    extras = {
        name: {key: largest(of_name, key) for key in ("peak_memory_bytes", "gpu_memory_bytes")}
        | {key: of_name[-1][key] for key in ("device", "threads")}
        for name, of_name in results.items()
    }
    title = (
        f"{config.model_name}, {name}: {data['num_images']:,} images to {data['image_size']}x{data['image_size']}, "
        f"batch {config.batch_size}, mixed precision {config.mixed_precision or 'no'}, "
        f"peers with {plural(args.peer_workers, 'worker')}"
    )
    rows = summarise(column(results, "images_per_second"), "images/s", BARE, extras)
    yield Section(title, rows, "images/s", [*beside_peers(rows), MEMORY_NOTE])


def beside_peers(rows: list[Row]) -> list[str]:
    """The speed of ours relative to each peer."""
    medians = {row["row"]: row["median"] for row in rows}
    peers = [name for name in PEERS.values() if name in medians]
    return [
        f"{ours}: " + ", ".join(f"{medians[ours] / medians[peer]:.2f} times {peer}" for peer in peers)
        for ours in (OURS, OURS_CONTIGUOUS, FAST)
        if ours in medians and peers
    ]
