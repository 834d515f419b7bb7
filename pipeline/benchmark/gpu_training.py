"""The parts of `gpu` that train: the tests marked gpu, fp16 beside fp32, and the time to an accuracy."""

import functools
import importlib.util
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pipeline
from pipeline.benchmark import finetune as finetuning
from pipeline.benchmark.children import PROJECT, run_child, running
from pipeline.benchmark.gpu_groups import Group, has_gpu, precisions_of
from pipeline.benchmark.measuring import Row, with_notes
from pipeline.common.stopping import TrainingFailed
from pipeline.common.system import usable_cores
from pipeline.settings.parser import read_config

RECIPES = Path(pipeline.__path__[0]) / "recipes"
TESTS = PROJECT / "tests" / "test_gpu.py"
# a run of seconds, long enough for the loss to fall
HALF_RUN = [
    *("--dataset=cifar10", "--model_name=resnet18", "--stem=small", "--max_train_samples=12800", "--epochs=2"),
    *("--batch_size=256", "--log_every=5"),
]
TOY_RUN = [
    *("--dataset=digits", "--model_name=simple_mlp", "--stem=auto", "--max_train_samples=96", "--epochs=1", "--batch_size=16"),
    *("--log_every=1", "--mixed_precision=no"),
]
PRECISION_ROWS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # the others are compared with the first
MICRO_BATCHES = 4
TINY_MODEL, TOY_SIDE = "test_efficientnet", 32


def tests(args: Namespace, settings: list[str]) -> Iterator[Group]:
    """The tests marked gpu, in this checkout."""
    yield Group("Tests marked gpu", TESTS.name, test_rows)


def test_rows() -> list[Row]:
    """A row with the numbers of passed, failed and skipped tests.

    Raises ValueError outside a checkout, or without pytest, and TrainingFailed if pytest ends without a report.
    """
    if not TESTS.is_file() or importlib.util.find_spec("pytest") is None:
        raise ValueError(f"The part tests needs a checkout with {TESTS.name}, and pytest. Choose other --parts.")
    began = time.monotonic()
    with TemporaryDirectory(prefix="benchmark-") as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", str(TESTS)]
        command += ["-n", str(min(usable_cores(), 8))] if importlib.util.find_spec("xdist") and has_gpu() else []
        status = run_tests(command)
        if not report.is_file():
            raise TrainingFailed(f"pytest ended with status {status} and without a report. Its output above has the reason.")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    seconds = time.monotonic() - began
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    row = {"row": TESTS.name, "unit": "seconds", "median": seconds, **run_child("gpu_child.device_facts", {})}
    return [{**row, "passed": passed, "failed": failed, "skipped_tests": counts["skipped"]}]


def run_tests(command: Sequence[str]) -> int:
    """Runs pytest with its output in the terminal; returns its exit status."""
    with running(command, cwd=PROJECT) as process:
        return process.wait()


def half(optimizer: str, args: Namespace, settings: list[str]) -> Iterator[Group]:
    """fp16 and bf16 beside fp32, which is always measured, with and without SAM and gradient accumulation."""
    given = [*(TOY_RUN if args.rehearse else HALF_RUN), f"--optimizer={optimizer}", *settings]
    precisions = [precision for precision in PRECISION_ROWS if precision in ("no", *precisions_of(args))]
    micro_batch = (16 if args.rehearse else 256) // MICRO_BATCHES
    for sam, sam_flags in {"": [], ", SAM": ["--sam_rho=0.05"]}.items():
        for accumulation, flags in {"": [], f", {MICRO_BATCHES} micro-batches": [f"--micro_batch_size={micro_batch}"]}.items():
            name = f"{optimizer}{sam}{accumulation}"
            row_names = [f"{name}, {PRECISION_ROWS[precision]}" for precision in precisions]
            arguments = {"settings": [*given, *sam_flags, *flags], "precisions": precisions, "row_names": row_names}
            measure = functools.partial(rows_of_child, "gpu_child.compare_precisions", arguments)
            yield Group("Half precision, SAM and gradient accumulation", name, measure, frozenset(row_names))


def rows_of_child(function: str, arguments: Row) -> list[Row]:
    rows: list[Row] = run_child(function, arguments)["rows"]
    return rows


def finetune(args: Namespace, settings: list[str]) -> Iterator[Group]:
    """The table of `benchmark finetune`; in a rehearsal a tiny model on synthetic images."""
    optimizers, peers = ["sgd", "adam", "adamw", "muon"], ["fastai", "timm", "plain"]
    own = Namespace(optimizers=optimizers, peers=peers, fastai_python=None, rounds=args.rounds)
    if args.rehearse:
        own.optimizers, own.peers = ["adamw"], ["plain"]

    def measure() -> list[Row]:
        with TemporaryDirectory(prefix="benchmark-") as folder:
            (section,) = finetuning.sections(own, [*(toy_task(Path(folder)) if args.rehearse else []), *settings])
        return with_notes(section)

    config = read_config(finetuning.with_defaults(settings))
    what = f"{config.model_name}, {config.dataset}, {config.image_size} pixels, batch {config.batch_size}"
    yield Group(f"Fine-tuning from given weights: {what}, {config.num_epochs} epochs", "", measure)


def toy_task(folder: Path) -> list[str]:
    """Settings for a synthetic set and the weights of a tiny model, both written below the folder."""
    photos, weights = folder / "photos", folder / "weights"
    photos.mkdir()
    run_child("sets.make_set", {"set_folder": str(photos), "num_images": 40, "side": TOY_SIDE})
    run_child("gpu_child.save_tiny_model", {"target": str(weights), "model_name": TINY_MODEL, "side": TOY_SIDE})
    sizes = [f"--image_size={TOY_SIDE}", "--batch_size=8", "--epochs=2", "--val_fraction=0.25", "--num_workers=0"]
    return [f"--dataset={photos}", f"--init_from={weights}", f"--model_name={TINY_MODEL}", *sizes]


def target_94(args: Namespace, settings: list[str]) -> Iterator[Group]:
    return target("cifar10_gpu.yaml", 0.94, args, settings)


def target_95(args: Namespace, settings: list[str]) -> Iterator[Group]:
    return target("cifar10_muon.yaml", 0.95, args, settings)


def target(recipe: str, accuracy: float, args: Namespace, settings: list[str]) -> Iterator[Group]:
    """A recipe, a group for each seed: the seconds of training, and whether the test accuracy is reached."""
    given = [f"--config={RECIPES / recipe}", *(TOY_RUN if args.rehearse else []), *settings]
    for seed in range(args.seeds):
        arguments = {"settings": [*given, f"--seed={seed}"], "name": f"{recipe}, seed {seed}", "target": accuracy}
        measure = functools.partial(rows_of_child, "gpu_child.train_and_test", arguments)
        yield Group(f"Time to {accuracy:.0%} test accuracy with mirror images", f"{recipe}, seed {seed}", measure)
