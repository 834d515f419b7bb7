"""Saves checkpoints in the background: a thread writes copies of the tensors and retries after an OSError."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.common import console
from pipeline.common.files import remove_folder
from pipeline.run_folder.checkpoint import Tensors, checkpoint_path, checkpoints, prune, save_checkpoint

RETRY_SECONDS = 60.0


@dataclass
class Job:
    """A checkpoint to be written.

    best: the step of the best checkpoint at the time of the copy. is_pending: its epoch is trained but not yet validated.
    is_completion: the pending checkpoint of the same step contains the same tensors.
    """

    step: int
    tensors: Mapping[str, Tensors]
    facts: dict[str, Any]
    best: int | None
    is_pending: bool = False
    is_completion: bool = False


class CheckpointWriter:
    """Writes one checkpoint at a time. Only rank 0 has a writer.

    If a checkpoint cannot be written, the writer warns, keeps the copy in memory, and retries every RETRY_SECONDS and with the
    next checkpoint. It keeps only the newest and the best unwritten copy. It prunes only after a new checkpoint is complete,
    and not after a pending one, because the validation may show that its weights are useless.
    """

    def __init__(self, run_dir: Path, keep: int, prepare: Callable[[], None]):
        """keep: number of newest checkpoints to keep besides the best. prepare: called before each write, may raise OSError."""
        self.run_dir, self.keep, self.prepare = run_dir, keep, prepare
        self.jobs: list[Job] = []
        self.thread: threading.Thread | None = None
        self.problem: Exception | None = None
        self.retry_at = 0.0
        self.last_saved = -1
        self.pending: Job | None = None

    def submit(
        self, step: int, tensors: Mapping[str, Tensors], facts: dict[str, Any], best: int | None, is_pending: bool = False
    ) -> None:
        """Copies the tensors to the CPU and starts to write them. Waits until the previous checkpoint is written."""
        self.join()
        copies = {name: {key: copy(value) for key, value in part.items()} for name, part in tensors.items()}
        self.add(Job(step, copies, facts, best, is_pending))

    def complete(self, facts: dict[str, Any], best: int | None) -> None:
        """Starts to replace the pending checkpoint by one with new facts and the same tensors."""
        self.join()
        assert self.pending is not None
        self.add(Job(self.pending.step, self.pending.tensors, facts, best, is_completion=True))

    def add(self, job: Job) -> None:
        self.pending = job if job.is_pending else None
        self.jobs = [other for other in self.jobs if other.step == job.best != job.step] + [job]
        self.start()

    def discard(self, step: int) -> None:
        """Deletes the checkpoint of this step, or does not write it if it is still to be written."""
        self.join()
        self.jobs = [job for job in self.jobs if job.step != step]
        if checkpoint_path(self.run_dir, step).exists():
            remove_folder(checkpoint_path(self.run_dir, step))
        self.last_saved = max((int(folder.name[5:]) for folder in checkpoints(self.run_dir)), default=-1)

    def start(self) -> None:
        self.thread = threading.Thread(target=self.write_jobs, name="checkpoint writer")
        self.thread.start()

    def write_jobs(self) -> None:
        try:
            while self.jobs:
                job = self.jobs[0]
                self.prepare()
                save_checkpoint(self.run_dir, job.step, job.tensors, job.facts, job.is_completion)
                self.last_saved = job.step
                if not job.is_pending:
                    prune(self.run_dir, self.keep, None if job.best is None else checkpoint_path(self.run_dir, job.best))
                self.jobs = self.jobs[1:]
        except Exception as error:  # the main thread reports or raises it in `poll`
            self.problem = error

    def poll(self) -> None:
        """Reports a failed write, and retries it when it is due. The training loop calls it after each step."""
        if self.thread is None or not self.thread.is_alive():
            self.report()
            if self.jobs and time.monotonic() >= self.retry_at:
                self.start()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.report()

    def report(self) -> None:
        """Warns of an OSError in the thread. Raises any other exception that the thread caught."""
        problem, self.problem = self.problem, None
        if problem is None:
            return
        if not isinstance(problem, OSError):
            raise problem
        self.retry_at = time.monotonic() + RETRY_SECONDS
        saved = f"Step {self.last_saved} is saved." if self.last_saved >= 0 else "No checkpoint is saved yet."
        console.warn(
            f"The checkpoint of step {self.jobs[-1].step} could not be written: {problem}. {saved} Free disk space or make the "
            f"folder writable; training continues, next attempts in {RETRY_SECONDS:.0f} s and with the next checkpoint."
        )

    def finish(self) -> None:
        """Waits until every checkpoint is written. Raises OSError if a last attempt fails."""
        self.join()
        self.write_jobs()
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in CPU memory, independent of later changes of the tensor."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copied.copy_(tensor.detach())
