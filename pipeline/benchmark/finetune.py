"""`finetune`: test accuracy against seconds from given weights: ours by defaults, fastai, timm's recipe and a plain loop."""

import itertools
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.benchmark.children import run_child, run_program
from pipeline.benchmark.measuring import Row, Section, in_turns, largest
from pipeline.common.system import usable_cores
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

DEFAULTS = [
    *("--dataset=oxford_iiit_pet", "--model_name=tf_efficientnet_lite0"),
    *("--image_size=128", "--batch_size=16", "--epochs=3"),
]
FASTAI = "fastai's fine_tune"
# rows of the peers that run in this environment, and their functions in peers.finetuning
HERE = {
    "timm": {
        "timm's train.py, AdamW as documented": "timm_documented",
        "timm's train.py, SGD by default": "timm_defaults",
    },
    "plain": {"plain loop, AdamW": "plain"},
}
FASTAI_SCRIPT = Path(__file__).parent / "peers" / "fastai_script.py"
INSTALL = "python3 -m venv fastai && fastai/bin/pip install fastai timm, then add --fastai_python fastai/bin/python"
NOTE = (
    "Seconds: from the start of the process, with the imports and each epoch's validation, without the test. Epoch 0 is the "
    "model before the first step. Ours ends with the epoch that is best on the validation images, the others with their last."
)


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """One table, with a line of test accuracy over time for each contender. Each round is a seed, each run a new process."""
    settings = with_defaults(settings)
    config = read_config(settings)
    check(config, args)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        photos = {"photos": name}
        found = run_child("sets.class_folders", {"settings": settings, **photos})
        task = photos | {key: found[key] for key in ("num_classes", "image_size")}
        calls, skipped = contenders(args, settings, task)
        results = in_turns({name: seeded(call, config.seed) for name, call in calls.items()}, args.rounds)
    rows = [summary_row(name, of_name) for name, of_name in results.items()]
    title = (
        f"{config.model_name}, {config.dataset}: {found['num_train']:,} training, {found['num_val']:,} validation and "
        f"{found['num_test']:,} test images to {found['image_size']}x{found['image_size']}, batch {config.batch_size}, "
        f"{config.num_epochs} epochs"
    )
    notes = [NOTE, *beside_peers(rows), *(f"{row['row']}: {row['skipped']}" for row in skipped)]
    yield Section(title, rows + skipped, "test accuracy", notes, paths=True)


def with_defaults(settings: list[str]) -> list[str]:
    """The settings after the defaults of this benchmark; the weights are the published ones unless init_from is given."""
    given = read_config(settings)
    weights = [] if given.init_from else ["--pretrained=true"]
    return [*DEFAULTS, *weights, *settings]


def check(config: Config, args: Namespace) -> None:
    """Raises ValueError for settings with which the comparison would not be fair, or that a peer does not support."""
    if not config.pretrained and not config.init_from:
        raise ValueError("finetune starts from given weights. Set --pretrained true or --init_from.")
    if config.val_fraction == 0:
        raise ValueError(
            "val_fraction 0 selects the best epoch on the test images, so its test accuracy would be too high. Use a fraction "
            "above 0."
        )
    if config.time_limit is not None:
        raise ValueError("finetune compares equal numbers of epochs, and time_limit may lower ours. Set --epochs alone.")
    if config.num_epochs < 2 and "fastai" in args.peers:
        raise ValueError("fastai's fine_tune trains one epoch with a frozen model first. Use --epochs 2 or more.")
    if args.fastai_python is not None and not args.fastai_python.is_file():
        raise ValueError(f"--fastai_python {args.fastai_python} does not exist. Install it: {INSTALL}.")


def contenders(
    args: Namespace, settings: list[str], task: dict[str, Any]
) -> tuple[dict[str, Callable[[int], Row]], list[Row]]:
    """A function of the seed for each contender that is installed, and the rows of those that are not."""
    calls: dict[str, Callable[[int], Row]] = {}
    for optimizer in args.optimizers:
        own = [*settings, f"--dataset={task['photos']}", f"--optimizer={optimizer}"]
        own += ["--label_column=null", "--hub_config=null", "--max_train_samples=null"]  # the folders have what they select
        calls[f"ours, {optimizer}"] = partial(run_ours, own)
    python = args.fastai_python or (Path(sys.executable) if find_spec("fastai") else None)
    skipped: list[Row] = []
    if "fastai" in args.peers:
        if python is None:
            skipped.append({"row": FASTAI, "skipped": f"not installed. {INSTALL}."})
        else:
            calls[FASTAI] = partial(run_fastai, python, settings, task)
    for peer, functions in HERE.items():
        if peer in args.peers:
            calls |= {name: partial(run_peer, function, settings, task) for name, function in functions.items()}
    return calls, skipped


def seeded(call: Callable[[int], Row], first: int) -> Callable[[], Row]:
    """The call with the next seed each time."""
    seeds = itertools.count(first)
    return lambda: call(next(seeds))


def run_ours(settings: list[str], seed: int) -> Row:
    return run_child("ours.finetune", {"settings": [*settings, f"--seed={seed}"], "began": time.time()})


def run_peer(function: str, settings: list[str], task: dict[str, Any], seed: int) -> Row:
    arguments = {"settings": settings, **task, "seed": seed, "workers": usable_cores(), "began": time.time()}
    return run_child(f"peers.finetuning.{function}", arguments)


def run_fastai(python: Path, settings: list[str], task: dict[str, Any], seed: int) -> Row:
    """Runs the script with the given Python, with the weights under the name that timm needs there."""
    config = read_config(settings)
    given = {**task, "seed": seed, "workers": usable_cores(), "batch_size": config.batch_size, "epochs": config.num_epochs}
    given["weights"] = config.model_name if config.init_from is None else f"local-dir:{timm_folder(Path(config.init_from))}"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result_path = Path(folder) / "result.json"
        script = [str(python), "-P", str(FASTAI_SCRIPT), json.dumps({**given, "began": time.time()}), str(result_path)]
        return run_program(script, result_path)


def timm_folder(source: Path) -> Path:
    """The timm folder of init_from, which may name a run or the file of the weights."""
    if source.is_file():
        return source.parent
    return source / "model" if (source / "model").is_dir() else source


def summary_row(name: str, results: list[Row]) -> Row:
    """The figures of a contender over the seeds.

    test_accuracies: of each seed; run_seconds: mean and standard deviation (None for one seed); points: both figures by epoch.
    """
    epochs = [[result["epochs"][place] for result in results] for place in range(min(len(r["epochs"]) for r in results))]
    points = [
        {
            "epoch": of_epoch[0]["epoch"],
            "seconds": spread([point["seconds"] for point in of_epoch]),
            "test_accuracy": spread([point["test_accuracy"] for point in of_epoch]),
        }
        for of_epoch in epochs
    ]
    return {
        "row": name,
        "n": len(results),
        "test_accuracies": [result["test_accuracy"] for result in results],
        "run_seconds": points[-1]["seconds"],
        "points": points,
        "peak_memory_bytes": largest(results, "peak_memory_bytes"),
        **{key: results[-1][key] for key in ("device", "threads", "fastai") if key in results[-1]},
    }


def spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def beside_peers(rows: list[Row]) -> list[str]:
    """A sentence for each row of ours: by how many points its mean test accuracy exceeds that of each peer."""
    means = {row["row"]: 100 * statistics.fmean(row["test_accuracies"]) for row in rows}
    ours = [name for name in means if name.startswith("ours")]
    peers = [name for name in means if name not in ours]
    return [
        f"{name}: {', '.join(f'{means[name] - means[peer]:+.2f} points against {peer}' for peer in peers)}"
        for name in ours
        if peers
    ]
