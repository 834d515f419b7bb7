"""Runs contenders as child processes, one at a time, and measures the memory of each and its descendants."""

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.measuring import Row
from pipeline.common.stopping import TrainingFailed
from pipeline.common.system import end_tree, tree_memory

SAMPLE_SECONDS = 0.2  # between two samples of a child's memory
ENDING_SECONDS = 60.0  # from SIGTERM to SIGKILL; torchrun takes 30 of them to end its processes

PROJECT = Path(__file__).parents[2]

HELD_BACK = {signal.SIGINT, signal.SIGTERM}
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
C_LIBRARY = ctypes.CDLL(None)


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
    Adds `seconds_to_start` (to result["first_step_at"]), `peak_memory_bytes` (the largest sampled memory of the process and its
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
        with running(command, env={**env, **(environment or {})}, stdout=stderr, stderr=stderr) as process:
            peak = watch_memory(process)
        stderr.seek(0)
        output = stderr.read()
    if process.returncode:
        raise_failure(process.returncode, output)
    result: Row = json.loads(result_path.read_text())
    if "first_step_at" in result:
        result["seconds_to_start"] = result["first_step_at"] - began
    return {**result, "peak_memory_bytes": peak, "stderr": output}


@contextlib.contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A program in a session of its own; at the end of the context it is terminated with all its descendants.

    So Ctrl-C in the terminal reaches this process only. On Linux the program also ends if this process is killed, because it
    would slow down the next measurements. options: of subprocess.Popen.
    """
    process = None
    try:
        # a signal waits until the program is known here: Python would drop it in a fork, or the program would run on
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            begin = functools.partial(begin_program, os.getpid(), earlier)
            process = subprocess.Popen(command, start_new_session=True, preexec_fn=begin, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        yield process
    finally:
        if process is not None:
            end_tree(process, ENDING_SECONDS)
            with contextlib.suppress(ProcessLookupError):  # descendants that it left in its session
                os.killpg(process.pid, signal.SIGKILL)


def begin_program(parent: int, mask: set[int | signal.Signals]) -> None:
    """Makes Linux terminate this process when its parent ends, then restores the signal mask.

    https://man7.org/linux/man-pages/man2/prctl.2.html
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of Python would drop a signal before the program begins
        C_LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def raise_failure(status: int, output: str) -> None:
    """Raises ValueError with the first error line of the output, else TrainingFailed with its last line."""
    lines = output.strip().splitlines() or [f"it exited with status {status}"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        raise ValueError(errors[0])
    raise TrainingFailed(f"A contender failed: {lines[-1]}")


def watch_memory(process: subprocess.Popen) -> int | None:
    """Waits for the process; returns the largest sampled memory of its process tree in bytes, None if unknown."""
    peak = 0
    while True:
        peak = max(peak, tree_memory(process.pid))
        try:
            process.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak or None
