"""Ends the processes of a run together: if one fails, the others report its error and do not wait for it."""

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from pipeline.common.stopping import Interrupted, TrainingFailed

END_SECONDS = 30.0  # the longest wait for the other processes at the end of an interrupted run
STORE_SECONDS = 5.0  # timeout of the connection to the store; the process that serves it may have ended
BROKEN_CONNECTION = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in its error message


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Context manager around the work of every process. Publishes an exception raised inside for the other processes.

    If a collective operation fails because another process ended, raises TrainingFailed with the published error of that
    process, if there is one.
    """
    try:
        yield
    except Interrupted:  # all processes raise it
        raise
    except Exception as error:
        if not is_lost_process(error):
            publish(error)
            raise
        raise TrainingFailed(f"Another process ended: {published_reason()}") from error


def end_process_group() -> None:
    """Destroys the process group, if there is one. Call it at the end of a program, where all processes arrive.

    Without it, torch occasionally aborts a program at exit, because threads of the group are still running
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all(seconds: float = END_SECONDS) -> None:
    """Returns once every process has called it, or after `seconds`, if a process has ended without it.

    Launchers such as srun kill the other processes when one ends, so a run that is interrupted ends them together.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    name = f"ended in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with contextlib.suppress(RuntimeError, KeyError):  # a timeout, or the process that serves the store has ended
        connection = store()
        if connection.add(f"number {name}", 1) == dist.get_world_size():
            connection.set(f"all {name}", "")
        connection.wait([f"all {name}"], timedelta(seconds=seconds))


def is_lost_process(error: Exception) -> bool:
    """Whether a collective operation raised the error because another process has ended."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError) or isinstance(error, TrainingFailed):
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in BROKEN_CONNECTION)


def store() -> dist.TCPStore:
    """A connection to the rendezvous store of the launcher or rank 0. Raises RuntimeError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))


def key() -> str:
    """The key of the first failure in the store; each restart has its own."""
    return f"failure of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def publish(error: Exception) -> None:
    """Writes the error to the store, unless another process has already written one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ours = isinstance(error, (ValueError, TrainingFailed))
    facts = {"rank": dist.get_rank(), "message": str(error) if ours else f"{type(error).__name__}: {error}"}
    with contextlib.suppress(RuntimeError, KeyError):
        store().compare_set(key(), "", json.dumps(facts))


def published_reason() -> str:
    """Why the first failed process ended, as the end of a sentence."""
    with contextlib.suppress(RuntimeError, KeyError):
        connection = store()
        if connection.check([key()]):
            facts = json.loads(connection.get(key()))
            return f"process {facts['rank']} failed: {facts['message']}"
    return "it was killed, ran out of memory, or its machine was lost."
