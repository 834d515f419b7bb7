"""The training loop: trains for `epochs` epochs, evaluates after each, and leaves a run folder.

A step is one optimizer update on one global batch. Processes and micro-batches only split that batch.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.common import console
from pipeline.common.stopping import Interrupted, TrainingFailed
from pipeline.common.system import to_device
from pipeline.data.fingerprint import fingerprint, with_absolute_paths
from pipeline.data.shards import LostShard
from pipeline.distributed.accelerator import make_accelerator, system_facts, with_precision
from pipeline.distributed.shared_failure import failing_together
from pipeline.images.decode import BadImage
from pipeline.loaders.loader import Batch
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.loaders.workers import signal_before_failure
from pipeline.optim.optimizers import lr_of_step, set_lr
from pipeline.optim.schedule import best_epoch, should_stop_early
from pipeline.run_folder.dataset_record import check_own_dataset
from pipeline.run_folder.paths import named_run
from pipeline.run_folder.resume import ended_summary, has_begun, is_moved, with_epochs
from pipeline.settings.batch_size import batch_size_at, steps_per_epoch
from pipeline.settings.config import Config
from pipeline.training.build import Parts, assemble, check_settings, load_images, warnings_of
from pipeline.training.evaluation import evaluate
from pipeline.training.finish import closing_table, finish, stop
from pipeline.training.given_weights import initialise_classifier, start_from_given_weights
from pipeline.training.losses import balanced_weights
from pipeline.training.metrics import figures
from pipeline.training.micro_batch import is_out_of_memory, out_of_memory_advice
from pipeline.training.plan import architecture, plan_text
from pipeline.training.run import Run
from pipeline.training.samples import sample_writer, shown_first
from pipeline.training.state import TrainState, begin_state
from pipeline.training.step import Share, to_training_mode, train_step
from pipeline.training.time_limit import choose_epochs


def train(config: Config, started: float | None = None) -> dict[str, Any]:
    """Trains a model and returns the run's summary, which is also written to its summary.json.

    started: time.perf_counter() where time_limit begins; None is now.

    Raises ValueError for an error before the first step, TrainingFailed for one after it, and Interrupted when a signal
    stopped the run. Saved checkpoints are complete in all three cases.
    """
    started = perf_counter() if started is None else started
    check_settings(config)
    accelerator = make_accelerator(config)
    given, config = config.dataset, with_absolute_paths(with_precision(config, accelerator))
    with failing_together(), named_run(config, accelerator) as named:
        return train_on(accelerator, named, given, started)


def train_on(accelerator: Accelerator, config: Config, given: str, started: float) -> dict[str, Any]:
    """train, as every process runs it. given: the dataset as the user passed it."""
    config = with_epochs(config)
    if accelerator.is_main_process:
        for sentence in warnings_of(config):
            console.warn(sentence)
    summary = ended_summary(config)
    if summary is not None and not is_moved(config):
        return say_ended(summary, config, accelerator)
    parts = assemble(config, accelerator)
    config = parts.config
    if summary is None:
        console.say(plan_text(config, parts, accelerator), accelerator.is_main_process)
    if config.dry_run:
        return {}
    record = {"given": given, **fingerprint(parts.dataset)} if accelerator.is_main_process else {}
    if summary is not None:
        if accelerator.is_main_process:
            check_own_dataset(config.run_dir, record)
        return say_ended(summary, config, accelerator)
    load_images(parts, accelerator)
    facts = system_facts(accelerator) | {"bad_images": len(parts.dataset.bad_images)}
    run = Run(config, accelerator, facts, record)
    try:
        summary = train_in(run, parts, started)
    finally:
        run.release()
    console.say(closing_table(summary, config, architecture(parts.model)), accelerator.is_main_process)
    return summary


def say_ended(summary: dict[str, Any], config: Config, accelerator: Accelerator) -> dict[str, Any]:
    text = f"{config.run_dir} has ended ({summary['status']}). Nothing was changed."
    console.say(text, accelerator.is_main_process)
    return summary


def train_in(run: Run, parts: Parts, started: float) -> dict[str, Any]:
    """Trains from the run's newest checkpoint, or from the start, to its end and returns the summary.

    Every rank must call it. Raises ValueError before the first step, TrainingFailed after it, Interrupted after a signal.
    """
    accelerator = run.accelerator
    state = begin_state(parts.model, parts.optimizer, accelerator, parts.ema)
    try:
        with failing_together(), signal_before_failure(run.signals, accelerator.num_processes):
            head = None if has_begun(run.config) else initialise_classifier(state, parts, run)
            choose_epochs(state, parts, run, started)
            run.begin(state)
            start_from_given_weights(state, parts, run, head)
            return finish(state, parts, run, train_epochs(state, parts, run))
    except Interrupted as interruption:
        stop(state, run, "interrupted", str(interruption))
        raise
    except (TrainingFailed, BadImage, LostShard) as error:
        stop(state, run, "failed", str(error))
        raise TrainingFailed(str(error)) from error
    except OSError as error:  # a full disk, at the end for example
        raise TrainingFailed(f"{error}. {run.resume_command()}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = str(error).strip().splitlines()[0]
    # outside the except block: the error holds the frames of the failed step, and they hold its memory
    model, new_run = state.bare_model, run.new_run()
    advice = out_of_memory_advice(out_of_memory, model, parts.preprocessing, run.config, accelerator, new_run)
    stop(state, run, "failed", advice)
    raise TrainingFailed(advice)


def train_epochs(state: TrainState, parts: Parts, run: Run) -> str:
    """Trains and evaluates epoch by epoch; returns the status: completed or early_stopped."""
    config, accelerator = run.config, run.accelerator
    while state.epoch < config.num_epochs:
        if should_stop_early(state.history, config):
            text = (
                f"Stopped early after epoch {state.epoch} of {config.num_epochs}: {config.early_stopping_patience} epochs "
                f"without a better validation {config.monitor}."
            )
            console.say(text, accelerator.is_main_process)
            return "early_stopped"
        train_figures = train_epoch(state, parts.loaders["train"], run, sample_writer(state, parts, run))
        if run.submitted != state.step:
            run.save(state, is_pending=True)  # if the validation is interrupted, only the validation is repeated
        val = parts.loaders["val"]
        more: dict[str, Any] = {"signals": run.signals, "loss": config.loss}
        figures_of = {"train": train_figures, "val": evaluate(state.bare_model, val, accelerator, **more)}
        if state.ema is not None:
            figures_of["val_ema"] = evaluate(state.ema.module, val, accelerator, **more)
        run.check_validation(state, figures_of["val"]["loss"])
        end_epoch(state, run, figures_of)
    return "completed"


def train_epoch(
    state: TrainState, loader: AnyLoader, run: Run, show: Callable[[Batch], None] | None = None
) -> dict[str, Any]:
    """Trains to the end of the current epoch; returns the epoch's figures over all ranks. show: called with its first batch."""
    config = run.config
    batch_size = batch_size_at(state.epoch, config)
    num_batches = steps_per_epoch(len(loader), batch_size, config.drop_last)
    to_training_mode(state, config, state.epoch < config.freeze_epochs)
    weights = weights_of_classes(loader, config, run.accelerator.device)
    run.read_clock(state)
    batches = loader.train_epoch(state.epoch, batch_size, num_batches, first_batch=state.batch)
    with run.progress_bar(state, num_batches) as bar:
        for images, labels in shown_first(batches, show):
            lr = lr_of_step(state.epoch, state.batch, num_batches, state.history, config)
            set_lr(state.optimizer, lr)
            count = min(batch_size, len(loader) - state.batch * batch_size)
            share = Share(images, labels, count, epochs=count / len(loader), class_weights=weights)
            norm = train_step(state, share, config, run.accelerator)
            bar.update()
            run.after_step(state, lr, batch_size, norm, is_last=state.batch == num_batches)
    return figures(run.accelerator.reduce(state.sums))


def weights_of_classes(loader: AnyLoader, config: Config, device: torch.device) -> Tensor | None:
    """The factors on the loss for class_weights, float32 [num_classes]; None without them."""
    if config.class_weights == "none":
        return None
    return to_device(balanced_weights(torch.as_tensor(loader.labels), loader.num_classes), device)


def end_epoch(state: TrainState, run: Run, figures_of: dict[str, Any]) -> None:
    """Adds the epoch to the history, logs it and saves a checkpoint. figures_of: train, val and, with ema_decay, val_ema."""
    run.read_clock(state)
    earlier = state.history[-1] if state.history else {"samples": 0, "train_seconds": 0.0}
    state.epoch += 1
    state.batch = 0
    state.sums.zero_()
    state.logged = [0.0] * 4
    rate = (state.samples - earlier["samples"]) / (state.train_seconds - earlier["train_seconds"])
    entry = {
        **state.place(state.epoch),
        "train_seconds": state.train_seconds,
        "images_per_second": round(rate, 1),
        **figures_of,
    }
    state.history.append(entry)
    run.log("train", state, state.epoch, {"event": "epoch", **figures_of["train"]})
    run.log("val", state, state.epoch, {**figures_of["val"], **prefixed("ema_", figures_of.get("val_ema", {}))})
    is_best = best_epoch(state.history, run.config) == len(state.history) - 1
    batch_size = batch_size_at(state.epoch - 1, run.config)
    lr = state.optimizer.param_groups[0]["lr"] / state.optimizer.param_groups[0]["lr_scale"]
    line = console.epoch_line(state.epoch, run.config.num_epochs, entry, lr, batch_size, is_best, run.config.monitor)
    console.say(line, run.accelerator.is_main_process)
    run.save_figures(state)
    run.stop_if_asked(state, is_last=True)


def prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in values.items()}
