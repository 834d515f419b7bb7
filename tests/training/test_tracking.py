"""Trackers: metrics.jsonl always, the others if log_with names them, and none of them can stop a run."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import flags, lines_of, run_process
from wandb_server import wandb_server

from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml
from pipeline.training.tracking import end_wandb, tracker_names

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


def test_tensorboard_receives_split_and_key(run_training):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run_dir = run_training(log_with="tensorboard")
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
        settings = flags(output_dir=tmp_path, log_with="[wandb]", project="a-project", clip_grad_norm=0.5)
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
        rows.setdefault(row["_step"], {}).update({key: value for key, value in row.items() if "/" in key})
    assert rows == by_step(tmp_path / "run") and len(rows) == 6
    assert (run["summary"]["status"], run["summary"]["steps"]) == ("completed", summary["steps"])
    for part in ("best", "test"):
        assert run["summary"][f"{part}/accuracy"] == summary[part]["accuracy"]


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
