"""Trackers: metrics.jsonl always, the others if log_with names them, and none of them can stop a run."""

import inspect
import json
import math
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import flags, lines_of, run_process
from wandb_server import wandb_server

from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml
from pipeline.training.tracking import Tracker, end_wandb, tracker_names

PLACE = ("epoch", "step", "samples", "seconds")


def test_only_the_trackers_of_log_with_are_imported(tmp_path):
    code = """
import sys
from train import main
assert main(sys.argv[1:]) == 0
imported = {"wandb", "tensorboard", "matplotlib", "sklearn", "pandas"} & set(sys.modules)
assert not imported, imported
"""
    done = run_process("-c", code, *flags(output_dir=tmp_path, epochs=1))
    assert done.returncode == 0, done.stderr


def test_tensorboard_receives_split_and_key(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run_dir = finished_run(log_with="tensorboard")
    (folder,) = {path.parent for path in run_dir.rglob("events.out.tfevents.*") if path.parent.name == "tensorboard"}
    events = EventAccumulator(str(folder)).Reload()
    logged = {
        line["step"]: line["loss"] for line in lines_of(run_dir) if line["split"] == "train" and "event" not in line
    }
    received = {event.step: event.value for event in events.Scalars("train/loss")}
    assert received == pytest.approx(logged) and logged
    assert {"train/lr", "train_epoch/accuracy", "val/accuracy", "test/accuracy"} <= set(events.Tags()["scalars"])


def by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """The numbers of metrics.jsonl by their step, named split/key; those of a whole epoch train_epoch/key."""
    found: dict[int, dict[str, float]] = {}
    for line in lines_of(run_dir):
        prefix = "train_epoch" if line.get("event") == "epoch" else line["split"]
        found.setdefault(line["step"], {}).update(
            {f"{prefix}/{key}": value for key, value in line.items() if isinstance(value, (int, float)) and key not in PLACE}
        )
    return found


@pytest.mark.slow
def test_the_server_of_wandb_receives_settings_history_and_summary(tmp_path):
    """From the real client."""
    pytest.importorskip("wandb")
    with wandb_server(lambda server, under_way: []) as server:
        settings = flags(output_dir=tmp_path, log_with="[wandb]", log_model=True, project="a-project", clip_grad_norm=0.5)
        done = run_process("train.py", *settings, WANDB_DIR=str(tmp_path), **server.environment)
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert run["project"] == "a-project" and run["exit_codes"] == [0]
    config = json.loads(json.dumps(asdict(from_yaml(tmp_path / "run" / "config.yaml"))))
    sent = {name: value for name, value in config.items() if value != {}}  # its client leaves out an empty map
    assert {name: run["config"][name]["value"] for name in sent} == sent and len(sent) > 50
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run["config"]["system/device"]["value"] == summary["device"]
    rows: dict[int, dict[str, float]] = {}
    for row in run["rows"]:
        rows.setdefault(row["_step"], {}).update(
            {key: value for key, value in row.items() if "/" in key and isinstance(value, (int, float))}
        )
    assert rows == by_step(tmp_path / "run") and len(rows) == 6
    assert (run["summary"]["status"], run["summary"]["steps"]) == ("completed", summary["steps"])
    for part in ("best", "test"):
        assert run["summary"][f"{part}/accuracy"] == summary[part]["accuracy"]
    (name,) = server.runs
    kinds = {key: value["_type"] for key, value in run["rows"][-1].items() if isinstance(value, dict)}
    assert kinds == {
        "first_batch": "image-file", "test/mistakes": "images/separated", "test/per_class_accuracy": "table-file",
        "test/confusion_matrix_table": "table-file",
    }  # fmt: skip
    tables = [f"run-{name}-test{key}" for key in ("per_class_accuracy", "confusion_matrix_table")]
    assert server.artifacts[f"model-{name}"] == "model"
    assert all(any(each.startswith(table) for each in server.artifacts) for table in tables) and len(server.artifacts) == 3


@pytest.mark.parametrize(
    "summary, calls",
    [
        ({"status": "completed"}, ["finish 0"]),
        ({"status": "failed", "reason": "The loss was not finite."}, ["finish 1"]),
        ({"status": "interrupted", "reason": "SIGTERM"}, ["finish 0"]),  # as early termination stops a trial
        ({"status": "interrupted", "reason": "SIGUSR1"}, ["preempting", "finish 1"]),  # as a batch system does
    ],
)
def test_wandb_queues_a_preempted_trial_again(summary, calls):
    wandb = pytest.importorskip("wandb")
    made = []

    class Run:  # a stand-in with methods that the real one has, called as it can be
        summary: dict = {}

        def mark_preempting(self):
            made.append("preempting")

        def finish(self, exit_code):
            made.append(f"finish {exit_code}")

    for name in ("mark_preempting", "finish"):
        theirs, ours = (inspect.signature(getattr(kind, name)).parameters.keys() for kind in (wandb.Run, Run))
        assert theirs == ours, name
    end_wandb(Run(), summary, {"seconds": 1.0})
    assert made == calls and Run.summary == {"seconds": 1.0}


def test_a_tracker_that_fails_costs_a_warning_and_nothing_else(run_training, monkeypatch):
    import wandb

    def init(**options):
        raise wandb.Error("the service is down")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match="wandb could not start.*the service is down"):
        summary, run_dir = run_training(log_with="wandb")
    assert summary["status"] == "completed" and len(lines_of(run_dir)) > 5


def test_wandb_is_enabled_automatically_under_its_agent(monkeypatch):
    assert tracker_names(Config()) == []
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    assert tracker_names(Config()) == ["wandb"]
    assert tracker_names(Config(log_with=["tensorboard", "wandb"])) == ["tensorboard", "wandb"]


def test_a_tracker_that_is_not_installed_is_reported(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="pip install wandb"):
        tracker_names(Config(log_with="wandb"))


def test_nan_and_infinity_are_null_in_every_file_of_a_run(run_training, monkeypatch):
    from pipeline.training import loop

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    original = loop.evaluate

    def evaluate(*arguments, **more):
        return {**original(*arguments, **more), "top5_accuracy": math.nan, "accuracy": math.inf}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    _, run_dir = run_training(monitor="loss")
    files = [path for path in run_dir.rglob("*.json*") if path.is_file()]
    assert {"metrics.jsonl", "summary.json", "state.json", "dataset.json"} <= {path.name for path in files}
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)
    assert [line["accuracy"] for line in lines_of(run_dir) if line["split"] == "val"] == [None, None]
    assert json.loads((run_dir / "summary.json").read_text())["best"]["accuracy"] is None


def run_killed_at_lines(run_training, monkeypatch, kills, **settings):
    """A run that is killed, start after start, before the line of these numbers; then it ends. Returns its folder."""
    log = Tracker.log

    def killed(self, *arguments):
        nonlocal left
        left -= 1
        if not left:
            raise RuntimeError("killed")
        log(self, *arguments)

    monkeypatch.setattr(Tracker, "log", killed)
    for left in kills:
        with pytest.raises(RuntimeError, match="killed"):
            run_training(**settings)
        for thread in threading.enumerate():  # a killed process would not write any more
            if thread.name == "checkpoint writer":
                thread.join()
    left = 0
    _, run_dir = run_training(**settings)
    return run_dir


# The lines of a run: steps 1 to 5, the epoch's training and validation, steps 6 to 10, the same two, the test.
EVERY_STEP = {"log_every": 1, "checkpoint_every_steps": 3}


def test_tensorboard_has_one_value_per_tag_and_step_after_kills(run_training, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # File names end in a count, and the reader sorts them as text: within one second, the tenth would come before the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    # at step 8, resumed at 6; then twice between the last step and the end of the last validation; then before the test
    run_dir = run_killed_at_lines(run_training, monkeypatch, [10, 5, 2, 3], log_with="tensorboard", **EVERY_STEP)
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    received = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected: dict[str, list] = {}
    for line in lines_of(run_dir):
        prefix = "train_epoch" if line.get("event") == "epoch" else line["split"]
        for key in ("loss", "lr", "accuracy", "num_samples"):
            if key in line:
                expected.setdefault(f"{prefix}/{key}", []).append((line["step"], pytest.approx(line[key])))
    assert len(expected["train/loss"]) == 10 and len(expected["test/loss"]) == 1
    assert {tag: received[tag] for tag in expected} == expected
    assert received["samples"] == [(step, 16 * step) for step in range(1, 11)]
    assert received["epoch"] == [(step, 1 + (step > 5)) for step in range(1, 11)]


def test_wandb_is_not_sent_again_what_it_has(run_training, monkeypatch, capsys):
    import wandb

    logged: list[tuple[int, list[str]]] = []

    class Run:
        id = "abc123"
        config: dict = {}
        summary: dict = {}

        def __init__(self):
            self.step = max((step for step, _ in logged), default=-1) + 1  # as the service says of a resumed run

        def log(self, values, step, **kwargs):
            logged.append((step, sorted(values)))

        def finish(self, exit_code):
            pass

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    settings = type("Settings", (), {"update": lambda self, values, **kwargs: None})()
    monkeypatch.setattr(wandb, "config", settings)
    run_killed_at_lines(run_training, monkeypatch, [11], log_with="wandb", **EVERY_STEP)  # at step 9, resumed at 6
    assert "W&B has this run's figures up to step 8" in capsys.readouterr().err
    steps = [step for step, _ in logged]
    assert steps == [1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10]
    assert [step for step, names in logged if "samples" in names] == list(range(1, 11))
