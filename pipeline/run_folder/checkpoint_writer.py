"""Saving while training goes on: checkpoints written by a thread from copies, tried again when the disk refuses them."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.common import console
from pipeline.run_folder.checkpoint import Tensors, checkpoint_path, prune, save_checkpoint

RETRY_SECONDS = 60.0


@dataclass
class Job:
    """A checkpoint to be written; best: the step of the best one when it was taken."""

    step: int
    tensors: Mapping[str, Tensors]
    facts: dict[str, Any]
    best: int | None


class CheckpointWriter:
    """Writes one checkpoint at a time. Rank 0 has one.

    A checkpoint that cannot be written is kept in memory, with a warning, and tried again each minute and with the next one;
    only the newest and the best of those are kept. Nothing is pruned before the new checkpoint is whole.
    """

    def __init__(self, run_dir: Path, keep: int, prepare: Callable[[], None]):
        """keep: how many of the newest stay besides the best; prepare: called before each writing, may raise OSError."""
        self.run_dir, self.keep, self.prepare = run_dir, keep, prepare
        self.jobs: list[Job] = []
        self.thread: threading.Thread | None = None
        self.problem: Exception | None = None
        self.retry_at = 0.0
        self.last_saved = -1

    def submit(self, step: int, tensors: Mapping[str, Tensors], facts: dict[str, Any], best: int | None) -> None:
        """Takes a copy of the tensors and has it written. Waits for the writing of the one before."""
        self.join()
        copies = {name: {key: copy(value) for key, value in part.items()} for name, part in tensors.items()}
        self.jobs = [job for job in self.jobs if job.step == best] + [Job(step, copies, facts, best)]
        self.start()

    def start(self) -> None:
        self.thread = threading.Thread(target=self.write_jobs, name="checkpoint writer")
        self.thread.start()

    def write_jobs(self) -> None:
        try:
            while self.jobs:
                job = self.jobs[0]
                self.prepare()
                save_checkpoint(self.run_dir, job.step, job.tensors, job.facts)
                self.last_saved = job.step
                prune(self.run_dir, self.keep, None if job.best is None else checkpoint_path(self.run_dir, job.best))
                self.jobs = self.jobs[1:]
        except Exception as error:  # whatever it is, the loop learns of it through `look_after`
            self.problem = error

    def look_after(self) -> None:
        """Warns of a writing that failed, and begins it anew when it is time. The loop calls it after each step."""
        if self.thread is None or not self.thread.is_alive():
            self.report()
            if self.jobs and time.monotonic() >= self.retry_at:
                self.start()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.report()

    def report(self) -> None:
        """Warns of what the thread met; raises it when it was not the file system's fault."""
        problem, self.problem = self.problem, None
        if problem is None:
            return
        if not isinstance(problem, OSError):
            raise problem
        self.retry_at = time.monotonic() + RETRY_SECONDS
        saved = f"Step {self.last_saved} is saved." if self.last_saved >= 0 else "Nothing is saved yet."
        console.warn(
            f"The checkpoint of step {self.jobs[-1].step} could not be written: {problem}. {saved} Make room there; "
            f"training goes on, and it is tried again in {RETRY_SECONDS:.0f} s and with the next checkpoint."
        )

    def finish(self) -> None:
        """Returns when every checkpoint is written. Raises OSError when one cannot be, after another try."""
        self.join()
        self.write_jobs()
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in the CPU's memory, whatever the training does to the tensor afterwards."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copied.copy_(tensor.detach())
