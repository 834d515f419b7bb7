"""What tests share: small runs in this process, real processes, a clean slate for Accelerate."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of processes that run a test file as their program

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, as all it starts would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A run of a second: 5 steps of 16 images an epoch on the embedded set.
SMALL_RUN: dict[str, Any] = {
    "model_name": "simple_mlp",
    "max_train_samples": 100,
    "val_fraction": 0.2,
    "epochs": 2,
    "batch_size": 16,
    "log_every": 2,
    "augment": "light",
    "run_name": "run",
    "lr": 0.05,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its first settings for the whole process; each test begins without them."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run_training(tmp_path: Path, fresh_accelerate: None) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Trains in this process with SMALL_RUN's settings and the given ones; returns the summary and the run's folder."""

    def run(**settings: Any) -> tuple[dict[str, Any], Path]:
        from accelerate.state import AcceleratorState

        from pipeline.settings.config import Config
        from pipeline.training.loop import train

        AcceleratorState._reset_state(reset_partial_state=True)
        config = Config(**{"output_dir": str(tmp_path), **SMALL_RUN, **settings})
        return train(config), config.run_dir

    return run


def flags(**settings: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL_RUN, **settings}.items()]


def start_process(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Starts a Python program, in the project's folder unless told otherwise, with one thread, on the CPU."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def run_process(
    *arguments: str, timeout: float = 120, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python program to its end."""
    process = start_process(*arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{arguments} took more than {timeout} s.\n{out}\n{err}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def torchrun(
    num_processes: int, *arguments: str, program: str = "train.py", timeout: float = 180
) -> subprocess.CompletedProcess:
    """Runs train.py, or another program, in several gloo processes on a free port."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(num_processes),
        "--master_port",
        str(free_port()),
    ]
    return run_process(*launcher, program, *arguments, timeout=timeout, PYTHONPATH=PYTHONPATH)


def in_processes(number: int, work: Callable[..., None], *arguments: Any, **environment: str) -> list[int]:
    """Forks so many processes that find each other over gloo, as a launcher would, each to do the work; for a program that
    has imported torch, with one thread, and used nothing of it. Returns their exit statuses.
    """
    port = str(free_port())

    def work_as(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **environment,
        )  # fmt: skip
        if number == 1:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        work(*arguments)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work_as, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines
    ]


def weights_of(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights, to the last bit."""
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys() and ours
    return all(bool((ours[name] == theirs[name]).all()) for name in ours)
