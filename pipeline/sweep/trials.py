"""A sweep's trial as a separate process: started with its share of the machine, monitored, stopped, and evaluated."""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.common.fork_server import ROOT, TORCH, UNKNOWN, Fork, ForkServer
from pipeline.common.stopping import signal_name
from pipeline.common.system import usable_cores
from pipeline.run_folder import lock
from pipeline.sweep.file import Sweep, fill_command

ORPHAN_SECONDS = 120.0  # how long a run may take to write its checkpoint

LAST_VALUE = ("test/", "train/")  # the last value of these metrics counts, the best value of the others


def shares(num_parallel: int, cores: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """The environment variables that assign each parallel trial its share of the machine.

    devices: the GPUs, as in CUDA_VISIBLE_DEVICES. Each trial gets an equal share of them, or one that it shares with other
    trials. Without GPUs it gets its share of the cores as threads.
    """
    if num_parallel == 1:
        return [{}]
    threads = {"OMP_NUM_THREADS": str(max(cores // num_parallel, 1))}
    if not devices:
        return [threads] * num_parallel
    return [
        {**threads, "CUDA_VISIBLE_DEVICES": ",".join(devices[index::num_parallel] or [devices[index % len(devices)]])}
        for index in range(num_parallel)
    ]


def visible_devices() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in named.split(",") if name] or [str(index) for index in range(torch.cuda.device_count())]


@dataclass
class RunningTrial:
    """A trial's process.

    log_start: where its lines begin in the log; share: number of its share of the machine; earlier: the summary before it
    started; reported: number of values reported to the study; stopped: why it was stopped, "stopped" or "interrupted".
    """

    run_dir: Path
    process: subprocess.Popen | Fork
    log: IO[bytes]
    log_start: int
    share: int
    earlier: Mapping[str, Any]
    began: float = field(default_factory=time.monotonic)
    reported: int = 0
    beats: int = 0
    stopped: str | None = None
    metrics_bytes: int = -1


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. status: completed, stopped (by hyperband), interrupted or failed; facts: its columns in the table."""

    status: str
    value: float | None
    facts: Mapping[str, Any]


@contextlib.contextmanager
def trial_server(sweep: Sweep, num_parallel: int) -> Iterator[ForkServer | None]:
    """Yields the server that forks the trials, which imports torch meanwhile; None where they start as plain processes.

    A fork is possible on Linux, for a command that runs this project's train.py in one process.
    """
    if sys.platform != "linux" or python_arguments(fill_command(sweep, {})) is None:
        yield None
        return
    (share, *_) = shares(num_parallel, usable_cores(), [])  # OpenMP reads its number of threads once
    server = ForkServer({**os.environ, **share}, TORCH)
    try:
        yield server
    finally:
        server.close()


def python_arguments(command: Sequence[str]) -> list[str] | None:
    """ARGUMENTS of a command `python ARGUMENTS` that runs this project's train.py with this Python; None for any other."""
    words = list(command[command[0] == "/usr/bin/env" :])
    is_ours = words[0] == sys.executable and len(words) > 1 and Path(words[1]).resolve() == ROOT / "train.py"
    return words[1:] if is_ours else None


def start_trial(
    sweep: Sweep,
    settings: Mapping[str, Any],
    run_dir: Path,
    environment: Mapping[str, str],
    share: int,
    server: ForkServer | None = None,
) -> RunningTrial:
    """Starts the sweep's command in a new session, so that Ctrl-C in the terminal reaches the sweep only.

    server: forks the process; without one, or if it was killed, the command starts as a plain process. The output is appended to
    logs/NAME.log beside the run's folder. Raises OSError if the command cannot be started.
    """
    own = {"output_dir": str(run_dir.parent), "run_name": run_dir.name}
    command = fill_command(sweep, {**settings, **own})
    stop_orphan(run_dir)
    logs = run_dir.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = open(logs / f"{run_dir.name}.log", "ab")
    # launchers such as accelerate and torchrun are in the folder of this Python
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, "PATH": path, **environment}
    try:
        process = start_process(command, env, log, server)
    except OSError:
        log.close()
        raise
    return RunningTrial(run_dir, process, log, log.tell(), share, read_summary(run_dir))


def start_process(
    command: list[str], env: dict[str, str], log: IO[bytes], server: ForkServer | None
) -> subprocess.Popen | Fork:
    """The process of a command, forked by the server if there is one and it was not killed. Raises OSError."""
    arguments = python_arguments(command)
    if server is not None and arguments is not None:
        with contextlib.suppress(ConnectionError):
            return server.start(arguments, Path.cwd(), env, log.fileno(), log.fileno())
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def ask_to_stop(trial: RunningTrial, why: str) -> None:
    """Sends SIGTERM, after which the trial writes a checkpoint and exits. The other ranks of a run stop with rank 0."""
    trial.stopped = why
    process = training_process(trial.run_dir)
    try:
        if process is not None:
            os.kill(process, signal.SIGTERM)
        else:
            os.killpg(trial.process.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has already ended


def training_process(run_dir: Path) -> int | None:
    """The process of this machine that holds the lock of the run's folder, or None."""
    try:
        file = os.open(run_dir / ".lock", os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None  # free; the content is that of a dead process
    except OSError:
        holder = lock.read(run_dir / ".lock")
        process = holder.get("process")
        return process if isinstance(process, int) and holder.get("machine") == os.uname().nodename else None
    finally:
        os.close(file)


def stop_orphan(run_dir: Path) -> None:
    """Stops a training process that outlived its agent, after a checkpoint from which the trial resumes."""
    process = training_process(run_dir)
    if process is not None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signal.SIGTERM)
        end = time.monotonic() + ORPHAN_SECONDS
        while training_process(run_dir) == process and time.monotonic() < end:
            time.sleep(0.1)


def read_history(run_dir: Path, metric: str) -> list[float]:
    """The values of a metric (split/key, as in the trackers) in the order in which the run logged them."""
    split, key = metric.split("/")
    values = []
    for line in whole_lines(run_dir / "metrics.jsonl"):
        is_epoch = line.get("event") == "epoch"
        if line.get("split") == split.removesuffix("_epoch") and is_epoch == split.endswith("_epoch") and key in line:
            values.append(math.nan if line[key] is None else float(line[key]))  # null stands for NaN and infinity
    return values


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that may be growing; incomplete lines are skipped."""
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def has_news(trial: RunningTrial) -> bool:
    """Whether the run's metrics.jsonl has changed since the last call."""
    try:
        size = (trial.run_dir / "metrics.jsonl").stat().st_size
    except OSError:
        size = 0
    changed, trial.metrics_bytes = size != trial.metrics_bytes, size
    return changed


def best_value(history: Sequence[float], sweep: Sweep) -> float | None:
    """The value of a trial: the best value of a validation metric, the last value of a test or training metric."""
    finite = [value for value in history if math.isfinite(value)]
    if not finite:
        return None
    if sweep.metric.startswith(LAST_VALUE):
        return finite[-1]
    return max(finite) if sweep.maximize else min(finite)


def judge(trial: RunningTrial, sweep: Sweep) -> Outcome:
    """The outcome of a trial whose process has ended."""
    code = trial.process.returncode
    trial.log.close()
    summary = read_summary(trial.run_dir)
    if summary == trial.earlier and summary.get("status") not in ("completed", "early_stopped"):
        summary = {}
    value = best_value(read_history(trial.run_dir, sweep.metric), sweep)
    facts = {
        "epochs": summary.get("epochs"),
        "seconds": summary.get("seconds", round(time.monotonic() - trial.began, 1)),
        "best_accuracy": (summary.get("best") or {}).get("accuracy"),
        "test_accuracy": (summary.get("test") or {}).get("accuracy"),
    }
    if summary.get("status") in ("completed", "early_stopped") and code in (0, UNKNOWN):
        if value is not None:
            return Outcome("completed", value, facts)
        return Outcome("failed", None, {**facts, "error": f"The run logged no finite {sweep.metric}."})
    if trial.stopped is not None:
        return Outcome(trial.stopped, value, facts)
    if code == UNKNOWN:  # the fork server was killed: the trial resumes as a plain process
        return Outcome("interrupted", value, facts)
    error = summary.get("reason") or last_message(trial) or f"It exited with status {code}."
    if code is not None and code < 0 and summary.get("status") is None:
        error = f"Killed by {signal_name(-code)}. {error}"
    return Outcome("failed", value, {**facts, "error": error})


def read_summary(run_dir: Path) -> dict[str, Any]:
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):
        return {}


def last_message(trial: RunningTrial) -> str:
    """The last error line of the trial's output, else its last line, without `error: `."""
    try:
        with open(trial.run_dir.parent / "logs" / f"{trial.run_dir.name}.log", "rb") as file:
            file.seek(trial.log_start)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error: ")]  # a launcher's traceback may follow
    return (errors or lines or [""])[-1].removeprefix("error: ")
