"""Sweeps without W&B: the same files, every distribution, agents that share a storage, interruption, failure, early stopping."""

import csv
import json
import math
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest
import yaml
from conftest import (
    ROOT,
    SMALL_RUN,
    assert_identical,
    end_of,
    flags,
    fork_server,
    hold,
    is_pending,
    lines_of,
    run_process,
    start_process,
    wait_for,
)

from pipeline.common.fork_server import UNKNOWN, Fork, ForkServer
from pipeline.common.system import process_tree, usable_cores
from pipeline.settings.parser import read_config
from pipeline.sweep.__main__ import main
from pipeline.sweep.file import (
    ARGUMENT_FORMS,
    DEFAULT_COMMAND,
    Hyperband,
    check_trials,
    fill_command,
    read_sweep,
    sweep_of,
)
from pipeline.sweep.hyperband import keeps_up
from pipeline.sweep.space import Space, read_parameter
from pipeline.sweep.study import SweepStudy
from pipeline.sweep.table import rows_of
from pipeline.sweep.trials import RunningTrial, judge, python_arguments, shares, training_process

BASE = {
    "method": "grid",
    "metric": {"name": "val/accuracy", "goal": "maximize"},
    "parameters": {"lr": {"values": [0.1, 0.2]}, "seed": {"value": 1}},
}

# A trial that costs no training: its accuracy at epoch e is lr * e / epochs. A seed of 13 fails; with a seed of 2 a trial waits
# until another one has started. At its first start a trial with an lr of 0.01 waits after its fourth epoch until it is stopped,
# however long that takes.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

settings = dict(word[2:].split("=", 1) for word in sys.argv[1:])
run_dir = Path(settings["output_dir"]) / settings["run_name"]
run_dir.mkdir(parents=True, exist_ok=True)

def end(status, **more):
    aside = run_dir / "aside"  # as train.py does, so that no reader sees half of it
    aside.write_text(json.dumps({"status": status, "seconds": 1.5, "epochs": 3, **more}))
    aside.replace(run_dir / "summary.json")

def stop(*_):
    end("interrupted", reason="SIGTERM")
    os._exit(143)

signal.signal(signal.SIGTERM, stop)
with open(run_dir / "starts", "a") as file:
    is_first = file.tell() == 0
    print(os.environ.get("OMP_NUM_THREADS"), file=file)
last = time.monotonic() + 60
while settings.get("seed") == "2" and len(list(run_dir.parent.glob("trial-*"))) < 2 and time.monotonic() < last:
    time.sleep(0.01)
if settings.get("seed") == "13":
    print("warming up\\nerror: an unlucky number", file=sys.stderr)
    sys.exit(2)
with open(run_dir / "metrics.jsonl", "w") as file:
    for epoch in range(1, int(settings["epochs"]) + 1):
        value = float(settings["lr"]) * (epoch / int(settings["epochs"]))
        print(json.dumps({"split": "val", "epoch": epoch, "accuracy": value}), file=file, flush=True)
        if settings["lr"] == "0.01" and epoch == 4 and is_first:
            signal.pause()
        time.sleep(0.05)
end("completed", best={"accuracy": value}, test={"accuracy": value / 2})
"""


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr("pipeline.sweep.__main__.POLL_SECONDS", 0.05)


def write_sweep(folder: Path, parameters: dict, **keys) -> Path:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    epochs = {"epochs": {"value": 3}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**BASE, "program": str(program), "parameters": {**epochs, **parameters}, **keys}))
    return path


def trials_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


# -- the file


@pytest.mark.parametrize(
    "spec, fraction, value",
    [
        ({"value": None}, 0.7, None),
        ({"values": ["a", "b", "c", "d"]}, 0.5, "c"),
        ({"values": ["a", "b"], "probabilities": [0.9, 0.1]}, 0.85, "a"),
        ({"values": ["a", "b"], "probabilities": [0.9, 0.1]}, 0.95, "b"),
        ({"min": 1, "max": 4}, 0.5, 3),
        ({"min": 1, "max": 4}, 0.999, 4),
        ({"min": 1.0, "max": 5}, 0.25, 2.0),
        ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 4}, 0.7, 8),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.1}, 0.32, 0.3),
        ({"distribution": "log_uniform", "min": math.log(1e-4), "max": math.log(1e-2)}, 0.5, 1e-3),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, 0.5, 1e-3),
        ({"distribution": "q_log_uniform", "min": math.log(16), "max": math.log(256), "q": 16}, 0.5, 64),
        ({"distribution": "q_log_uniform_values", "min": 16, "max": 256, "q": 16}, 0.5, 64),
        ({"distribution": "inv_log_uniform", "min": math.log(2), "max": math.log(8)}, 0.5, 0.25),
        ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 1e-2}, 0.5, 1e-3),
        ({"distribution": "normal", "mu": 1, "sigma": 2}, 0.975, 1 + 2 * statistics.NormalDist().inv_cdf(0.975)),
        ({"distribution": "q_normal", "mu": 10, "sigma": 0, "q": 3}, 0.3, 9),
        ({"distribution": "log_normal"}, 0.5, 1.0),
        ({"distribution": "q_log_normal", "mu": math.log(7.9), "sigma": 0, "q": 2}, 0.5, 8),
        ({"distribution": "beta", "a": 2, "b": 2}, 0.5, pytest.approx(0.5, abs=0.01)),
        ({"distribution": "q_beta", "a": 1, "b": 1, "q": 0.25}, 0.6, 0.5),
    ],
)
def test_each_distribution_has_its_quantiles(spec, fraction, value):
    received = read_parameter("lr", spec).quantile(fraction)
    assert received == (pytest.approx(value) if isinstance(value, float) else value) and type(received) is not bool
    assert isinstance(received, int) == isinstance(value, int)


def test_every_distribution_of_wandb_is_drawn_by_the_search_within_its_bounds(tmp_path):
    specs = {
        "lr": ({"distribution": "log_uniform_values", "min": 0.01, "max": 0.1}, 0.01, 0.1),
        "weight_decay": ({"distribution": "inv_log_uniform_values", "min": 0.01, "max": 0.1}, 0.01, 0.1),
        "momentum": ({"distribution": "q_uniform", "min": 0.1, "max": 0.9, "q": 0.1}, 0.1, 0.9),
        "epochs": ({"min": 2, "max": 4}, 2, 4),
        "drop_rate": ({"distribution": "beta", "a": 2, "b": 5}, 0, 1),
        "mixup": ({"distribution": "log_normal"}, 0, 200),
        "batch_size": ({"distribution": "q_log_uniform_values", "min": 16, "max": 64, "q": 16}, 16, 64),
        "optimizer": ({"values": ["adam", "sgd"], "probabilities": [0.5, 0.5]}, "adam", "sgd"),
        "scheduler": ({"values": ["cosine", "linear"]}, "cosine", "linear"),
        "clip_grad_norm": ({"value": 1.5}, 1.5, 1.5),
    }
    parameters = {name: spec for name, (spec, _, _) in specs.items()}
    sweep = sweep_of({**BASE, "method": "bayes", "parameters": parameters}, "s")
    study = SweepStudy(sweep, str(tmp_path / "journal.log"), 25, seed=0)
    drawn = []
    for number in range(25):
        claim = study.claim()
        study.end(claim.trial, "completed", 1 - abs(math.log(claim.settings["lr"] / 0.03)), {})
        drawn.append(claim.settings)
        for name, (_, low, high) in specs.items():
            assert low <= claim.settings[name] <= high, (name, claim.settings[name])
    assert study.claim() is None
    assert len({settings["lr"] for settings in drawn}) == 25 and {settings["epochs"] for settings in drawn} == {2, 3, 4}
    # it learns: after the first random ones, draws are nearer to the best learning rate
    away = [abs(math.log(settings["lr"] / 0.03)) for settings in drawn]
    assert statistics.mean(away[15:]) < statistics.mean(away[:10])


def test_a_random_draw_depends_on_its_number_and_the_seed_only():
    space = Space((read_parameter("lr", {"min": 0.0, "max": 1.0}), read_parameter("seed", {"min": 0, "max": 9})))
    points = [space.random_point(number, seed=0) for number in range(200)]
    assert points == [space.random_point(number, seed=0) for number in range(200)]
    assert points[0] != space.random_point(0, seed=1) and len({point["lr"] for point in points}) == 200
    assert set(Counter(point["seed"] for point in points)) == set(range(10))


def test_a_grid_has_every_combination_once():
    sweep = sweep_of({**BASE, "parameters": {
        "lr": {"values": [0.1, 0.2]}, "epochs": {"min": 1, "max": 3}, "seed": {"value": 7},
        "momentum": {"distribution": "q_uniform", "min": 0.5, "max": 0.9, "q": 0.2},
    }}, "s")  # fmt: skip
    points = [sweep.space.grid_point(number) for number in range(sweep.limit)]
    assert sweep.limit == 2 * 3 * 3 and len({json.dumps(point) for point in points}) == sweep.limit
    assert points[0] == {"lr": 0.1, "epochs": 1, "seed": 7, "momentum": 0.4}


@pytest.mark.slow
def test_the_arguments_of_a_command_equal_those_of_wandbs_agent_and_train_py_parses_them():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    settings = {
        "lr": 1e-05, "clip_grad_norm": None, "pretrained": True, "drop_last": False,
        "step_epochs": [1, 2], "batch_size_schedule": {5: 256}, "mixed_precision": "no", "log_with": ["tensorboard"],
    }  # fmt: skip
    theirs = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in settings.items()}})
    for name, form in ARGUMENT_FORMS.items():
        assert form(settings) == theirs[name], name
    config = read_config(ARGUMENT_FORMS["args"](settings))
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_the_command_is_filled_in(monkeypatch):
    monkeypatch.setenv("GPUS", "2")
    command = ["${env}", "${interpreter}", "-m", "torch.distributed.run", "--nproc_per_node=${envvar:GPUS}",
               "${program}", "${args}", "--epochs=3"]  # fmt: skip
    sweep = sweep_of({**BASE, "command": command}, "s")
    words = fill_command(sweep, {"lr": 0.1})
    assert words[0] == "/usr/bin/env" and words[4:] == ["--nproc_per_node=2", "train.py", "--lr=0.1", "--epochs=3"]
    assert fill_command(sweep_of(BASE, "s"), {"lr": 0.1})[2:] == ["train.py", "--lr=0.1"] and DEFAULT_COMMAND
    assert {config.epochs for config in check_trials(sweep)} == {3}


def test_only_the_projects_own_program_in_one_process_is_forked(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    ours = fill_command(sweep_of(BASE, "s"), {"lr": 0.1})
    assert python_arguments(ours) == python_arguments(ours[1:]) == ["train.py", "--lr=0.1"]
    for change in ({"program": str(tmp_path / "train.py")}, {"command": ["accelerate", "launch", "${program}", "${args}"]},
                   {"command": ["${interpreter}", "-m", "torch.distributed.run", "${program}", "${args}"]},
                   {"command": ["${interpreter}", "-O", "${program}", "${args}"]}):  # fmt: skip
        assert python_arguments(fill_command(sweep_of({**BASE, **change}, "s"), {"lr": 0.1})) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methd": "grid"}, ["'methd'", "'method'"]),
        ({"method": "bayse"}, ["'bayse'", "'bayes'"]),
        ({"metric": {"name": "accuracy"}}, ["'accuracy'", "'val/accuracy'"]),
        ({"metric": {"name": "val/accuracy", "goal": "maximise"}}, ["'maximise'", "'maximize'"]),
        ({"parameters": {"leraning_rate": {"value": 1}}}, ["'leraning_rate'"]),
        ({"parameters": {"schedular": {"value": 1}}}, ["'schedular'", "'scheduler'"]),
        ({"parameters": {"lr": {"value": [0.1]}}}, ["lr", "a number or null"]),
        ({"parameters": {"lr": {"values": [0.1, "fast"]}}}, ["'fast'"]),
        ({"parameters": {"stem": {"values": ["smal"]}}}, ["'small'"]),
        ({"parameters": {"optimizer": {"values": ["sgd", "adamv"]}}}, ["'adamv'", "'adamw'"]),
        ({"parameters": {"batch_size": {"values": [0, 1]}}}, ["batch_size is 0", "at least 1"]),
        (
            {"method": "random", "run_cap": 1, "parameters": {"drop_rate": {"min": 0.0, "max": 1.5}}},
            ["drop_rate is 1.5", "below 1"],
        ),
        ({"parameters": {"lr": {"vales": [0.1]}}}, ["'values'"]),
        ({"parameters": {"lr": {"distribution": "log_unifrom", "min": 0, "max": 1}}}, ["'log_uniform'"]),
        ({"parameters": {"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, ["min is 0"]),
        ({"parameters": {"lr": {"distribution": "log_uniform_values", "min": "1e-5", "max": 1}}}, ["1.0e-5"]),
        ({"parameters": {"lr": {"distribution": "normal"}}}, ["cannot enumerate"]),
        ({"parameters": {"lr": {"values": [0.1, 0.1]}}}, ["0.1 twice"]),
        ({"parameters": {"lr": {"values": [0.1, 0.2], "probabilities": [1, 1]}}}, ["sum to 1"]),
        ({"parameters": {"run_name": {"value": "x"}}}, ["run_name", "sets it for each trial"]),
        ({"parameters": {"optimizer": {"parameters": {"lr": {"value": 1}}}}}, ["flat"]),
        ({"command": ["${interpretr}", "${args}"]}, ["${interpretr}", "'interpreter'"]),
        ({"command": ["python", "train.py"]}, ["no ${args}"]),
        ({"command": ["python", "train.py", "${args}", "--epocs=3"]}, ["'epocs'", "'epochs'"]),
        ({"early_terminate": {"type": "median"}}, ["'median'", "hyperband"]),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, ["max_iter and s"]),
        ({"method": "random"}, ["--num_trials"]),
        ({"program": "trian.py"}, ["no program trian.py"]),
        ({"run_cap": 0}, ["run_cap is 0"]),
    ],
)
def test_errors_of_a_file_are_reported_before_the_first_trial(change, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**BASE, **change}))
    assert main([str(path), "--output_dir", str(tmp_path / "runs")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and str(path) in message
    for word in words:
        assert word in message
    assert not list(tmp_path.rglob("trial-*"))


# -- early stopping


def test_hyperbands_iterations_are_those_of_the_documentation():
    def iterations(**keys):
        early = {"type": "hyperband", **keys}
        return sweep_of({**BASE, "early_terminate": early}, "s").hyperband.iterations

    assert iterations(min_iter=3)[:4] == (3, 9, 27, 81)
    assert iterations(min_iter=2, eta=2)[:4] == (2, 4, 8, 16)
    assert iterations(max_iter=27, s=2) == (3, 9)
    assert iterations(max_iter=20, s=5, eta=2) == (1, 2, 5, 10)


def test_hyperband_stops_trials_that_are_not_among_the_best():
    def continues(history, others, maximize=False, strict=False):
        return keeps_up(history, others, Hyperband((2, 4), eta=3, strict=strict), maximize)

    assert continues([9.0], [[1.0, 1.0]])  # it has not reached an iteration that counts
    assert continues([9.0, 9.0], [])  # the first trial to reach an iteration has no other to compare with
    others = [[9.0, loss] for loss in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert [continues([0.0, loss], others) for loss in (0.5, 1.5, 2.5, 3.5)] == [True, True, True, False]
    assert [continues([0.0, loss], others, strict=True) for loss in (0.5, 1.5, 2.5)] == [True, True, False]
    assert [continues([0.0, value], others, maximize=True) for value in (3.5, 2.5)] == [True, False]
    assert not continues([0.0, 3.5, 0.0], others)  # judged by the iteration, not by what comes after it
    assert not continues([0.0, 0.0, 0.0, 2.0], [*others, [0.0, 0.0, 0.0, 1.0]])
    assert not continues([0.0, math.nan], others)


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped_and_the_sweep_continues(tmp_path, capsys):
    early = {"type": "hyperband", "min_iter": 4, "eta": 3}
    parameters = {"lr": {"values": [0.9, 0.01, 0.95]}, "epochs": {"value": 5}}
    path = write_sweep(tmp_path, parameters, early_terminate=early, name="early")
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    rows = trials_of(tmp_path / "early")
    assert [row["status"] for row in rows] == ["completed", "stopped", "completed"]
    lines = lines_of(tmp_path / "early" / "trial-0002")
    assert len(lines) == 4 and rows[1]["value"] == lines[-1]["accuracy"] == 0.01 * (4 / 5)  # the best value is the last
    assert capsys.readouterr().out.count("stopped") == 2  # its line, and the table's


# -- trials


def test_no_in_a_sweep_file_is_the_word(tmp_path, monkeypatch):
    file = tmp_path / "sweep.yaml"
    text = "method: grid\nmetric: {name: val/loss, goal: minimize}\nparameters:\n  mixed_precision: {values: [no, bf16]}\n"
    file.write_text(text + "  seed: {value: 1}\n")
    sweep = read_sweep(file)
    assert [sweep.space.grid_point(number)["mixed_precision"] for number in (0, 1)] == ["no", "bf16"]
    monkeypatch.chdir(ROOT)
    assert {config.mixed_precision for config in check_trials(sweep)} == {"no", "bf16"}
    file.write_text(text.replace("[no, bf16]", "[no, off]"))
    with pytest.raises(ValueError, match="lists the value no twice"):
        read_sweep(file)
    file.write_text(text.replace("{values: [no, bf16]}", "{value: off}"))
    assert read_sweep(file).space.grid_point(0)["mixed_precision"] == "no"


@pytest.mark.parametrize(
    "metric, aim, is_reversed",
    [
        ({"name": "val/accuracy", "goal": "maximize"}, "maximize val/accuracy", False),
        ({"name": "val/loss"}, "minimize val/loss", False),
        ({"name": "test/top5_accuracy"}, "minimize test/top5_accuracy (the lowest ranks first)", True),
        ({"name": "val/ema_accuracy", "goal": "minimize"}, "minimize val/ema_accuracy (the lowest ranks first)", True),
        ({"name": "train/loss", "goal": "maximize"}, "maximize train/loss (the highest ranks first)", True),
    ],
)
def test_the_aim_of_a_sweep_is_known(metric, aim, is_reversed):
    sweep = sweep_of({**BASE, "metric": metric}, "file")
    assert (sweep.aim, sweep.is_reversed) == (aim, is_reversed)


def test_a_sweep_for_the_worst_trial_says_so_first_and_warns(tmp_path, capsys):
    for metric, warning in (
        ({"name": "val/accuracy"}, "goal of val/accuracy is not set, and its default is minimize"),
        ({"name": "val/accuracy", "goal": "minimize"}, "goal of val/accuracy is minimize"),
    ):
        path = write_sweep(tmp_path, {"lr": {"values": [0.3]}, "seed": {"value": 1}}, metric=metric, name=f"sweep-{len(metric)}")
        assert main([str(path), "--output_dir", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[0].endswith("minimize val/accuracy (the lowest ranks first)")
        assert warning in printed.err and "Write goal: maximize" in printed.err


def test_cores_and_gpus_are_divided_among_trials():
    assert shares(1, 8, ["0", "1"]) == [{}]
    assert shares(2, 8, []) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert [part["CUDA_VISIBLE_DEVICES"] for part in shares(2, 8, ["0", "1", "2", "3"])] == ["0,2", "1,3"]
    assert [part["CUDA_VISIBLE_DEVICES"] for part in shares(3, 2, ["5", "7"])] == ["5", "7", "5"]


def test_trials_are_ranked_failures_reported_and_the_sweep_continues(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    path = write_sweep(tmp_path, {"lr": {"values": [0.3, 0.6]}, "seed": {"values": [13, 1]}}, name="ranked")
    assert main([str(path), "--output_dir", str(tmp_path), "--num_parallel", "2"]) == 0
    folder = tmp_path / "ranked"
    rows = trials_of(folder)
    assert [row["status"] for row in rows] == ["failed", "completed", "failed", "completed"]
    assert rows[0]["error"] == "an unlucky number" and rows[1]["error"] is None
    assert rows[3] == {
        "number": 4, "status": "completed", "params": {"epochs": 3, "lr": 0.6, "seed": 1}, "run_dir": "trial-0004",
        "value": 0.6, "error": None, "test_accuracy": 0.3, "best_accuracy": 0.6, "epochs": 3, "seconds": 1.5,
    }  # fmt: skip
    ranks = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["rank"], row["number"], row["val/accuracy"]) for row in ranks] == [
        ("1", "4", "0.6"), ("2", "2", "0.3"), ("", "1", ""), ("", "3", ""),
    ]  # fmt: skip
    assert (folder / "sweep.yaml").read_text() == path.read_text()
    out = capfd.readouterr().out
    assert "[4/4]" in out and "failed: an unlucky number" in out and "60.00 %" in out
    threads = str(max(usable_cores() // 2, 1))  # half of the cores for each of two trials
    assert {text for start in folder.glob("*/starts") for text in start.read_text().split()} == {threads}
    # what has ended is not run again; a larger number of trials adds to them
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0 and trials_of(folder) == rows
    assert all(len(start.read_text().splitlines()) == 1 for start in folder.glob("*/starts"))


def test_the_bar_has_the_best_value_so_far(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = write_sweep(tmp_path, {"lr": {"values": [0.3, 0.6, 0.5]}, "epochs": {"value": 1}}, name="bar")
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    states = [(match[1], int(match[2])) for match in re.finditer(r"best val/accuracy ([\d.-]+)[^|]*\|[^|]*\| (\d)/3", shown)]
    assert list(dict.fromkeys(states)) == [("-", 0), ("30.00", 1), ("60.00", 2), ("60.00", 3)]


@pytest.mark.slow
def test_optuna_dashboard_opens_the_journal(tmp_path, monkeypatch):
    dashboard = pytest.importorskip("optuna_dashboard._cli")
    values = {"optimizer": ["sgd", "adamw"], "momentum": [0.5, 0.9]}
    numbers = {"lr": {"min": 0.1, "max": 0.9}, "batch_size": {"min": 8, "max": 64}, "drop_rate": {"distribution": "beta"}}
    parameters = {**{name: {"values": own} for name, own in values.items()}, **numbers, "seed": {"value": 1}}
    path = write_sweep(tmp_path, parameters, method="random", run_cap=3, name="shown")
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    apps = []
    monkeypatch.setattr(dashboard, "run_wsgiref", lambda app, *place: apps.append(app))  # which would serve it at a port
    monkeypatch.setattr(sys, "argv", ["optuna-dashboard", str(tmp_path / "shown" / "journal.log"), "--server", "wsgiref"])
    dashboard.main()

    def get(address: str):
        request = {"PATH_INFO": f"/api/{address}"}
        setup_testing_defaults(request)
        return json.loads(b"".join(apps[0](request, lambda status, headers, error=None: None)))

    (study,) = get("studies")["study_summaries"]
    details = get(f"studies/{study['study_id']}")
    assert study["study_name"] == "shown" and study["directions"] == ["maximize"]
    for trial, row in zip(details["trials"], trials_of(tmp_path / "shown"), strict=True):
        assert trial["state"] == "Complete" and trial["values"] == [row["value"]]
        assert [step["value"] for step in trial["intermediate_values"]][-1] == row["value"]
        shown = {one["name"]: one["param_external_value"] for one in trial["params"]}
        assert shown == {name: str(row["params"][name]) for name in (*values, *numbers)}
    kinds = {one["name"]: one["distribution"]["type"] for one in details["union_search_space"]}
    assert {kinds[name] for name in values} == {"CategoricalDistribution"} and kinds["batch_size"] == "IntDistribution"


def test_a_sweep_without_a_completed_trial_exits_with_status_1(tmp_path):
    path = write_sweep(tmp_path, {"lr": {"value": 0.3}, "seed": {"value": 13}})
    assert main([str(path), "--output_dir", str(tmp_path), "--name", "bad"]) == 1
    assert [row["status"] for row in trials_of(tmp_path / "bad")] == ["failed"]


def test_a_trial_whose_fork_server_was_killed_is_judged_by_its_summary(tmp_path):
    sweep = sweep_of(BASE, "s")
    for status, outcome in (("completed", "completed"), ("running", "interrupted")):
        run_dir = tmp_path / status
        run_dir.mkdir()
        (run_dir / "summary.json").write_text(json.dumps({"status": status}))
        (run_dir / "metrics.jsonl").write_text(json.dumps({"split": "val", "event": "", "accuracy": 0.5}) + "\n")
        process = Fork([], pid=0, status=-1)
        process.returncode = UNKNOWN
        trial = RunningTrial(run_dir, process, open(run_dir / "log", "wb"), 0, 0, {})
        assert judge(trial, sweep).status == outcome


def test_a_sweep_can_be_extended_but_not_changed(tmp_path, capsys):
    parameters = {"lr": {"min": 0.1, "max": 0.9}}
    path = write_sweep(tmp_path, parameters, method="random", name="more")
    options = ["--output_dir", str(tmp_path), "--num_trials"]
    assert main([str(path), *options, "1"]) == 0 and len(trials_of(tmp_path / "more")) == 1
    assert main([str(path), *options, "3"]) == 0
    first = trials_of(tmp_path / "more")
    assert len({row["params"]["lr"] for row in first}) == 3
    path = write_sweep(tmp_path, {"lr": {"min": 0.1, "max": 0.8}}, method="random", name="more")
    assert main([str(path), *options, "4"]) == 2
    assert "was started with another file" in capsys.readouterr().err and trials_of(tmp_path / "more") == first


def test_no_trial_starts_after_one_has_reached_the_target(tmp_path):
    metric = {**BASE["metric"], "target": 0.5}
    path = write_sweep(tmp_path, {"lr": {"values": [0.2, 0.7, 0.9]}}, metric=metric, name="target")
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    assert [row["value"] for row in trials_of(tmp_path / "target")] == [0.2, 0.7]


# -- agents


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_two_agents_share_one_sweep_and_no_point_is_run_twice(tmp_path, storage):
    values = [round(0.1 * number, 1) for number in range(1, 9)]
    path = write_sweep(tmp_path, {"lr": {"values": values}, "seed": {"value": 2}}, name="shared")
    given = [] if storage == "journal" else ["--storage", f"sqlite:///{tmp_path}/shared.db"]
    agents = [start_process("-m", "pipeline.sweep", str(path), "--output_dir", str(tmp_path), *given) for _ in range(2)]
    ends = [end_of(agent, timeout=120) for agent in agents]
    assert [end.returncode for end in ends] == [0, 0], ends
    rows = trials_of(tmp_path / "shared")
    assert sorted(row["value"] for row in rows) == values
    starts = [start.read_text().splitlines() for start in (tmp_path / "shared").glob("*/starts")]
    assert len(starts) == len(values) and all(len(lines) == 1 for lines in starts)
    shares_of_work = [end.stdout.count("  running  ") for end in ends]
    assert sum(shares_of_work) == len(values) and min(shares_of_work) > 0
    if storage == "sqlite":
        tables = sqlite3.connect(tmp_path / "shared.db").execute("select name from sqlite_master").fetchall()
        assert ("trials",) in tables and not (tmp_path / "shared" / "journal.log").exists()


def test_interleaved_agents_never_hold_the_same_place(tmp_path):
    sweep = sweep_of({**BASE, "parameters": {"seed": {"min": 1, "max": 5}}}, "s")
    agents = [SweepStudy(sweep, str(tmp_path / "journal.log"), sweep.limit, seed=0) for _ in range(3)]
    claims = [agents[number % 3].claim() for number in range(5)]
    assert [claim.settings["seed"] for claim in claims] == [1, 2, 3, 4, 5]
    assert all(agent.claim() is None for agent in agents)
    agents[1].put_back(claims[3].trial, claims[3].place)
    again = agents[0].claim()
    assert (again.place, again.settings) == (claims[3].place, claims[3].settings) and agents[2].claim() is None


def test_a_search_keeps_the_settings_of_a_trial_that_is_put_back(tmp_path):
    parameters = {"lr": {"min": 0.0, "max": 1.0}, "optimizer": {"values": ["sgd", "adamw", "muon"]}}
    sweep = sweep_of({**BASE, "method": "bayes", "parameters": parameters}, "s")
    study = SweepStudy(sweep, str(tmp_path / "journal.log"), 4, seed=0)
    claim = study.claim()
    study.put_back(claim.trial, claim.place)
    study.put_back(claim.trial, claim.place)  # twice is as once
    assert [row["status"] for row in rows_of(study.places(), sweep)] == ["interrupted"]
    other = SweepStudy(sweep, str(tmp_path / "journal.log"), 4, seed=0)
    again = other.claim()
    assert (again.place, again.settings) == (0, claim.settings)
    assert other.claim().settings != claim.settings


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_its_trials(tmp_path, monkeypatch):
    """With train.py itself: the interrupted trial ends as if nothing had happened."""
    settings = {name: value for name, value in SMALL_RUN.items() if name not in ("run_name", "epochs")}
    parameters = {name: {"value": value} for name, value in {**settings, "epochs": 40}.items()}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**BASE, "parameters": parameters, "name": "broken"}))
    folder = tmp_path / "broken"
    agent = start_process("-m", "pipeline.sweep", str(path), "--output_dir", str(tmp_path))
    metrics = folder / "trial-0001" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"val"' in metrics.read_text(), process=agent)
    trial = training_process(folder / "trial-0001")
    hold(trial)  # so that it does not end before the agent's signal arrives
    agent.send_signal(signal.SIGINT)
    wait_for(lambda: is_pending(trial, signal.SIGTERM), process=agent)
    os.kill(trial, signal.SIGCONT)
    ended = end_of(agent, timeout=120)
    assert ended.returncode == 130 and "run the same command again" in ended.stdout, ended.stderr
    assert [row["status"] for row in trials_of(folder)] == ["interrupted"]
    monkeypatch.chdir(ROOT)
    forked, start = [], ForkServer.start
    monkeypatch.setattr(ForkServer, "start", lambda self, *request: forked.append(start(self, *request)) or forked[-1])
    monkeypatch.setattr("pipeline.sweep.trials.ForkServer", lambda *_: fork_server())  # the tests' own, which has imported torch
    monkeypatch.setattr("fork_server.ForkServer.close", lambda self: None)
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    assert [(fork.args[0], fork.returncode) for fork in forked] == [("train.py", 0)] or sys.platform != "linux"
    assert "Resuming from" in (folder / "logs" / "trial-0001.log").read_text()
    whole = tmp_path / "whole"
    assert run_process("train.py", *flags(epochs=40, run_name="whole", output_dir=tmp_path)).returncode == 0
    assert_identical(folder / "trial-0001", whole)
    best = max(line["accuracy"] for line in lines_of(whole) if line["split"] == "val")
    assert trials_of(folder)[0]["value"] == best


@pytest.mark.filterwarnings("error:The reported value is ignored")
def test_the_trial_of_a_killed_agent_is_resumed_by_another(tmp_path):
    """It logs again what it has logged before; each value is reported once."""
    path = write_sweep(tmp_path, {"lr": {"values": [0.01, 0.4]}, "epochs": {"value": 5}}, name="killed")
    agent = start_process("-m", "pipeline.sweep", str(path), "--output_dir", str(tmp_path))
    run_dir = tmp_path / "killed" / "trial-0001"
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and len(lines_of(run_dir)) == 4, process=agent)
    _, *orphans = process_tree(agent.pid)
    agent.kill()
    agent.communicate()
    try:
        assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    finally:
        for orphan in orphans:
            orphan.kill()
    assert [row["status"] for row in trials_of(tmp_path / "killed")] == ["completed", "completed"]
    assert len((run_dir / "starts").read_text().splitlines()) == 2


def test_an_orphan_that_ends_before_it_is_stopped_does_not_fail_its_trial(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    holders = iter([ended.pid])
    monkeypatch.setattr("pipeline.sweep.trials.training_process", lambda run_dir: next(holders, None))
    path = write_sweep(tmp_path, {"lr": {"value": 0.3}, "seed": {"value": 1}}, name="orphan")
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    assert [row["status"] for row in trials_of(tmp_path / "orphan")] == ["completed"]


@pytest.mark.slow
def test_when_the_storage_fails_running_trials_stop_and_the_same_command_resumes_them(tmp_path, monkeypatch, capsys):
    path = write_sweep(tmp_path, {"lr": {"values": [0.01, 0.4]}, "epochs": {"value": 5}}, name="lost")

    def fail(self, trial, history, known):
        if history:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(SweepStudy, "report", fail)
        assert main([str(path), "--output_dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "No space left" in message and "\n" not in message
    summary = tmp_path / "lost" / "trial-0001" / "summary.json"
    wait_for(summary.is_file)
    assert json.loads(summary.read_text())["status"] == "interrupted"
    monkeypatch.setattr("pipeline.sweep.study.is_alive", lambda process: False)  # as if by another process
    monkeypatch.setattr("pipeline.sweep.study.os.getpid", lambda: 1)
    assert main([str(path), "--output_dir", str(tmp_path)]) == 0
    assert [row["status"] for row in trials_of(tmp_path / "lost")] == ["completed", "completed"]


def test_an_agent_on_another_machine_is_dead_when_its_beat_stops(tmp_path, monkeypatch):
    sweep = sweep_of(BASE, "s")
    here, there = (SweepStudy(sweep, str(tmp_path / "journal.log"), sweep.limit, seed=0) for _ in range(2))
    claim = there.claim()
    claim.trial.set_user_attr("agent", {"machine": "elsewhere", "process": os.getpid(), "beat": 0})
    here.put_back_dead()
    monkeypatch.setattr("pipeline.sweep.study.SILENCE_SECONDS", -1.0)
    claim.trial.set_user_attr("agent", {"machine": "elsewhere", "process": os.getpid(), "beat": 1})
    here.put_back_dead()  # it has stirred
    assert [row["status"] for row in rows_of(here.places(), sweep)] == ["running"]
    here.put_back_dead()
    assert [row["status"] for row in rows_of(here.places(), sweep)] == ["interrupted"]
    there.end(claim.trial, "completed", 0.5, {})  # it was alive: its result is discarded
    assert here.claim().place == 0


# -- the files in sweeps/


SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_sweep_file_starts_with_its_command_and_number_of_runs_and_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = path.read_text().splitlines()
    comments = [line for line in lines[: lines.index("program: train.py")]]
    assert all(line.startswith("# ") for line in comments)
    assert comments[0].startswith(f"# python -m pipeline.sweep sweeps/{path.name}")
    assert comments[1].startswith(f"# wandb sweep sweeps/{path.name}")
    sweep = read_sweep(path)
    assert f"# {sweep.limit} runs" in "\n".join(comments) and any(line.startswith("# Expected") for line in comments)
    assert sweep.name == path.stem and len(check_trials(sweep)) > 1
