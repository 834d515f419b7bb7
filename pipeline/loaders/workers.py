"""Worker processes that decode images: how they start, how their batches reach the device, what their failures mean."""

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import re
import signal
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.common.stopping import STOPPING, Interrupted, Signals, TrainingFailed, signal_name
from pipeline.data.shards import LostShard
from pipeline.images.decode import BadImage

SHARED_MEMORY = (
    "Shared memory (/dev/shm) is full. Start the container with a larger --shm-size (Docker's default is 64 MB), "
    "or set --num_workers 0."
)
OPEN_FILES = "Too many files are open. Raise the limit with `ulimit -n 65536`, or set --num_workers 0."
MEMORY = "The system may have run out of memory. Lower --num_workers."
UNKNOWN = "Run again with --num_workers 0 to see where it was raised."

# parts of what torch and the system report, and the advice for each
CURES = {
    "shared memory": SHARED_MEMORY,
    "</torch_": SHARED_MEMORY,
    "Bus error": SHARED_MEMORY,
    "Too many open files": OPEN_FILES,
    "ancdata": OPEN_FILES,
    "MemoryError": MEMORY,
    "Cannot allocate memory": MEMORY,
}
CURES_OF_SIGNALS: dict[int, str] = {signal.SIGKILL: MEMORY, signal.SIGBUS: SHARED_MEMORY}
FORWARDED_BY_WORKER = re.compile("Caught .* in DataLoader worker process")
END_SECONDS = 1.0  # from an error of the connection to a worker until the system reports that the worker has ended


class WorkerFailed(TrainingFailed):
    """A worker process failed or was killed; the message names the cause and what to do."""


class WorkerLoader(DataLoader):
    """A DataLoader whose workers persist, leave stopping signals to the main process, and raise errors in the next batch only.

    torch's handler of SIGCHLD would raise the death of a worker at any line of the main process, for example while a checkpoint
    is saved. It is removed. The next batch raises the error: the memory of the worker's batches is lost, or torch, which looks
    for ended workers after five seconds without a batch, finds it.

    sampling: arguments of torch's DataLoader that decide what is read. A dataset returns whole batches.
    """

    def __init__(self, dataset: Dataset, num_workers: int, device: torch.device, **sampling: Any):
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=in_shared_memory,
            worker_init_fn=ignore_stopping_signals,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            **sampling,
        )
        self.processes: list[multiprocessing.process.BaseProcess] = []

    def __iter__(self) -> Any:
        handler, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
        try:
            return super().__iter__()
        finally:
            self.processes += [child for child in multiprocessing.active_children() if child not in others]
            if signal.getsignal(signal.SIGCHLD) is not handler:
                signal.signal(signal.SIGCHLD, handler)

    def exit_code(self) -> int | None:
        """The exit code of a worker that has ended, as of multiprocessing.Process; None if all are running or there is none."""
        if not self.processes:
            return None
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], END_SECONDS)
        for process in self.processes:
            if process.sentinel in ended:
                process.join()
                return process.exitcode
        return None


def ignore_stopping_signals(worker: int) -> None:
    """Called in a worker process. A signal to the process group must not end it before the main process has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kills the daemons at the end of the program. multiprocessing would wait for them after a SIGTERM, which they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of another DataLoader would report them as killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Exit functions run in reverse order: this one before multiprocessing's, which the import of torch registered.
atexit.register(end_workers)


def in_shared_memory(batch: Any) -> Any:
    """The batch as it travels to the main process.

    Moved to shared memory here, a full /dev/shm is an error that the DataLoader forwards. Left to the queue's own thread,
    the batch would be dropped and the main process would wait for it forever.
    """
    return batch if get_worker_info() is None else batch.share_memory_()


def results(loader: WorkerLoader) -> Iterator[Tensor]:
    """The loader's batches. Raises BadImage, LostShard, or WorkerFailed for any other failure of a worker."""
    try:
        yield from loader
    except (BadImage, LostShard) as error:
        raise type(error)(forwarded_cause(error).partition(f"{type(error).__name__}: ")[2] or str(error)) from None
    except Exception as error:  # whatever a worker raised, torch raises again here
        failure = worker_failure(error, loader)
        if failure is None:
            raise
        raise failure from error


def forwarded_cause(error: BaseException) -> str:
    """The line that names the exception in the traceback of a worker that torch made the message; else the message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return after[0] if after else type(error).__name__


def worker_failure(error: BaseException, loader: WorkerLoader) -> WorkerFailed | None:
    """What an error of the loader means; None when it did not come from a worker."""
    causes = [error] if error.__context__ is None else [error, error.__context__]
    if any(isinstance(cause, OSError) and cause.errno == errno.EMFILE or "ancdata" in str(cause) for cause in causes):
        return WorkerFailed(f"The batches of the workers could not be received: {error}. {OPEN_FILES}")
    code = None if FORWARDED_BY_WORKER.match(str(error)) else loader.exit_code()
    if code is not None:
        return WorkerFailed(death(code))
    if str(error).startswith("Caught "):  # forwarded by a worker, or by the thread that pins memory for a GPU
        cause = forwarded_cause(error)
        cure = next((cure for part, cure in CURES.items() if part in cause), UNKNOWN)
        return WorkerFailed(f"A data-loading worker failed: {cause.rstrip('.')}. {cure}")
    return None


@contextlib.contextmanager
def signal_before_failure(signals: Signals, num_processes: int) -> Iterator[None]:
    """Raises Interrupted instead of the failure of a worker, if a signal was received before it.

    A signal to the process group ends workers that are starting and do not ignore it yet, and the server that forks them. With
    several processes the failure remains: whether the others received the signal is not known.
    """
    try:
        yield
    except (WorkerFailed, ConnectionError, EOFError) as error:
        if not signals.received or num_processes > 1:
            raise
        raise Interrupted(signals.received) from error


def death(code: int) -> str:
    """What an exit code of a worker means and what to do. code: as of multiprocessing.Process, negative for a signal."""
    if code >= 0:
        return f"A data-loading worker ended with exit code {code}. {UNKNOWN}"
    return f"A data-loading worker was killed by {signal_name(-code)}. {CURES_OF_SIGNALS.get(-code, UNKNOWN)}"


class CopyAhead:
    """Copies batches to the device; a GPU receives each from pinned memory while it works on the one before.

    It keeps its CUDA stream: torch has a pool of 32, and each holds on to its own cached memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        if self.stream is None:
            yield from (batch.to(self.device) for batch in batches)
            return
        ahead = None
        for pinned in chain(batches, [None]):
            behind = ahead
            if pinned is not None:
                with torch.cuda.stream(self.stream):
                    ahead = pinned.to(self.device, non_blocking=True), self.stream.record_event()
            if behind is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(behind[1])
                behind[0].record_stream(
                    current
                )  # its memory is not given to the next copy before the model has read it
                yield behind[0]
