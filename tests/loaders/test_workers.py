"""Workers: their failures end a run with the cause and the cure, and they leave stopping signals to the main process."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ON_THE_CPU, ROOT, flags, start_process, wait_for
from PIL import Image

from pipeline.images.decode import BadImage
from pipeline.loaders import workers
from pipeline.loaders.workers import WorkerFailed, WorkerLoader, results, worker_failure

CPU = torch.device("cpu")


class Failing(torch.utils.data.Dataset):
    """Raises the error that its row is."""

    def __getitem__(self, error: BaseException) -> torch.Tensor:
        raise error


@pytest.fixture(scope="module", params=[0, 1], ids=["no worker", "a worker"])
def raising(request):
    """Raises errors where the dataset is read, in this process or in a worker."""
    rows: list[BaseException] = []
    loader = WorkerLoader(Failing(), request.param, CPU, sampler=rows, batch_size=None)

    def read(error: BaseException) -> None:
        rows[:] = [error]
        list(results(loader))

    read.num_workers = request.param
    return read


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyError("label"), "KeyError: 'label'.*--num_workers 0"),
        (ValueError("../photos/a.png is odd."), r"ValueError: \.\./photos/a\.png is odd\. Run again"),
        (ValueError("first line\nsecond line"), "failed: ValueError: first line\\. Run again"),
        (MemoryError("Unable to allocate 2 GiB"), "MemoryError: Unable to allocate 2 GiB.*Lower --num_workers"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files.*ulimit -n"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "/dev/shm.*--shm-size"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_a_worker_is_reported_with_its_first_line_and_the_cure_that_fits(raising, error, message):
    with pytest.raises((WorkerFailed, type(error))) as failed:
        raising(error)
    if raising.num_workers or isinstance(error, OSError):
        assert isinstance(failed.value, WorkerFailed) and re.search(message, str(failed.value))
        assert "killed" not in str(failed.value) and "second line" not in str(failed.value)
    else:
        assert type(failed.value) is type(error), "without workers an error is raised as it is"


def test_a_bad_image_keeps_its_type_and_its_message(raising):
    with pytest.raises(BadImage) as failed:
        raising(BadImage("row 3: cut off"))
    assert str(failed.value) == "row 3: cut off"


class Dying(torch.utils.data.Dataset):
    """Row 0 is a tensor; any other row is the exit code, or the signal as a negative number, that ends the worker at `now`."""

    def __init__(self) -> None:
        self.now = multiprocessing.Event()

    def __getitem__(self, code: int) -> torch.Tensor:
        if code:
            self.now.wait()
        if code < 0:
            os.kill(os.getpid(), -code)
        elif code:
            os._exit(code)
        return torch.zeros(1)


@pytest.mark.parametrize(
    "code, message",
    [
        (-signal.SIGKILL, "was killed by SIGKILL. The system may have run out of memory. Lower --num_workers."),
        (-signal.SIGBUS, "was killed by SIGBUS. Shared memory (/dev/shm) is full."),
        (-signal.SIGSEGV, "was killed by SIGSEGV. Run again with --num_workers 0"),
        (-(signal.SIGRTMIN + 6), "was killed by signal 40. Run again"),
        (3, "ended with exit code 3. Run again with --num_workers 0"),
    ],
    ids=lambda value: str(int(value)) if isinstance(value, int) else "",
)
def test_the_end_of_a_worker_is_raised_by_the_next_batch_with_its_cause(code, message, monkeypatch):
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.2,))  # seconds until it looks for ended workers; 5
    dataset = Dying()
    loader = WorkerLoader(dataset, 1, CPU, sampler=[0, code], batch_size=None)
    batches = results(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    dataset.now.set()
    (worker,) = loader.processes
    worker.join()  # no line of this process raises the death
    with pytest.raises(WorkerFailed, match="A data-loading worker " + re.escape(message)):
        next(batches)


def test_an_error_is_not_blamed_on_a_worker_that_is_running_or_on_none(monkeypatch):
    """A dataset over a network raises ConnectionError itself; the thread that pins memory forwards errors of CUDA."""
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    rows: list[Any] = []
    loader = WorkerLoader(Failing(), 0, CPU, sampler=rows, batch_size=None)
    rows[:] = [ConnectionError("the Hub does not answer")]
    with pytest.raises(ConnectionError, match="the Hub does not answer"):
        list(results(loader))
    loader = WorkerLoader(Dying(), 1, CPU, sampler=[0], batch_size=None)
    list(loader)
    pinning = RuntimeError("Caught RuntimeError in pin memory thread for device 0.\n  File\nRuntimeError: CUDA error")
    assert "worker failed: RuntimeError: CUDA error. Run again" in str(worker_failure(pinning, loader))
    assert worker_failure(RuntimeError("Pin memory thread exited unexpectedly"), loader) is None
    loader.processes[0].kill()
    loader.processes[0].join()
    lost = RuntimeError("Caught ConnectionResetError in pin memory thread for device 0.\n  File\nConnectionResetError: 104")
    assert "killed by SIGKILL" in str(worker_failure(lost, loader))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for row in range(48):
        folder = tmp_path / "photos" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (120, 150, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
    return tmp_path / "photos"


def settings_for(photos: Path, output_dir: Path, **settings: Any) -> list[str]:
    own = {"dataset": photos, "output_dir": output_dir, "loader": "workers", "num_workers": 2, "max_train_samples": None}
    return flags(**{**own, "image_size": 112, "batch_size": 8, **settings})


@pytest.mark.slow
def test_a_full_shared_memory_ends_the_run_with_the_cure(photos, tmp_path):
    arguments = [sys.executable, "train.py", *settings_for(photos, tmp_path / "runs", batch_size=16)]
    small = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow a /dev/shm of our own")
    environment = {**os.environ, **ON_THE_CPU}
    ended = subprocess.run([*small, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    assert "--shm-size" in ended.stderr and "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_signal_to_the_process_group_saves_the_run(photos, tmp_path, start_method):
    program = (
        "import multiprocessing, os, sys; os.getpgrp() == os.getpid() or os.setsid(); "  # a fork leads its group already
        f"multiprocessing.set_start_method({start_method!r}, force=True); import train; sys.exit(train.main(sys.argv[1:]))"
    )
    process = start_process("-c", program, *settings_for(photos, tmp_path / "runs", epochs=1000, log_every=1, num_workers=1))
    run_dir = tmp_path / "runs" / "run"
    lines = run_dir / "metrics.jsonl"
    wait_for(lambda: lines.exists() and b"\n" in lines.read_bytes(), process=process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert list((run_dir / "checkpoints").glob("step-*"))
