"""`startup`: seconds from the start of the process to the end of the first step, and the import time by package."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from pipeline.benchmark.children import run_child, run_program
from pipeline.benchmark.contenders import contender, installed_peers, peer_data, prepared
from pipeline.benchmark.measuring import Row, Section, column, in_turns, summarise
from pipeline.settings.parser import read_config

BARE = "bare script with timm"
CLOCK = {"warmup_steps": 1, "seconds": 0.0}  # only the first step matters
BARE_SCRIPT = Path(__file__).parent / "peers" / "bare_script.py"
IMPORT_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", re.MULTILINE)
MOST_ROWS = 12


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """A table of seconds to the first step, and one of milliseconds of our imports by package."""
    with prepared(args, settings) as (settings, environment, folder):
        config = read_config(settings)
        data = peer_data(settings, environment, folder)
        peers_cache = {"HF_DATASETS_CACHE": str(folder / "peers")}

        def bare_script() -> Row:
            given = {"model_name": config.model_name, "batch_size": config.batch_size}
            given |= {key: data[key] for key in ("image_size", "channels", "num_classes")}
            result_path = folder / "bare.json"
            return run_program(
                [sys.executable, "-P", str(BARE_SCRIPT), json.dumps(given), str(result_path)], result_path
            )

        def first_start() -> Row:
            cache = {"HF_DATASETS_CACHE": str(folder / f"cache-{len(list(folder.iterdir()))}")}
            return run_child("ours.train", {"settings": settings, **CLOCK}, environment=cache)

        embedded = [*settings, "--dataset=digits"]
        calls = {
            BARE: bare_script,
            "ours, embedded digits": contender("ours.train", embedded, environment, CLOCK),
            "ours, this set, from its cache": contender("ours.train", settings, environment, CLOCK),
        }
        if environment:  # a synthetic set, which can have a new cache
            calls["ours, this set, first start"] = first_start
        for function, name in installed_peers().items():
            calls[name] = contender(f"peers.loops.{function}", settings, peers_cache, CLOCK, data=data, workers=0)
        calls["ours, this set, from its cache"]()  # fills the cache
        results = in_turns(calls, args.rounds)
        timed = run_child(
            "ours.train", {"settings": settings, **CLOCK}, options=["-X", "importtime"], environment=environment
        )
    title = f"start to the end of the first step, {config.model_name}, {data['num_images']:,} images, batch {config.batch_size}"
    yield Section(title, summarise(column(results, "seconds_to_start"), "seconds", BARE), "seconds")
    rows = import_rows(timed["stderr"])
    yield Section("imports of ours by package, without the packages that these import", rows, "ms")


def import_rows(output: str) -> list[Row]:
    """The total import time and the packages with the longest, from the output of `-X importtime`."""
    found = [(name, int(microseconds) / 1000) for microseconds, name in IMPORT_LINE.findall(output)]
    packages = sorted({name for name, _ in found})
    own = {package: [ms for name, ms in found if name == package] for package in packages}
    longest = sorted(own, key=lambda package: -sum(own[package]))[:MOST_ROWS]
    samples = {"all": [sum(ms for _, ms in found)], **{package: [sum(own[package])] for package in longest}}
    modules = {"all": {"modules": len(found)}, **{package: {"modules": len(own[package])} for package in longest}}
    return summarise(samples, "ms", "all", modules)
