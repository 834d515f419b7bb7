"""Atomic writes of files and folders: complete or absent, with concurrent writers and after a kill at any time."""

import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT

from pipeline.common import files
from pipeline.common.files import folder_written_aside, remove_folder, tidy, write_atomically, written_aside


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


DEAD_PROCESS, RUNNING_PROCESS = 2**22 + 1, 1  # Linux has smaller numbers only, so that no new process gets this one


def leave_aside(path, kind, process, machine=None):
    """Creates the temporary file or folder of another process."""
    return path.with_name(f".{path.name}.{process}@{machine or os.uname().nodename}.{kind}")


def test_a_file_appears_when_it_is_complete_and_is_unchanged_after_an_error(tmp_path):
    path = tmp_path / "facts.json"
    with written_aside(path) as aside:
        aside.write_text("new")
        assert aside.parent == tmp_path and not path.exists()
    assert content(tmp_path) == {"facts.json": "new"}
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert content(tmp_path) == {"facts.json": "new"}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_when_it_is_complete_and_is_unchanged_after_an_error(tmp_path, is_there):
    path = tmp_path / "model"
    if is_there:
        path.mkdir()
        (path / "gone.txt").write_text("old")
    before = content(tmp_path)
    with pytest.raises(KeyError), folder_written_aside(path) as aside:
        (aside / "new.txt").write_text("half")
        raise KeyError
    assert content(tmp_path) == before and path.exists() == is_there
    with folder_written_aside(path) as aside:
        (aside / "figures").mkdir()
        (aside / "figures" / "new.txt").write_text("new")
        assert content(path) == ({"gone.txt": "old"} if is_there else {})
    assert content(tmp_path) == {"model/figures/new.txt": "new"}
    assert os.listdir(tmp_path) == ["model"]


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []

    def watched(name, function):
        def call(first, *rest):
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            events.append((name, os.path.relpath(place, tmp_path).replace(str(os.getpid()), "N").split("@")[0]))
            return function(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        watched(name, getattr(os, name))
    write_atomically(tmp_path / "a", b"1")
    assert events == [("fsync", ".a.N"), ("replace", ".a.N"), ("fsync", ".")]
    events.clear()
    with folder_written_aside(tmp_path / "b") as aside:
        (aside / "c").write_text("2")
    assert [name for name, _ in events] == ["fsync", "fsync", "rename", "fsync"] and events[-1] == ("fsync", ".")


def kill_at(number, function, monkeypatch):
    """Stops the function at the numbered rename without any cleanup, like a kill."""
    count, rename = 0, os.rename

    class Killed(BaseException):
        pass

    def counted(source, target):
        nonlocal count
        count += 1
        if count >= number:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted)
        patch.setattr(files, "remove", lambda path: None)
        try:
            function()
        except Killed:
            return True
    return False


def test_a_kill_at_any_rename_leaves_the_complete_old_or_new_folder(tmp_path, monkeypatch):
    path = tmp_path / "model"

    def write(text):
        with folder_written_aside(path) as aside:
            for name in "ab":
                (aside / name).write_text(text)

    write("old")
    number = 1
    while kill_at(number, lambda: write(f"new {number}"), monkeypatch):
        tidy(tmp_path)
        assert content(tmp_path) == {"model/a": "old", "model/b": "old"}
        number += 1
    assert number == 4, "onto the old folder in vain, the old one away, the new one there"
    tidy(tmp_path)
    assert content(tmp_path) == {"model/a": "new 4", "model/b": "new 4"}


def test_leftovers_of_killed_processes_are_removed_but_not_files_of_running_ones(tmp_path):
    path = tmp_path / "facts"
    dead, alive = leave_aside(path, "tmp", DEAD_PROCESS), leave_aside(path, "tmp", RUNNING_PROCESS)
    elsewhere, long_ago = leave_aside(path, "tmp", 1, "elsewhere"), leave_aside(path, "tmp", 2, "elsewhere.example.org")
    other = leave_aside(tmp_path / "other", "tmp", DEAD_PROCESS)
    lookalike = tmp_path / ".facts.tmp"
    for left in (dead, alive, elsewhere, long_ago, other, lookalike):
        left.write_text("half")
    os.utime(long_ago, (time.time() - 2 * files.OLD_SECONDS,) * 2)
    write_atomically(path, b"new")
    assert set(tmp_path.iterdir()) == {path, alive, elsewhere, other, lookalike}
    tidy(tmp_path, alone=True)
    assert set(tmp_path.iterdir()) == {path, lookalike}


@pytest.mark.parametrize("process, machine", [(1, "elsewhere"), (1, None)])
def test_a_folder_that_was_being_replaced_is_restored(tmp_path, process, machine):
    path = tmp_path / "model"
    replaced = leave_aside(path, "old", process, machine)
    replaced.mkdir()
    (replaced / "a").write_text("old")
    tidy(tmp_path)
    assert content(tmp_path) == {"model/a": "old"}
    path.rename(replaced)
    with folder_written_aside(path) as aside:
        assert content(path) == {"a": "old"}
        (aside / "a").write_text("new")
    assert content(tmp_path) == {"model/a": "new"}


def test_a_folder_that_another_process_creates_meanwhile_is_replaced(tmp_path):
    path = tmp_path / "model"
    with folder_written_aside(path) as aside:
        (aside / "a").write_text("ours")
        path.mkdir()
        (path / "b").write_text("theirs")
    assert content(tmp_path) == {"model/a": "ours"}


def test_concurrent_writers_leave_the_complete_file_of_one(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pipeline.common.files import write_atomically\n"
        "while not Path(sys.argv[3]).exists(): write_atomically(Path(sys.argv[1]), sys.argv[2].encode() * 10_000)"
    )
    (tmp_path / "folder").mkdir()
    path, enough = tmp_path / "folder" / "shared", tmp_path / "enough"
    path.write_text("0" * 10_000)
    writers = [subprocess.Popen([sys.executable, "-c", program, path, digit, enough], cwd=ROOT) for digit in "12"]
    seen = Counter()
    while min(seen["1"], seen["2"]) < 100:
        assert not any(map(subprocess.Popen.poll, writers))
        text = path.read_text()
        assert len(text) == 10_000 and len(set(text)) == 1
        seen[text[0]] += 1
    enough.touch()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert set(path.read_text()) in ({"1"}, {"2"}) and os.listdir(path.parent) == ["shared"]


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "step" / "deep").mkdir(parents=True)
    remove_folder(tmp_path / "step")
    assert os.listdir(tmp_path) == []
