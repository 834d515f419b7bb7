"""Workers: their failures end a run with the cause and the cure, and they leave stopping signals to the main process."""

import errno
import json
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
from conftest import ON_THE_CPU, ROOT, flags, lines_of, start_process, wait_for
from PIL import Image

from pipeline.images.decode import BadImage
from pipeline.loaders.workers import WorkerFailed, make_data_loader, results

CPU = torch.device("cpu")


class Failing(torch.utils.data.Dataset):
    """Raises the error that its row is."""

    def __getitem__(self, error: BaseException) -> torch.Tensor:
        raise error


@pytest.fixture(scope="module", params=[0, 1], ids=["no worker", "a worker"])
def raising(request):
    """Raises errors where the dataset is read, in this process or in a worker."""
    rows: list[BaseException] = []
    loader = make_data_loader(Failing(), request.param, CPU, sampler=rows, batch_size=None)

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
    ended = subprocess.run([*small, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
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
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and lines_of(run_dir), process=process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert list((run_dir / "checkpoints").glob("step-*"))
