"""What the commands share: types of arguments, and mistakes that cost one line."""

import argparse
import importlib
import io
import signal
import sys
import threading

import pytest
from conftest import ROOT, run_process

import train
from pipeline.common.files import written_aside
from pipeline.common.stopping import Interrupted, TrainingFailed
from pipeline.settings.command_line import CommandFailed, above_zero, at_least, exit_status, fraction, one_of

# a command, what it needs at least, and a misspelt option
COMMANDS = {
    "evaluate": (["RUN"], "--splitt", "--split"),
    "predict": (["RUN", "a.png"], "--topk", "--top_k"),
    "export": (["RUN"], "--fromat", "--format"),
    "report.__main__": (["RUN"], "--mistake", "--mistakes"),
    "sweep.__main__": (["sweep.yaml"], "--num_trails", "--num_trials"),
    "benchmark.__main__": (["loop"], "--peer_worker", "--peer_workers"),
    "inspect.__main__": (["digits"], "--max_image", "--max_images"),
    "demo": (["RUN"], "--example", "--examples"),
}


def mistake(capsys: pytest.CaptureFixture, command: str, arguments: list[str]) -> str:
    """The line that a command writes for wrong arguments."""
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"pipeline.{command}").main(arguments)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", [["{}", "1"], ["{}=1"]])
def test_every_command_names_the_option_that_was_meant(command, form, capsys):
    needed, wrong, meant = COMMANDS[command]
    message = mistake(capsys, command, [*needed, *(part.format(wrong) for part in form)])
    name = command.removesuffix(".__main__")
    assert f"Unknown option {wrong!r}. Did you mean {meant!r}" in message and f"python -m pipeline.{name}" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_terminal_cannot_print_is_escaped(command, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        importlib.import_module(f"pipeline.{command}").main([*COMMANDS[command][0], "--ü"])
    terminal.flush()
    assert rb"Unknown option '--\xfc'" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("evaluate", ["RUN", "--split", "tset"], ["'tset' is not one of", "Did you mean 'test'?"]),
        ("predict", ["RUN", "a.png", "--top_k", "0"], ["--top_k", "'0' is not a whole number of 1 or more."]),
        ("predict", ["RUN"], ["PATH"]),
        ("report.__main__", ["RUN", "--target", "90"], ["'90' is not a fraction from 0 to 1; 90 % is 0.9."]),
        ("report.__main__", ["RUN", "--mistakes", "-1"], ["'-1' is not a whole number of 0 or more"]),
        ("sweep.__main__", ["sweep.yaml", "--num_parallel", "two"], ["'two' is not a whole number of 1 or more"]),
        ("benchmark.__main__", ["loop", "--seconds", "0"], ["'0' is not a number above 0"]),
        ("benchmark.__main__", ["lop"], ["Unknown benchmark 'lop'. Did you mean 'loop'?"]),
        ("benchmark.__main__", ["loop", "--modle_name", "x"], ["'--modle_name'. Did you mean '--model_name'"]),
        ("benchmark.__main__", ["optimizers", "--model_name", "x", "--lr", "1"], ["Unknown option '--lr'"]),
        ("benchmark.__main__", ["efficiency", "--factors", "loder"], ["Did you mean 'loader'?"]),
        ("demo", ["RUN", "--port", "65536"], ["'65536' is not a port, a number from 1 to 65535"]),
    ],
)
def test_a_wrong_argument_costs_one_line(command, arguments, words, capsys):
    message = mistake(capsys, command, arguments)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (at_least(0), {"0": 0, "12": 12}, ["-1", "1.5", "", "many"]),
        (at_least(2), {"2": 2}, ["1"]),
        (above_zero, {"1e-3": 0.001, "7": 7.0}, ["0", "-1", "inf", "nan", ""]),
        (fraction, {"0": 0.0, "0.5": 0.5, "1": 1.0}, ["-0.1", "1.1", "nan", "half"]),
        (one_of("a", "b"), {"a": "a"}, ["c", "A", ""]),
    ],
)
def test_types_of_arguments_take_what_they_say_and_nothing_else(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not"):
            kind(text)


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("wrong"), 2, "error: wrong\n"),
        (CommandFailed("failed"), 1, "error: failed\n"),
        (TrainingFailed("diverged"), 1, "error: diverged\n"),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left\n"),
        (Interrupted(15), 143, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_are_exit_statuses(error, status, line, capsys):
    def command() -> int:
        raise error

    assert exit_status(command) == status
    assert capsys.readouterr().err == line
    assert exit_status(lambda: 3) == 3


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_and_removes_what_it_has_written(number, status, tmp_path):
    handlers = signal.getsignal(number)

    def command() -> int:
        with written_aside(tmp_path / "page.html") as aside:
            aside.write_text("half of a p")
            try:
                signal.raise_signal(number)
            except Exception:
                raise AssertionError("a library may handle every Exception") from None
        return 0

    try:
        assert exit_status(command) == status == 130
    except SystemExit as end:
        assert end.code == status == 143
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) is handlers


def test_a_signal_while_an_object_is_deleted_is_not_lost():
    """Python ignores exceptions there, such as those of a signal's handler."""

    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def command() -> int:
        Deleted()
        threading.Event().wait(60)
        return 0

    assert exit_status(command) == 130


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        assert exit_status(lambda: signal.raise_signal(signal.SIGINT) or 3) == 3
    finally:
        signal.signal(signal.SIGINT, earlier)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status(lambda: signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_ends_the_process_at_once(number, tmp_path):
    (tmp_path / "interrupted.py").write_text(f"import signal; signal.raise_signal({int(number)})")
    program = (
        "from pipeline.settings.command_line import exit_status\n"
        "def command():\n"
        "    try: import interrupted\n"
        "    except BaseException: print('as torch, which ignores exceptions while it imports numpy')\n"
        "exit_status(command)"
    )
    ended = run_process("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_imported_prints_no_traceback(command, tmp_path):
    (tmp_path / "argparse.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")  # in the place of Python's
    ended = run_process("-m", f"pipeline.{command}", cwd=tmp_path, fresh=True, PYTHONPATH=str(ROOT))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_path_that_is_too_long_costs_one_line(capsys):
    assert train.main(["--dataset", 300 * "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "File name too long" in error and error.count("\n") == 1
