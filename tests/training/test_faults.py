"""Faults: a full disk, a lost folder, lost workers, broken images. A run survives them or ends with advice."""

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, assert_identical, flags, wait_for

from pipeline.common.stopping import TrainingFailed
from pipeline.run_folder import checkpoint_writer

EVERY_STEP = {"checkpoint_every_steps": 1, "log_every": 1, "monitor": "loss"}


@contextlib.contextmanager
def at_steps(actions):
    """Calls an action before the step of its number, counted from 0 over the run."""
    from pipeline.training import loop, step

    def train_step(state, *arguments):
        actions.get(state.step, lambda: None)()
        return original(state, *arguments)

    original = step.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        yield


def fill_disk():
    """Makes every write to a file fail; Python ignores the signal that the system sends too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def make_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def room_afterwards():
    yield
    make_room()


@pytest.fixture
def whole(finished_run):
    """The run without a fault; its last epoch is its best."""
    summary, run_dir = finished_run(run_name="whole", **EVERY_STEP)
    assert summary["best"]["epoch"] == summary["epochs"] == 2
    return run_dir


@pytest.mark.parametrize("retry_seconds", [0.0, 60.0])
def test_a_full_disk_costs_warnings_until_there_is_room(
    run_training, whole, monkeypatch, capsys, tmp_path, room_afterwards, retry_seconds
):
    def fill_disk_once_step_3_is_saved():
        wait_for((tmp_path / "run" / "checkpoints" / "step-00000003").exists)  # a thread writes it
        fill_disk()

    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", retry_seconds)
    with at_steps({3: fill_disk_once_step_3_is_saved, 7: make_room}):
        _, run_dir = run_training(**EVERY_STEP)
    assert_identical(run_dir, whole)
    printed = capsys.readouterr().err
    assert printed.count("could not be written") >= 3 and "Step 3 is saved." in printed
    assert "metrics.jsonl cannot be written" in printed and "kept in memory" in printed


def test_a_disk_that_stays_full_ends_the_run_with_advice_and_the_run_resumes_from_the_last_checkpoint(
    run_training, whole, capsys, tmp_path, room_afterwards
):
    def fill_disk_once_step_4_is_saved():
        wait_for((tmp_path / "run" / "checkpoints" / "step-00000004").exists)  # a thread writes it
        fill_disk()

    with at_steps({4: fill_disk_once_step_4_is_saved}), pytest.raises(
        TrainingFailed, match="Make room there first. To resume: python train.py"
    ):
        run_training(**EVERY_STEP)
    make_room()
    run_training(**EVERY_STEP)
    assert "step-00000004: epoch 1, step 4" in capsys.readouterr().out
    assert_identical(tmp_path / "run", whole)


def test_the_best_checkpoint_is_kept_in_memory_while_it_cannot_be_written(run_training, monkeypatch, room_afterwards):
    """The first epoch is the best; its checkpoint is written when later ones are."""
    settings = {"epochs": 3, "lr": 1e-12}
    _, whole = run_training(run_name="whole", **settings)
    with at_steps({3: fill_disk, 12: make_room}):
        summary, run_dir = run_training(**settings)
    assert summary["best"]["epoch"] == 1
    assert_identical(run_dir, whole)


@pytest.mark.parametrize("bring_back", ["moved back", "made anew, empty"])
def test_a_run_survives_the_loss_of_its_folder(run_training, whole, tmp_path, capsys, monkeypatch, bring_back):
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.0)
    run_dir = tmp_path / "run"

    def lose():
        run_dir.rename(tmp_path / "elsewhere")

    def find():
        if bring_back == "moved back":
            (tmp_path / "elsewhere").rename(run_dir)
        else:
            shutil.rmtree(tmp_path / "elsewhere")
            run_dir.mkdir()

    with at_steps({6: lose, 8: find}):
        run_training(**EVERY_STEP)
    assert "No such file or directory" in capsys.readouterr().err
    assert_identical(run_dir, whole)
    assert {"config.yaml", "summary.json", "model", "checkpoints"} <= set(os.listdir(run_dir))


def test_the_loss_of_the_best_checkpoint_is_reported(run_training, tmp_path):
    def lose():
        for thread in threading.enumerate():
            if thread.name == "checkpoint writer":
                thread.join()
        shutil.rmtree(tmp_path / "run" / "checkpoints")

    with at_steps({5: lose}), pytest.raises(
        TrainingFailed, match="of the best epoch, 1, is lost.*--init_from .*00000010"
    ):
        run_training(lr=1e-12)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    weights = tmp_path / "run" / "checkpoints" / "step-00000010"
    run_training(run_name="anew", init_from=str(weights))


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """Of 600 KiB: two checkpoints fit beside each other, the saved model does not."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("requires a new mount namespace")
    (tmp_path / "disk").mkdir()
    settings = flags(output_dir=str(tmp_path / "disk"))
    full = (
        f"mount -t tmpfs -o size=600k tmpfs {tmp_path / 'disk'} && exec {sys.executable} train.py {' '.join(settings)}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", full], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "No space left on device" in ended.stderr and "To resume: python train.py --config" in ended.stderr


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run_with_advice_and_the_run_resumes_identically(run_training, tmp_path, monkeypatch):
    from pipeline.training import finish

    def own_workers():
        return [child for child in multiprocessing.active_children() if child not in others]

    def summary_while_workers_die(*arguments):
        for worker in own_workers():
            worker.kill()
            worker.join()
            died.append(worker.exitcode)
        return make_summary(*arguments)

    settings = {**EVERY_STEP, "loader": "workers", "num_workers": 2, "epochs": 3}
    _, whole = run_training(run_name="whole", **settings)
    others = multiprocessing.active_children()  # workers of earlier runs
    died, make_summary = [], finish.make_summary
    with monkeypatch.context() as patch, at_steps({7: lambda: own_workers()[0].kill()}):
        patch.setattr(finish, "make_summary", summary_while_workers_die)
        with pytest.raises(TrainingFailed, match="worker was killed by SIGKILL.*Lower --num_workers"):
            run_training(**settings)
    assert -signal.SIGKILL in died, "a second worker died while summary.json was written"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "killed by SIGKILL" in summary["reason"]
    _, run_dir = run_training(**settings)
    assert_identical(run_dir, whole)


def test_an_unexpected_error_of_the_writer_is_raised(run_training, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training()


def test_a_file_that_is_refused_half_way_keeps_no_half_line(tmp_path, monkeypatch):
    from pipeline.common.files import LineFile

    file = LineFile(tmp_path / "lines", 0)
    file.append("first")
    real = file.file

    class Full:
        def write(self, data):
            real.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    file.file = Full()
    file.append("second")
    assert (tmp_path / "lines").read_text() == "first\n" and file.num_bytes == len("first\nsecond\n")
    file.file = real
    file.append("third")
    file.close()
    assert (tmp_path / "lines").read_text() == "first\nsecond\nthird\n"


def test_the_length_of_a_file_never_counts_a_line_twice(tmp_path):
    """A checkpoint records it, while the thread that writes the checkpoint before it writes lines that a full disk refused."""
    from pipeline.common.files import LineFile

    class Switching(LineFile):
        """Between the two statements that turn waiting lines into written ones, another thread runs."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "written" and value:
                reader.start()
                reader.join(0.1)  # with the lock, it waits

    file, found = Switching(tmp_path / "lines", 0), []
    reader = threading.Thread(target=lambda: found.append(file.num_bytes))
    file.waiting = b"first\n"
    file.sync()
    reader.join()
    assert found == [len("first\n")]
