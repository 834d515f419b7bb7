"""Stops between an epoch's last step and its figures: nothing that was trained is trained again."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import PYTHONPATH, assert_identical, in_processes, lines_of, run_process, same_weights, timeless
from safetensors.torch import load_file

from pipeline.common.stopping import Interrupted, Signals, TrainingFailed
from pipeline.loaders import workers
from pipeline.run_folder.checkpoint import checkpoints, read_facts
from pipeline.training import evaluation, loop
from pipeline.training.evaluation import until_signal
from pipeline.training.state import are_finite


def evaluations(monkeypatch, act):
    """Has act(number) called in each batch of an evaluation, counted from 1."""
    original, count = evaluation.add_batch, 0

    def add_batch(*arguments):
        nonlocal count
        count += 1
        act(count)
        original(*arguments)

    monkeypatch.setattr(evaluation, "add_batch", add_batch)


def trained_steps(monkeypatch):
    steps, original = [], loop.train_step

    def train_step(state, *arguments):
        steps.append(state.step)
        return original(state, *arguments)

    monkeypatch.setattr(loop, "train_step", train_step)
    return steps


EVALUATION = {"micro_batch_size": 4, "ema_decay": 0.3}  # several batches in each of two passes


@pytest.mark.parametrize("stop_at", [1, 3, 7])  # in the pass of the weights, or of their average
def test_a_signal_during_validation_ends_it_at_once_and_only_the_validation_is_repeated(
    run_training, finished_run, monkeypatch, stop_at
):
    _, whole = finished_run(run_name="whole", **EVALUATION)
    with monkeypatch.context() as patch:
        evaluations(patch, lambda number: number == stop_at and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            run_training(**EVALUATION)
    run_dir = whole.parent / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("interrupted", 0, 5)
    facts = read_facts(checkpoints(run_dir)[0])
    assert (facts["epoch"], facts["batch"], facts["step"], facts["history"]) == (0, 5, 5, [])
    steps = trained_steps(monkeypatch)
    run_training(**EVALUATION)
    assert steps == [5, 6, 7, 8, 9]
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


def test_a_signal_that_ends_a_starting_worker_too_interrupts_the_run(run_training, finished_run, monkeypatch, tmp_path):
    """A signal to the process group, while the first validation starts its worker, which does not ignore the signal yet."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers

    settings = {"loader": "workers", "num_workers": 1}
    _, whole = finished_run(run_name="whole", **settings)
    ignore, trains = workers.ignore_stopping_signals, tmp_path / "the worker of the training has started"

    def signal_the_group(number):
        if not trains.exists():
            trains.touch()
            return ignore(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for process in (os.getppid(), os.getpid()):
            os.kill(process, signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Workers._try_get_data, "__defaults__", (0.2,))  # seconds until it looks for ended workers; 5
        patch.setattr(workers, "ignore_stopping_signals", signal_the_group)
        run_training(**settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", "SIGTERM", 5)
    _, run_dir = run_training(**settings)
    assert_identical(run_dir, whole)


def test_a_signal_during_the_test_costs_the_test_alone(run_training, finished_run, monkeypatch):
    _, whole = finished_run(run_name="whole")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.finish.load_weights", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Interrupted):
            run_training()
    steps = trained_steps(monkeypatch)
    _, run_dir = run_training()
    assert steps == [] and timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


def test_out_of_memory_during_validation_does_not_repeat_the_epoch(run_training, finished_run, monkeypatch):
    _, whole = finished_run(run_name="whole")

    def fail(number):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        evaluations(patch, fail)
        with pytest.raises(TrainingFailed, match="Out of memory"):
            run_training()
    steps = trained_steps(monkeypatch)
    _, run_dir = run_training()
    assert steps == [5, 6, 7, 8, 9]
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


def test_the_completed_checkpoint_has_the_tensors_of_the_pending_one(finished_run):
    _, run_dir = finished_run(epochs=1)
    (folder,) = checkpoints(run_dir)
    facts = read_facts(folder)  # verifies the SHA-256 of every file
    assert facts["epoch"] == 1 and len(facts["history"]) == 1 and facts["batch"] == 0
    assert load_file(folder / "model.safetensors").keys() and not list(folder.parent.glob(".*"))


def uneven(folder):
    """Rank 0 has 25 batches and rank 1 has 3; a signal comes to one of them, or none."""
    from pipeline.distributed.accelerator import make_accelerator
    from pipeline.settings.config import Config

    accelerator, signals = make_accelerator(Config()), Signals()
    rank = accelerator.process_index
    for case, (receiver, number) in enumerate([(0, 12), (1, 2), (None, 0)]):
        signals.received, seen = 0, 0
        try:
            for batch in until_signal(iter(range([25, 3][rank])), signals, accelerator):
                seen += 1
                if rank == receiver and batch == number:
                    signals.received = signal.SIGTERM
            outcome = "done"
        except Interrupted:
            outcome = "interrupted"
        (folder / f"{rank}-{case}").write_text(f"{outcome} {seen}")


def test_ranks_with_unequal_numbers_of_batches_stop_together_and_none_hangs(tmp_path):
    done = run_process(__file__, str(tmp_path), PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr
    outcomes = [[(tmp_path / f"{rank}-{case}").read_text() for rank in (0, 1)] for case in range(3)]
    assert outcomes == [["interrupted 20", "interrupted 3"], ["interrupted 10", "interrupted 3"], ["done 25", "done 3"]]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # the sum is infinite
        ([1.0, math.nan], False),
        ([math.inf, 1.0], False),
        ([math.inf, -math.inf], False),
        ([3e38, 3e38, math.nan], False),
    ],
)
def test_values_are_finite_or_not_whatever_their_sum(values, expected):
    tensors = [torch.zeros(2, dtype=torch.float64), torch.empty(0), torch.tensor(values)]
    assert are_finite(tensors) == expected
    assert are_finite([torch.full([70_000], 2.0, dtype=torch.float16)])


def test_weights_that_are_not_finite_are_never_saved(run_training, finished_run, monkeypatch):
    original = loop.train_step

    def train_step(state, *arguments):
        norm = original(state, *arguments)
        if state.step == 10:  # the last one of the second epoch: its loss was finite
            next(state.bare_model.parameters()).data.fill_(math.nan)
        return norm

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(TrainingFailed, match="weights are not finite after step 9 in epoch 2"):
        run_training(epochs=3)
    monkeypatch.undo()
    summary, run_dir = run_training(epochs=3)
    assert summary["status"] == "completed"
    _, whole = finished_run(run_name="whole", epochs=3)
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_leaves_the_checkpoint_before_it(
    run_training, finished_run, monkeypatch, tmp_path, value
):
    original = loop.evaluate

    def evaluate(model, *arguments, **more):
        figures = original(model, *arguments, **more)
        return {**figures, "loss": value} if calls.append(1) or len(calls) == 2 else figures

    calls: list[int] = []
    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(TrainingFailed, match="validation loss of epoch 2 is not finite"):
        run_training(epochs=3)
    monkeypatch.undo()
    (folder,) = checkpoints(tmp_path / "run")
    assert read_facts(folder)["epoch"] == 1
    summary, run_dir = run_training(epochs=3)
    _, whole = finished_run(run_name="whole", epochs=3)
    assert summary["status"] == "completed"
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)


if __name__ == "__main__":
    sys.exit(max(in_processes(2, uneven, Path(sys.argv[1]))))
