"""Sweeps with W&B: the real client, its agent and train.py, against a stand-in for the server."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL_RUN, hold, is_pending, lines_of, run_process
from wandb_server import Server, wandb_server

from pipeline.settings.parser import from_yaml
from pipeline.sweep.trials import training_process

pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")

# The agent looks for commands every five seconds; the tests have not so much time.
AGENT = """
from wandb import wandb_agent
wandb_agent.Agent.POLL_INTERVAL = 0.2
wandb_agent.Agent.KILL_DELAY = 60
from wandb.cli.cli import cli
cli()
"""
PROJECT = "a-project"
SETTINGS: dict[str, Any] = {name: value for name, value in SMALL_RUN.items() if name not in ("run_name", "lr")}
# a value of each kind that the agent writes as Python does
ODD: dict[str, Any] = {
    "lr": 1e-05, "clip_grad_norm": None, "sam_adaptive": True, "sam_rho": 0.05, "scheduler": "step", "step_epochs": [1, 2],
    "batch_size_schedule": {"1": 32}, "mixed_precision": "no",
}  # fmt: skip


def run_command(kind: str, run_id: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    args = {name: {"value": value} for name, value in settings.items()}
    return [{"type": kind, "run_id": run_id, "args": args, "program": "train.py"}]


def sweep_with(server: Server, tmp_path: Path, python: Path, command: list[str] | None = None) -> str:
    """Creates a sweep and runs an agent until the server makes it exit; returns the output of the agent."""
    parameters = {name: {"values": [value]} for name, value in {**SETTINGS, **ODD}.items()}
    content = {"program": "train.py", "method": "grid", "metric": {"name": "val/accuracy"}, "parameters": parameters}
    content |= {"command": command} if command else {}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    env = {f"WANDB_{name}DIR": str(tmp_path) for name in ("", "CACHE_", "CONFIG_", "DATA_")}
    env |= {**server.environment, "PATH": f"{python.parent}:/usr/bin:/bin", "PYTHON_EXEC": str(python)}
    made = run_process("-m", "wandb", "sweep", "--project", PROJECT, str(path), **env)
    assert f"wandb agent tests/{PROJECT}/sweep1" in made.stdout + made.stderr, made.stdout + made.stderr
    worked = run_process("-c", AGENT, "agent", f"tests/{PROJECT}/sweep1", timeout=200, **env)
    assert worked.returncode == 0, worked.stdout + worked.stderr
    return worked.stdout + worked.stderr


@pytest.mark.slow
def test_train_py_parses_the_agents_command_and_resumes_when_its_trial_is_queued_again(tmp_path, forking_python):
    """The trial is stopped as by early termination, and restarted as a preempted one, with the argument that W&B adds.

    SIGSTOP holds it until the agent's signal has arrived, so that it does not end before.
    """
    settings = {**SETTINGS, **ODD, "epochs": 40, "output_dir": str(tmp_path)}
    again = {**settings, "_wandb": {"resume": 1}}
    commands = iter([run_command("run", "run1", settings), run_command("resume", "run1", again), [{"type": "exit"}]])
    run_dir, stops, held = tmp_path / "sweep1-run1", [], []  # W&B's ids of what was stopped; the process that SIGSTOP holds

    def decide(server: Server, under_way: list[str]) -> list[dict[str, Any]]:
        if not under_way:
            return next(commands)
        if not stops and (run_dir / "checkpoints").is_dir():
            stops.append("run1")
            held.append(training_process(run_dir))
            hold(held[0])
            return [{"type": "stop", "run_id": "run1"}]
        if held and is_pending(held[0], signal.SIGTERM):
            os.kill(held.pop(), signal.SIGCONT)
        return []

    with wandb_server(decide) as server:
        said = sweep_with(server, tmp_path, forking_python)
    assert stops and not held and "Resuming from" in said and list(tmp_path.glob("sweep1-*")) == [run_dir]
    config = from_yaml(run_dir / "config.yaml")
    assert ODD["batch_size_schedule"] == {"1": 32}  # JSON has no other keys
    for name, value in {**settings, "batch_size_schedule": {1: 32}}.items():
        assert getattr(config, name) == value, name
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["epochs"] == 40
    (run,) = server.runs.values()
    assert run["starts"] == 2 and run["exit_codes"][-1] == 0 and run["project"] == PROJECT
    assert run["summary"]["status"] == "completed" and run["config"]["seed"]["value"] == 0
    logged = {line["accuracy"] for line in lines_of(run_dir) if line["split"] == "val"}
    assert {row["val/accuracy"] for row in run["rows"] if "val/accuracy" in row} == logged
    assert "locked" not in said  # no warning for each setting that the sweep has set


@pytest.mark.slow
def test_several_processes_are_one_run(tmp_path, forking_python):
    command = ["${env}", "ACCELERATE_USE_CPU=true", "${interpreter}", "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "${program}", "${args}"]  # fmt: skip
    settings = {**SETTINGS, "lr": 0.1, "output_dir": str(tmp_path)}
    commands = iter([run_command("run", "run1", settings), [{"type": "exit"}]])
    with wandb_server(lambda server, under_way: [] if under_way else next(commands)) as server:
        sweep_with(server, tmp_path, forking_python, command)
    (run,) = server.runs.values()
    summary = json.loads((tmp_path / "sweep1-run1" / "summary.json").read_text())
    assert summary["num_processes"] == 2 and run["starts"] == 1 and run["exit_codes"] == [0]
    assert len([row for row in run["rows"] if "val/accuracy" in row]) == 2
