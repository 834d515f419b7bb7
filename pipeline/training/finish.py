"""The end of a run: tests the best weights once, saves them as a timm folder, writes summary.json, prints the closing table."""

import math
import resource
import sys
from typing import Any

import timm
import torch
from accelerate import Accelerator

from pipeline.common import console
from pipeline.common.stopping import TrainingFailed
from pipeline.distributed.fsdp import load_weights, with_weights
from pipeline.distributed.shared_failure import wait_for_all
from pipeline.models.timm_folder import save_model
from pipeline.optim.schedule import best_epoch, best_kind
from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoint_path, read_tensors
from pipeline.settings.config import Config
from pipeline.training.build import Parts
from pipeline.training.confident_mistakes import ConfidentMistakes
from pipeline.training.evaluation import evaluate
from pipeline.training.metrics import class_figures, uneven_sizes, zero_class_counts
from pipeline.training.model_card import model_card
from pipeline.training.run import LOWER_RATE, Run
from pipeline.training.state import TrainState
from pipeline.training.tracker_pictures import send_results, takes_pictures

WEIGHTS = {"val": "model", "val_ema": "ema"}  # the checkpoint's file with the weights of this validation


def finish(state: TrainState, parts: Parts, run: Run, status: str) -> dict[str, Any]:
    """Tests the best weights, writes model/ and summary.json, and returns the summary. Every rank must call it."""
    accelerator = run.accelerator
    run.finish_saving()
    best = run.best_checkpoint(state)
    if best is None:
        raise TrainingFailed(
            f"No epoch's validation {run.config.monitor} was finite, so there is no best epoch. {LOWER_RATE}; this requires "
            f"{run.new_run()}."
        )
    model = state.bare_model
    entry = state.history[best_epoch(state.history, run.config) or 0]
    try:
        weights = read_tensors(best, WEIGHTS[best_kind(entry, run.config)])
    except BadCheckpoint as error:
        raise TrainingFailed(
            f"The checkpoint of the best epoch, {entry['epoch']}, is lost: {error}. Restore it and resume, or "
            f"start {run.new_run(checkpoint_path(run.config.run_dir, state.step))}, the weights of the last epoch."
        ) from error
    load_weights(model, weights)
    classes = zero_class_counts(len(parts.dataset.class_names), accelerator.device)
    mistakes = ConfidentMistakes() if takes_pictures(run) else None
    more: dict[str, Any] = {"signals": run.signals, "mistakes": mistakes, "loss": run.config.loss}
    test_figures = evaluate(model, parts.loaders["test"], accelerator, classes, **more)
    run.read_clock(state)
    summary = make_summary(state, run, status)
    summary["test"] = {"epoch": summary["best"]["epoch"], **test_figures}
    run.log("test", state, summary["best"]["epoch"], test_figures)
    summary["test"] |= class_figures(accelerator.reduce(classes), parts.dataset.class_names)
    if accelerator.is_main_process:
        save_model(
            model if parts.skeleton is None else with_weights(parts.skeleton, weights),
            run.config.run_dir / "model",
            label_names=parts.dataset.class_names,
            image_size=parts.preprocessing.image_size,
            in_chans=parts.preprocessing.channels,
            mean=parts.preprocessing.mean,
            std=parts.preprocessing.std,
            interpolation=parts.preprocessing.interpolation,
            crop_pct=parts.preprocessing.crop_pct,
            readme=model_card(run.config, parts, summary),
            source_size=parts.preprocessing.source_size,
            grey_max=parts.preprocessing.grey_max,
            has_own_probabilities=run.config.loss == "bce",
        )
    if mistakes is not None:
        shown = mistakes.gathered(parts.preprocessing, accelerator)
        send_results(run, summary["test"], parts.dataset.class_names, shown, state.step)
    run.end(summary)
    return summary


def stop(state: TrainState, run: Run, status: str, reason: str) -> None:
    """Ends a run early, writes summary.json and prints the command that resumes it.

    status: "interrupted" (every rank must call it and returns together; the state is saved first) or "failed" (a single rank may
    call it).
    """
    if status == "interrupted":
        try:
            if run.submitted != state.step:
                run.save(state)
            run.finish_saving()
        except TrainingFailed as error:
            console.warn(str(error))
    elif run.writer is not None:
        run.writer.join()
    try:
        run.end(make_summary(state, run, status) | {"reason": reason})
    except OSError as error:
        console.warn(f"summary.json could not be written: {error}.")
    if run.writer is not None:
        step = run.writer.last_saved
        saved = f"Saved at step {step}" if step >= 0 else "Nothing was saved yet"
        console.say(f"\n{saved}. {run.resume_command()}")
    if status == "interrupted":
        wait_for_all()  # until rank 0 has written summary.json


def make_summary(state: TrainState, run: Run, status: str) -> dict[str, Any]:
    """The object of summary.json, without the test figures."""
    best = best_epoch(state.history, run.config)
    entry = None if best is None else state.history[best]
    kind = "val" if entry is None else best_kind(entry, run.config)
    return {
        "status": status,
        "epochs": state.epoch,
        "steps": state.step,
        "samples": state.samples,
        "skipped_steps": state.skipped_steps,
        "best": None if entry is None else {"epoch": entry["epoch"], "weights": WEIGHTS[kind], **entry[kind]},
        "test": None,
        "head": next((entry["head"] for entry in state.history if "head" in entry), None),
        "seconds": round(state.seconds, 3),
        "images_per_second": round(state.samples / state.train_seconds, 1) if state.train_seconds else None,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator),
        "num_parameters": sum(parameter.numel() for parameter in state.bare_model.parameters()),
        **run.facts,
    }


def peak_memory_bytes(accelerator: Accelerator) -> int:
    """The peak of allocated GPU memory on this rank's device; on a CPU the peak resident size of the process. In bytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def closing_table(summary: dict[str, Any], config: Config, architecture: str) -> str:
    """The table printed at the end of a run: test figures, best epoch, time, and where the files are.

    architecture: timm's name of the model; loading one that this project registers requires `import pipeline`.
    """
    best, test, run_dir = summary["best"], summary["test"], config.run_dir
    is_ours = timm.model_entrypoint(architecture).__module__.startswith("pipeline.")
    imports = "import timm, pipeline" if is_ours else "import timm"
    shown = "accuracy" if config.monitor == "loss" else config.monitor
    margin = 1.96 * math.sqrt(test["accuracy"] * (1 - test["accuracy"]) / test["num_samples"])
    rate = f", {summary['images_per_second']:,.0f} images/s in training" if summary["images_per_second"] else ""
    return "\n" + console.table(
        [
            (
                "test accuracy",
                f"{console.percent(test['accuracy'])} +- {100 * margin:.2f} of {test['num_samples']:,} images",
            ),
            *balance_rows(test),
            ("test top-5, loss", f"{console.percent(test['top5_accuracy'])}, {test['loss']:.4f}"),
            (
                "best epoch",
                f"{best['epoch']} of {summary['epochs']} (validation {shown.replace('_', ' ')} {console.percent(best[shown])})",
            ),
            ("time", f"{console.duration(summary['seconds'])}{rate}"),
            ("model", f'{run_dir}/model  ({imports}; timm.create_model("local-dir:{run_dir}/model", pretrained=True))'),
            ("figures", f"{run_dir}/metrics.jsonl, summary.json"),
        ]
    )


def balance_rows(test: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of the balanced accuracy, if the classes of the test split are uneven."""
    sizes = uneven_sizes(test.get("per_class", {}))
    if sizes is None:
        return []
    text = f"{console.percent(test['balanced_accuracy'])} (classes of {sizes[0]:,} to {sizes[1]:,} test images)"
    return [("balanced", text)]
