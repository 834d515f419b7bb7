"""Checkpoints: complete or absent, verified when read."""

import json

import pytest
import torch

from pipeline.common.files import REPLACED, UNFINISHED, aside_name, write_json
from pipeline.run_folder.checkpoint import (
    FORMAT,
    BadCheckpoint,
    checkpoint_path,
    checkpoints,
    prune,
    read_facts,
    read_tensors,
    recover,
    save_checkpoint,
)


def save(run_dir, step, value=1.0):
    return save_checkpoint(run_dir, step, {"model": {"weight": torch.full((4, 3), value)}}, {"epoch": step})


def test_what_was_saved_reads_back(tmp_path):
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    folder = save_checkpoint(tmp_path, 7, {"model": {"a": channels_last}}, {"epoch": 2, "history": [{"x": 0.1}]})
    facts = read_facts(folder)
    assert (facts["step"], facts["epoch"], facts["history"]) == (7, 2, [{"x": 0.1}])
    assert facts["files"]["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert torch.equal(read_tensors(folder, "model")["a"], channels_last)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4]),
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: write_json(
            folder / "state.json", {**json.loads((folder / "state.json").read_text()), "format": 99}
        ),
        lambda folder: write_json(
            folder / "state.json", {"format": FORMAT, "files": {"../../secret": {"bytes": 1, "sha256": ""}}}
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    newest = save(tmp_path, 2)
    damage(newest)
    with pytest.raises(BadCheckpoint, match="step-00000002"):
        read_facts(newest)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_every_flipped_bit_is_detected(tmp_path, name):
    folder = save(tmp_path, 7)
    content = (folder / name).read_bytes()
    for place in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(flipped)
        if json_of(flipped) != json_of(content):  # other whitespace does not change the parsed content
            with pytest.raises(BadCheckpoint):
                read_facts(folder)
    (folder / name).write_bytes(content)
    assert read_facts(folder)["step"] == 7


def json_of(content):
    try:
        return json.loads(content)
    except ValueError:
        return bytes(content)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_failed_save_leaves_older_checkpoints_unchanged(tmp_path):
    older = save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, {"model": {"weight": torch.zeros(1)}}, {"not JSON": object()})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    read_facts(older)


def test_an_incomplete_checkpoint_of_a_killed_process_is_ignored_and_deleted(tmp_path):
    older = save(tmp_path, 1)
    aside_name(checkpoint_path(tmp_path, 2), UNFINISHED).mkdir()
    (tmp_path / "checkpoints" / ".step-00000003.17@another.machine.tmp").mkdir()
    (tmp_path / ".model.17@another.machine.tmp").mkdir()
    assert checkpoints(tmp_path) == [older]
    recover(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [older] and list(tmp_path.iterdir()) == [older.parent]


def test_a_checkpoint_that_was_being_replaced_when_the_process_was_killed_is_restored(tmp_path):
    folder = save(tmp_path, 1, value=3.0)
    folder.rename(aside_name(folder, REPLACED))
    recover(tmp_path)
    assert read_facts(folder) and (read_tensors(folder, "model")["weight"] == 3.0).all()


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, value=3.0)
    folder = save(tmp_path, 1, value=4.0)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder] and read_facts(folder)
    assert (read_tensors(folder, "model")["weight"] == 4.0).all()


def test_a_missing_run_folder_is_not_created_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "unmounted", 1)
    assert not (tmp_path / "unmounted").exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    folders = [save(tmp_path, step) for step in range(1, 6)]
    prune(tmp_path, 2, best=folders[1])
    assert checkpoints(tmp_path) == [folders[4], folders[3], folders[1]]
