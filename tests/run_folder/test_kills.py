"""A run killed at any instant, and between any two file operations, resumes to the identical result.

This file is also the program: it imports torch once and forks a process for each training, so that a kill costs one second.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import PYTHONPATH, SMALL_RUN, lines_of, run_process, timeless

# the audit events of writes
OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link"}
SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "lr": 0.01, "ema_decay": 0.3, "checkpoint_every_steps": 2},
    {"optimizer": "muon", "lr": 0.01, "sam_rho": 0.05, "mixup": 0.4, "drop_rate": 0.2, "checkpoint_every_steps": 1},
    {"loader": "workers", "num_workers": 2, "checkpoint_every_steps": 3, "batch_size_schedule": {1: 24}},
]
SHORT = [{**SETTINGS[0], "max_train_samples": 60}]  # 3 steps per epoch


def train_here(folder: Path, name: str, settings: dict[str, Any], kill_at: int | None) -> None:
    """Runs in a forked process: trains, and kills itself before its kill_at-th file operation in the run folder."""
    from pipeline.settings.config import Config
    from pipeline.training.loop import train

    run_dir = os.path.join(folder, name)
    numbers = itertools.count(1)

    def count_operation() -> None:
        if next(numbers) == kill_at:  # of several threads, each gets a number of its own
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(run_dir):
            if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
                count_operation()

    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        count_operation()
        fsync(descriptor)

    if kill_at is not None:
        sys.addaudithook(watch)
        os.fsync = watched_fsync
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(Config(**{**SMALL_RUN, **settings, "output_dir": str(folder), "run_name": name}))


def start(folder: Path, name: str, settings: dict[str, Any], kill_at: int | None = None) -> Any:
    process = multiprocessing.get_context("fork").Process(target=train_here, args=(folder, name, settings, kill_at))
    process.start()
    return process


def to_end(folder: Path, name: str, settings: dict[str, Any], kill_at: int | None = None) -> int:
    process = start(folder, name, settings, kill_at)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode


def outcome(run_dir: Path) -> str:
    """SHA-256 of weights, checkpoint and metrics."""
    newest, *_ = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    weights = [run_dir / "model" / "model.safetensors", *sorted(newest.glob("*.safetensors"))]
    contents = [path.read_bytes() for path in weights] + [json.dumps(timeless(lines_of(run_dir))).encode()]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def check_nothing_lost(run_dir: Path, saved: int) -> int:
    """Asserts that every checkpoint is intact and that the newest is not older than step `saved`; returns its step."""
    from pipeline.run_folder.checkpoint import checkpoints, read_facts, recover

    recover(run_dir)
    steps = [read_facts(folder)["step"] for folder in checkpoints(run_dir)]
    newest = max(steps, default=-1)
    assert newest >= saved, f"step {saved} was saved and is lost; there are {steps}"
    return newest


def kill_at_each_operation(folder: Path, settings: dict[str, Any], expected: str) -> int:
    """Kills one run repeatedly, each time one file operation later; returns the number of kills."""
    kills, saved = 0, -1
    while to_end(folder, "chain", settings, kill_at=kills + 1):
        kills += 1
        saved = check_nothing_lost(folder / "chain", saved)
    assert outcome(folder / "chain") == expected
    return kills


def kill_once_at_each_operation(folder: Path, settings: dict[str, Any], expected: str) -> int:
    """Kills one run at each file operation, the first to the last, and resumes each to its end; returns their number."""
    kills = 0
    while to_end(folder, f"once-{kills}", settings, kill_at=kills + 1):
        check_nothing_lost(folder / f"once-{kills}", -1)
        assert to_end(folder, f"once-{kills}", settings) == 0
        assert outcome(folder / f"once-{kills}") == expected
        shutil.rmtree(folder / f"once-{kills}")
        kills += 1
    return kills


def kill_at_random_instants(folder: Path, settings: dict[str, Any], expected: str, number: int, seconds: float) -> int:
    """Kills each run at random instants until it ends; returns the number of kills."""
    kills, draw = 0, random.Random(number)
    while kills < number:
        name, saved, longest = f"random-{kills}", -1, 1.2 * seconds
        while True:
            process = start(folder, name, settings)
            process.join(draw.uniform(0.0, longest))
            longest *= 1.1  # so that the run ends, even if the machine has become slower
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            saved = check_nothing_lost(folder / name, saved)
        assert process.exitcode == 0 and outcome(folder / name) == expected
        shutil.rmtree(folder / name)
    return kills


def work(folder: Path, is_long: bool) -> None:
    import torch

    import pipeline.training.loop  # imported once for all forked processes

    assert torch.get_num_threads() == 1 and pipeline.training
    facts = []
    for settings in SETTINGS if is_long else SHORT:
        begun = time.monotonic()
        assert to_end(folder, "whole", settings) == 0
        expected, seconds = outcome(folder / "whole"), time.monotonic() - begun
        fact = {"chain": kill_at_each_operation(folder, settings, expected)}
        fact["instants"] = kill_at_random_instants(folder, settings, expected, 60 if is_long else 20, seconds)
        if is_long:
            fact["once"] = kill_once_at_each_operation(folder, settings, expected)
        facts.append(fact)
        shutil.rmtree(folder)
    print(json.dumps(facts))


def kills(folder: Path, length: str, timeout: float) -> list[dict[str, int]]:
    done = run_process(
        __file__, str(folder), length, timeout=timeout, PYTHONPATH=PYTHONPATH
    )
    assert done.returncode == 0, done.stderr
    facts: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.slow
def test_a_run_survives_kills_at_every_file_operation_and_at_random_instants(tmp_path):
    (fact,) = kills(tmp_path / "runs", "short", timeout=900)
    assert fact["chain"] > 20 and fact["instants"] >= 20


@pytest.mark.slow
@pytest.mark.long
def test_runs_of_several_settings_survive_hundreds_of_kills(tmp_path):
    facts = kills(tmp_path / "runs", "long", timeout=3600)
    assert len(facts) == len(SETTINGS) and all(fact["once"] > 60 and fact["instants"] >= 60 for fact in facts)
    print(facts)


if __name__ == "__main__":
    work(Path(sys.argv[1]), is_long=sys.argv[2] == "long")
