"""Resuming: from any step to the identical result, from the newest intact checkpoint of the run, one process at a time."""

import json
import multiprocessing
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close_figures, assert_identical, cut_back, lines_of, timeless, wait_for, weights_of

from pipeline.models.timm_folder import weights_file
from pipeline.run_folder import lock
from pipeline.run_folder.checkpoint import checkpoints, save_checkpoint
from pipeline.run_folder.lock import FolderLock
from pipeline.run_folder.resume import check_same_settings, find_starts, fixed_settings
from pipeline.settings.config import Config

EXACT = {
    "sgd": {"optimizer": "sgd"},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw, clipped": {"optimizer": "adamw", "lr": 0.01, "clip_grad_norm": 0.5, "label_smoothing": 0.1},
    "muon": {"optimizer": "muon", "lr": 0.01},
    "sam": {"optimizer": "sam", "sam_every": 2},
    "muon with asam": {"optimizer": "muon", "lr": 0.01, "sam_rho": 1.0, "sam_adaptive": True},
    "mixup, cutmix, average": {"mixup": 0.4, "cutmix": 1.0, "ema_decay": 0.2},
    "randaugment, erasing": {"augment": "randaugment", "random_erasing": 0.5},
    "micro-batches": {"micro_batch_size": 5},
    "workers": {"loader": "workers", "num_workers": 2},
    "no worker, alternating flip": {"loader": "workers", "num_workers": 0, "flip": "alternate"},
    "plateau, batch-size schedule": {
        "scheduler": "plateau", "plateau_patience": 1, "batch_size_schedule": {1: 24}, "batch_lr_scaling": "sqrt",
    },
    "frozen at first": {"freeze_epochs": 1, "monitor": "loss"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_run_resumed_from_any_step_ends_the_same_to_the_last_bit(run_training, name, tmp_path):
    settings = {"drop_rate": 0.2, "checkpoint_every_steps": 1, "keep_checkpoints": 99, **EXACT[name]}
    _, whole = run_training(run_name="whole", **settings)
    steps = [int(folder.name[5:]) for folder in checkpoints(whole)]
    assert len(steps) >= 8
    for step in steps if name == "sgd" else steps[2::4]:
        cut_back(whole, tmp_path / f"part-{step}", step)
        _, resumed = run_training(run_name=f"part-{step}", **settings)
        assert_identical(resumed, whole)


@pytest.mark.parametrize(
    "changed, model_name, rel",
    [
        ({"micro_batch_size": 7}, "simple_mlp", 1e-6),
        ({"loader": "workers", "num_workers": 2}, "simple_mlp", 1e-6),
        ({"channels_last": False}, "small_convnet", 1e-4),  # BatchNorm amplifies the rounding
    ],
)
def test_settings_that_change_no_result_may_change_on_resume(run_training, finished_run, tmp_path, changed, model_name, rel):
    settings = {"model_name": model_name, "lr": 0.01, "checkpoint_every_steps": 1, "keep_checkpoints": 99}
    _, whole = finished_run(run_name="whole", **settings)
    cut_back(whole, tmp_path / "part", 7)
    _, resumed = run_training(run_name="part", **settings, **changed)
    assert_close_figures(resumed, whole, rel)


def test_starting_an_ended_run_again_reports_it_and_changes_nothing(run_training, finished_run, capsys):
    summary, run_dir = finished_run()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    again, _ = run_training()
    assert again == summary and "has ended (completed)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_a_damaged_summary_is_written_again(run_training, finished_run):
    summary, run_dir = finished_run()
    (run_dir / "summary.json").write_text('{"status": "comp')
    again, _ = run_training()
    assert again["test"] == summary["test"] == json.loads((run_dir / "summary.json").read_text())["test"]


def test_resuming_from_an_older_checkpoint_works_more_than_once(run_training):
    settings = {"checkpoint_every_steps": 5, "keep_checkpoints": 9}
    _, run_dir = run_training(**settings)
    lines, weights = timeless(lines_of(run_dir)), weights_of(run_dir)
    for _ in range(2):
        (run_dir / "summary.json").unlink()
        run_training(**settings, resume=str(run_dir / "checkpoints" / "step-00000005"))
        assert timeless(lines_of(run_dir)) == lines
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(run_dir).items())


def test_a_run_is_not_resumed_with_other_settings(run_training, finished_run, tmp_path):
    finished_run()
    with pytest.raises(ValueError, match=f"started with other settings: lr 0.05 -> 0.1.*--init_from {tmp_path / 'run'}\\.$"):
        run_training(lr=0.1)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="started with other settings: lr 0.05 -> 0.1.*init_from"):
        run_training(lr=0.1)
    with pytest.raises(ValueError, match="resume is never"):
        run_training(resume="never")


def checkpoint_of(config, step, **facts):
    config.run_dir.mkdir(parents=True, exist_ok=True)
    facts = {"settings": fixed_settings(config), **facts}
    return save_checkpoint(config.run_dir, step, {"model": {"weight": torch.full((4, 3), float(step))}}, facts)


def test_an_unfinished_run_with_other_settings_is_refused_with_a_checkpoint_to_start_from(tmp_path):
    config = Config(output_dir=str(tmp_path), run_name="run")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(ValueError, match=r"seed 7 -> 0\. Keep its settings, or choose another run_name\.$"):
        check_same_settings(config)
    checkpoint_of(config, 3)
    newest = checkpoint_of(config, 5)
    with pytest.raises(ValueError, match=f"start it from these weights with --init_from {newest}\\.$"):
        check_same_settings(config)
    assert weights_file(newest) == newest / "model.safetensors"


def damage_bytes(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])


def make_foreign(folder):
    config = Config(output_dir=str(folder.parent / "other"), run_name="run", seed=7)
    other = checkpoint_of(config, int(folder.name[5:]))
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize("damage, reason", [(damage_bytes, "damaged"), (make_foreign, r"another run \(seed 7 -> 0\)")])
def test_a_damaged_or_foreign_checkpoint_is_skipped_for_the_next_older_one(tmp_path, damage, reason):
    config = Config(output_dir=str(tmp_path), run_name="run")
    older, newest = checkpoint_of(config, 1), checkpoint_of(config, 2)
    damage(newest)
    starts, skipped = find_starts(config)
    assert starts == [older] and len(skipped) == 1
    assert re.search(f"Skipped .*step-00000002.*{reason}", skipped[0])
    damage(older)
    with pytest.raises(ValueError, match="no intact checkpoint left. Delete the folder"):
        find_starts(config)


def test_a_checkpoint_of_another_model_is_never_loaded(run_training, finished_run, tmp_path, capsys):
    """Its state.json has the same settings, but its tensors are other ones."""
    settings = {"checkpoint_every_steps": 1, "keep_checkpoints": 99}
    _, whole = finished_run(run_name="whole", **settings)
    cut_back(whole, tmp_path / "part", 6)
    config = Config(**{**vars(Config()), "output_dir": str(tmp_path), "run_name": "part"})
    facts = json.loads((whole / "checkpoints" / "step-00000006" / "state.json").read_text())
    (tmp_path / "part" / "checkpoints" / "step-00000006").unlink()
    keys = ("settings", "epoch", "batch", "step", "samples", "skipped_steps", "seconds", "train_seconds", "history")
    copied = {key: facts[key] for key in (*keys, "logged", "last_loss", "sums")}
    save_checkpoint(config.run_dir, 6, {"model": {"foreign": torch.zeros(3)}, "optimizer": {}}, copied)
    _, resumed = run_training(run_name="part", **settings)
    assert "Skipped" in (err := capsys.readouterr().err) and "does not fit this run" in err
    assert_identical(resumed, whole)


def test_two_runs_never_write_to_one_folder(run_training, tmp_path):
    held = FolderLock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on .* choose another run_name"):
        run_training()
    held.release()
    run_training()


def hold_and_die(run_dir):
    FolderLock(run_dir)
    os._exit(9)


def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path, monkeypatch):
    holder = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(tmp_path,))
    holder.start()
    holder.join()
    assert holder.exitcode == 9 and (tmp_path / ".lock").stat().st_size > 0
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=None))  # it does not wait
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("beats_in", [1, 2, 3, None])
def test_the_lock_of_another_machine_holds_while_it_beats(tmp_path, monkeypatch, beats_in):
    """beats_in: the interval with its next heartbeat; in the test, time passes only where the lock waits."""
    intervals = []

    def beat(number):
        (tmp_path / ".lock").write_text(json.dumps({"process": 12, "machine": "far-away", "beats": number}))

    def sleep(seconds):
        intervals.append(seconds)
        if len(intervals) == beats_in:
            beat(2)

    beat(1)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=sleep))
    if beats_in is None:
        FolderLock(tmp_path).release()
    else:
        with pytest.raises(ValueError, match="in use by process 12 on far-away"):
            FolderLock(tmp_path)
    assert intervals == [lock.BEAT_SECONDS] * (beats_in or lock.SILENT_BEATS + 1)  # a last one for others that take it as well


def take_and_hold(run_dir, sleep, other_has_failed):
    """Runs in a forked process. sleep: called where the lock waits."""
    lock.time = SimpleNamespace(sleep=sleep)
    try:
        FolderLock(run_dir)
    except ValueError:
        os._exit(2)
    os._exit(not other_has_failed.wait(timeout=120))


@pytest.fixture
def take_without_locks(tmp_path, monkeypatch):
    """Starts a process that takes the lock on a file system without locks, and holds it until another one has failed."""
    context, takers = multiprocessing.get_context("fork"), []
    other_has_failed = context.Event()

    def no_locks(file, operation):
        raise OSError(lock.NO_LOCKS[0], "No locks available")

    def take(sleep):
        takers.append(context.Process(target=take_and_hold, args=(tmp_path, sleep, other_has_failed)))
        takers[-1].start()

    def exit_codes():
        wait_for(lambda: any(taker.exitcode is not None for taker in takers))
        other_has_failed.set()
        for taker in takers:
            taker.join(timeout=120)
        return [taker.exitcode for taker in takers]

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    take.exit_codes = exit_codes
    return take


def test_without_locks_of_the_file_system_one_of_two_gets_the_folder_at_once(take_without_locks, monkeypatch):
    both, read, calls = multiprocessing.get_context("fork").Barrier(2), lock.read, []

    def read_at_once(path):
        facts = read(path)
        if not calls:  # neither has written when the other one reads
            calls.append(both.wait(120))
        return facts

    monkeypatch.setattr(lock, "read", read_at_once)
    for _ in range(2):
        take_without_locks(lambda seconds: both.wait(120))  # both have written when they look who was last
    assert sorted(take_without_locks.exit_codes()) == [0, 2]


def test_without_locks_of_the_file_system_the_second_of_two_is_refused(take_without_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)

    def beats():
        return lock.read(tmp_path / ".lock").get("beats", 0)

    def until_it_beats(seconds):
        before = beats()
        wait_for(lambda: beats() > before)

    take_without_locks(lambda seconds: None)
    wait_for(lambda: beats() > 3)  # it has taken it
    take_without_locks(until_it_beats)
    assert take_without_locks.exit_codes() == [0, 2]


def test_a_folder_that_is_not_writable_is_reported_before_training(run_training, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write into .*file.*choose another output_dir"):
        run_training(output_dir=str(tmp_path / "file"))
