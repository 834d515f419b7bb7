"""Streams of a program: closed ones, as in a job without a terminal."""

import sys

from pipeline.common import console


def test_closed_streams_become_the_null_device(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.escape_unprintable()
    with sys.stdin, sys.stdout, sys.stderr:
        console.say("nothing")
        console.warn("nothing")
        with console.progress_bar(3, 0, "hidden", shown=True) as bar:
            bar.update()
        assert sys.stdin.read() == "" and {sys.stdin.name, sys.stdout.name, sys.stderr.name} == {"/dev/null"}
