"""Contenders as processes of their own, one at a time, and the memory that each and its descendants take."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.measuring import Row
from pipeline.common.stopping import TrainingFailed

SAMPLE_SECONDS = 0.2  # between two looks at the memory of a child
ENDING_SECONDS = 60.0  # that a child gets to end by itself when it is asked to; torchrun takes 30 of them

PROJECT = Path(__file__).parents[2]


def run_child(
    function: str,
    arguments: Mapping[str, Any],
    *,
    launcher: Sequence[str] = (),
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Calls `module.function` of this package in a new Python process and returns what it returned.

    The function gets the arguments, which pass as JSON, and `folder`, a folder that is deleted afterwards.
    launcher: modules and arguments before the child's own (`-m torch.distributed.run ...`); options: of Python.
    Added are `seconds_to_start` (to result["first_step_at"]), `peak_memory_bytes` (the largest PSS seen of the process and its
    descendants, None where the system does not tell), and `stderr`.
    Raises ValueError with what the child found wrong, TrainingFailed when it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result_path = Path(folder) / "result.json"
        own = [
            "-m",
            "pipeline.benchmark.child",
            function,
            json.dumps({**arguments, "folder": folder}),
            str(result_path),
        ]
        return run_program([sys.executable, *options, *launcher, *own], result_path, environment)


def run_program(command: Sequence[str], result_path: Path, environment: Mapping[str, str] | None = None) -> Row:
    """Runs a program that writes its figures to result_path as a JSON object; returns as run_child."""
    paths = [str(PROJECT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile("w+") as stderr:
        began = time.time()
        # a session of its own: Ctrl-C reaches this process alone, which then ends the child and all its workers
        process = subprocess.Popen(
            command, env={**env, **(environment or {})}, stdout=stderr, stderr=stderr, start_new_session=True
        )
        try:
            peak = watch_memory(process)
        finally:
            end(process)
        stderr.seek(0)
        told = stderr.read()
    if process.returncode:
        explain_failure(process.returncode, told)
    result: Row = json.loads(result_path.read_text())
    if "first_step_at" in result:
        result["seconds_to_start"] = result["first_step_at"] - began
    return {**result, "peak_memory_bytes": peak, "stderr": told}


def explain_failure(status: int, told: str) -> None:
    """Raises ValueError for what the child called wrong, else TrainingFailed with its last line."""
    lines = told.strip().splitlines() or [f"it ended with status {status}"]
    complaints = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if complaints:
        raise ValueError(complaints[0])
    raise TrainingFailed(f"A contender failed: {lines[-1]}")


def end(process: subprocess.Popen) -> None:
    """Ends the process, if it runs, and what it left behind in its session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                process.wait(ENDING_SECONDS)
            finally:  # also when somebody asks a second time
                process.kill()
                process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def watch_memory(process: subprocess.Popen) -> int | None:
    """Waits for the process; returns the largest memory of its tree that was seen, in bytes."""
    peak = 0
    while True:
        peak = max(peak, tree_pss(process.pid))
        try:
            process.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak or None


def tree_pss(pid: int) -> int:
    """Bytes of memory of a process and its descendants, shared pages divided among those that share them; 0 if unknown.

    PSS of /proc/PID/smaps_rollup (https://docs.kernel.org/filesystems/proc.html). Pages of libraries that other programs
    have open too count by their part only.
    """
    return sum(map(pss, descendants(pid)))


def descendants(pid: int) -> list[int]:
    """The process and all that it began, and they."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for known in found:  # grows while it is walked
        found += children.get(known, [])
    return found


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
