"""The processes of one run end together: each learns what ended another, instead of waiting for it."""

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from pipeline.common.stopping import Interrupted, TrainingFailed

STORE_SECONDS = 5.0  # how long to wait for the launcher's store, which may be gone with the process that kept it
SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # of a broken collective operation


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Around what every process does. What one raises inside, the others are told.

    Raises TrainingFailed in place of the error of a collective operation that another process left, with that process's
    reason if it could still give one.
    """
    try:
        yield
    except Interrupted:  # which all raise
        raise
    except Exception as error:
        if not is_lost_process(error):
            tell(error)
            raise
        raise TrainingFailed(f"Another process ended: {heard()}") from error


def part() -> None:
    """Ends the processes' group, where there is one: at the end of a program that all of them reach.

    Where it is left out, torch now and then aborts a program that has ended well, while threads of the group still run
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error: Exception) -> bool:
    """Whether the error is that of a collective operation in which another process no longer takes part."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError) or isinstance(error, TrainingFailed):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS)


def store() -> dist.TCPStore:
    """A connection to the store that the launcher, or rank 0, keeps for the processes to meet. Raises RuntimeError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))


def key() -> str:
    """Where this start of the processes keeps its first failure; a restart has its own."""
    return f"failure of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def tell(error: Exception) -> None:
    """Leaves the error where the other processes find it, unless one has left its own before."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ours = isinstance(error, (ValueError, TrainingFailed))
    facts = {"rank": dist.get_rank(), "message": str(error) if ours else f"{type(error).__name__}: {error}"}
    with contextlib.suppress(RuntimeError, KeyError):
        store().compare_set(key(), "", json.dumps(facts))


def heard() -> str:
    """What ended the process that failed first, as a sentence."""
    with contextlib.suppress(RuntimeError, KeyError):
        connection = store()
        if connection.check([key()]):
            facts = json.loads(connection.get(key()))
            return f"process {facts['rank']} failed: {facts['message']}"
    return "it was killed, ran out of memory, or its machine was lost."
