"""The child processes of `gpu`: several contenders or runs in one process, because each start costs seconds."""

import gc
import importlib
import json
from argparse import Namespace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pipeline.benchmark.measuring import Row, in_turns
from pipeline.benchmark.stepclock import device_name
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

CURVE_POINTS = 4  # of a loss curve in a table


def start_afresh() -> None:
    """Frees what the last contender left: Accelerate's settings, compiled code, and the memory of the GPU with its peak."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()  # a model in a circle of references would keep its memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def take_turns(calls: dict[str, list[Any]], rounds: int, folder: str) -> dict[str, Any]:
    """The results of contenders over `rounds` rounds, in turns. calls: module.function and arguments, by row name."""
    numbers = iter(range(rounds * len(calls)))

    def call(name: str, arguments: Row) -> Row:
        start_afresh()
        own = Path(folder) / str(next(numbers))
        own.mkdir()
        module, _, function = name.rpartition(".")
        result: Row = getattr(importlib.import_module(f"pipeline.benchmark.{module}"), function)(**arguments, folder=str(own))
        return result

    by_name = {name: lambda given=given: call(*given) for name, given in calls.items()}
    return {"results": in_turns(by_name, rounds)}


def optimizer_steps(own: Row, folder: str) -> dict[str, Any]:
    """The rows of whole training steps, see optimizers.whole_steps. own: the arguments of `benchmark optimizers`."""
    from pipeline.benchmark import optimizers

    start_afresh()
    args = Namespace(**own)
    accelerator = optimizers.make_accelerator(args)
    model, images, labels = optimizers.make_model_and_batch(args, accelerator)
    return {"rows": optimizers.whole_steps("", model, images, labels, args, accelerator).rows}


def train(settings: list[str], run_name: str, folder: str) -> tuple[Config, dict[str, Any]]:
    """Trains in this process; returns the settings and the summary."""
    from pipeline.training import loop

    start_afresh()
    config = read_config([*settings, f"--output_dir={folder}", f"--run_name={run_name}", "--resume=never"])
    summary = loop.train(config)
    return config, summary


def compare_precisions(settings: list[str], precisions: list[str], row_names: list[str], folder: str) -> Row:
    """A row for each precision: loss curve, validation accuracy, skipped steps, distance from the first precision.

    The loss curve has the mean losses of CURVE_POINTS equal parts of the run. distance: the largest difference of two
    points, relative to the first precision's; None if every step of one of them was skipped.
    """
    rows: list[Row] = []
    reference: list[float] = []
    for precision, name in zip(precisions, row_names):
        config, summary = train([*settings, f"--mixed_precision={precision}"], precision, folder)
        losses = logged_losses(config)
        reference = reference or losses
        rows.append(
            {
                "row": name,
                "losses": losses,
                "loss_curve": parts_of(losses),
                "distance": max((abs(a / b - 1) for a, b in zip(parts_of(losses), parts_of(reference))), default=None),
                "val_accuracy": summary["best"]["accuracy"],
                "skipped_steps": summary["skipped_steps"],
                "steps": summary["steps"],
                "gpu_memory_bytes": summary["peak_memory_bytes"] if torch.cuda.is_available() else None,
                **device_facts(),
            }
        )
    return {"rows": rows}


def logged_losses(config: Config) -> list[float]:
    """The losses of the training lines of a run that have one: every line whose steps were not all skipped."""
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train" and "event" not in line and "loss" in line]


def parts_of(losses: list[float]) -> list[float]:
    """The means of CURVE_POINTS equal parts of the losses, or all losses if they are fewer."""
    number = min(CURVE_POINTS, len(losses)) or 1
    bounds = [round(part * len(losses) / number) for part in range(number + 1)]
    return [fmean(losses[start:stop]) for start, stop in zip(bounds, bounds[1:]) if stop > start]


def device_facts(folder: str | None = None) -> Row:
    """The name of the device and the number of CPU threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"device": device_name(device), "threads": torch.get_num_threads()}


def train_and_test(settings: list[str], name: str, target: float, folder: str) -> Row:
    """A row for one run: seconds of training, seconds of the whole run, test accuracy without and with mirror images."""
    from pipeline.inference.saved_evaluation import evaluate_saved

    config, summary = train(settings, "run", folder)
    start_afresh()
    options = dict.fromkeys(("dataset", "split", "label_column", "hub_config", "batch_size", "num_workers", "mixed_precision"))
    flipped = evaluate_saved(Namespace(model=str(config.run_dir), tta="flip", device="auto", **options))
    assert flipped is not None
    seconds = summary["samples"] / summary["images_per_second"]
    row = {
        **{"row": name, "unit": "seconds of training", "median": seconds},
        "whole_seconds": summary["seconds"],
        "test_accuracies": [summary["test"]["accuracy"]],
        "flip_accuracies": [flipped["accuracy"]],
        "reached": "yes" if flipped["accuracy"] >= target else "no",
        **{"epochs": summary["epochs"], "images_per_second": summary["images_per_second"]},
        **device_facts(),
    }
    return {"rows": [row]}


def save_tiny_model(target: str, model_name: str, side: int, folder: str) -> Row:
    """Writes the timm folder of a tiny model with random weights, to rehearse fine-tuning."""
    import timm

    from pipeline.models.timm_folder import save_model

    kept: Row = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "readme": ""}
    model = timm.create_model(model_name, num_classes=2)
    save_model(model, Path(target), label_names=["a", "b"], image_size=side, in_chans=3, **kept)
    return {}
