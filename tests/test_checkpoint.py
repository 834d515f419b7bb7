"""Checkpoints: whole or not there, verified when read."""

import json

import pytest
import torch

from pipeline.checkpoint import (
    BadCheckpoint,
    checkpoints,
    newest_checkpoint,
    prune,
    read_facts,
    read_tensors,
    save_checkpoint,
    write_json,
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
            folder / "state.json", {"format": 1, "files": {"../../secret": {"bytes": 1, "sha256": ""}}}
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_next_older(tmp_path, damage):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest)
    with pytest.raises(BadCheckpoint, match="step-00000002"):
        read_facts(newest)
    folder, passed_over = newest_checkpoint(tmp_path)
    assert folder == older and len(passed_over) == 1 and "step-00000002" in passed_over[0]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_failed_save_leaves_what_was_there(tmp_path):
    older = save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, {"model": {"weight": torch.zeros(1)}}, {"not JSON": object()})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    read_facts(older)


def test_a_half_written_checkpoint_of_a_killed_process_is_not_seen(tmp_path):
    older = save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.tmp").mkdir()
    assert newest_checkpoint(tmp_path) == (older, [])
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    folders = [save(tmp_path, step) for step in range(1, 6)]
    prune(tmp_path, 2, best=folders[1])
    assert checkpoints(tmp_path) == [folders[4], folders[3], folders[1]]
