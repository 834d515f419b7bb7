"""Runs contenders as child processes, one at a time, and measures the memory of each and its descendants."""

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

SAMPLE_SECONDS = 0.2  # between two samples of a child's memory
ENDING_SECONDS = 60.0  # from SIGTERM to SIGKILL; torchrun takes 30 of them to end its processes

PROJECT = Path(__file__).parents[2]


def run_child(
    function: str,
    arguments: Mapping[str, Any],
    *,
    launcher: Sequence[str] = (),
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Calls `module.function` of this package in a new Python process and returns its result.

    The function is called with the arguments, which are sent as JSON, and with `folder`, a folder that is deleted afterwards.
    launcher: modules and arguments before the child's own (`-m torch.distributed.run ...`); options: of Python.
    Adds `seconds_to_start` (to result["first_step_at"]), `peak_memory_bytes` (the largest sampled PSS of the process and its
    descendants, None if the system does not report it), and `stderr`.
    Raises ValueError with the error message of the child, TrainingFailed if it failed without one.
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
    """Runs a program that writes its figures to result_path as a JSON object; returns the same as run_child."""
    paths = [str(PROJECT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile("w+") as stderr:
        began = time.time()
        # in a new session Ctrl-C reaches this process only, which then ends the child and all its workers
        process = subprocess.Popen(
            command, env={**env, **(environment or {})}, stdout=stderr, stderr=stderr, start_new_session=True
        )
        try:
            peak = watch_memory(process)
        finally:
            end(process)
        stderr.seek(0)
        output = stderr.read()
    if process.returncode:
        raise_failure(process.returncode, output)
    result: Row = json.loads(result_path.read_text())
    if "first_step_at" in result:
        result["seconds_to_start"] = result["first_step_at"] - began
    return {**result, "peak_memory_bytes": peak, "stderr": output}


def raise_failure(status: int, output: str) -> None:
    """Raises ValueError with the first error line of the output, else TrainingFailed with its last line."""
    lines = output.strip().splitlines() or [f"it exited with status {status}"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        raise ValueError(errors[0])
    raise TrainingFailed(f"A contender failed: {lines[-1]}")


def end(process: subprocess.Popen) -> None:
    """Ends the process, if it runs, and all other processes of its session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                process.wait(ENDING_SECONDS)
            finally:  # also after a second Ctrl-C
                process.kill()
                process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def watch_memory(process: subprocess.Popen) -> int | None:
    """Waits for the process; returns the largest sampled memory of its process tree in bytes, None if unknown."""
    peak = 0
    while True:
        peak = max(peak, tree_pss(process.pid))
        try:
            process.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak or None


def tree_pss(pid: int) -> int:
    """Memory of a process and its descendants in bytes; 0 if unknown.

    The sum of PSS in /proc/PID/smaps_rollup (https://docs.kernel.org/filesystems/proc.html), which divides shared pages among
    all processes that map them, including other programs.
    """
    return sum(map(pss, descendants(pid)))


def descendants(pid: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for known in found:  # the list grows during the iteration
        found += children.get(known, [])
    return found


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
