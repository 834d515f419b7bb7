"""Worker processes that decode images: how they start, how their batches reach the device, what their failures mean."""

import atexit
import errno
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.common.stopping import STOPPING, TrainingFailed
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


class WorkerFailed(TrainingFailed):
    """A worker process failed or was killed; the message names the cause and what to do."""


def make_data_loader(dataset: Dataset, num_workers: int, device: torch.device, **sampling: Any) -> DataLoader:
    """A DataLoader whose workers live for the whole run and leave stopping to the main process.

    sampling: arguments of torch's DataLoader that decide what is read. A dataset returns whole batches.
    """
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=in_shared_memory,
        worker_init_fn=ignore_stopping_signals,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        **sampling,
    )


def ignore_stopping_signals(worker: int) -> None:
    """Called in a worker process. A signal to the process group must not end it before the main process has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kills the daemons at the end of the program. multiprocessing would wait for them after a SIGTERM, which they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
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


def results(loader: DataLoader) -> Iterator[Tensor]:
    """The loader's batches. Raises BadImage, LostShard, or WorkerFailed for any other failure of a worker."""
    try:
        yield from loader
    except (BadImage, LostShard) as error:
        raise type(error)(forwarded_cause(error).partition(f"{type(error).__name__}: ")[2] or str(error)) from None
    except Exception as error:  # whatever a worker raised, torch raises again here
        failure = worker_failure(error)
        if failure is None:
            raise
        raise failure from error


def forwarded_cause(error: BaseException) -> str:
    """The line that names the exception in the traceback of a worker that torch made the message; else the message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return after[0] if after else type(error).__name__


def worker_failure(error: BaseException) -> WorkerFailed | None:
    """What an error of a DataLoader means; None when it did not come from a worker.

    torch reports a killed worker from a signal handler, at any line of the main process; or the pipe to it breaks first.
    """
    text = str(error)
    if text.startswith("Caught ") and ("DataLoader worker" in text or "pin memory thread" in text):
        cause = forwarded_cause(error)
        cure = next((cure for part, cure in CURES.items() if part in cause), UNKNOWN)
        return WorkerFailed(f"A data-loading worker failed: {cause.rstrip('.')}. {cure}")
    if "DataLoader worker" in text:
        return WorkerFailed(f"A data-loading worker was killed: {text.splitlines()[0]} {cure_of_death(text)}")
    if isinstance(error, OSError) and error.errno == errno.EMFILE or "ancdata" in text:
        return WorkerFailed(f"The batches of the workers could not be received: {text}. {OPEN_FILES}")
    if isinstance(error, (ConnectionError, EOFError)):
        return WorkerFailed(f"A data-loading worker was killed. {MEMORY}")
    return None if error.__context__ is None else worker_failure(error.__context__)


def cure_of_death(text: str) -> str:
    return SHARED_MEMORY if "Bus error" in text else MEMORY


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
