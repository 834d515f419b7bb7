"""Shared by the commands: argument types, one-line error messages, exit statuses."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.common import console
from pipeline.common.stopping import Interrupted, TrainingFailed, ended_by_signals
from pipeline.common.suggestions import did_you_mean
from pipeline.settings.parser import fail


class CommandFailed(RuntimeError):
    """The command cannot continue, or its result is wrong. No partial output is left."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that suggests close matches of a misspelt option and exits with status 2 and one line."""

    def __init__(self, **settings: Any):
        console.escape_unprintable()  # every command creates a parser first
        super().__init__(allow_abbrev=False, formatter_class=Help, **settings)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}{'' if message.endswith(('?', '.')) else '.'} All arguments: {self.prog} --help")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses the arguments; options and positional arguments in any order. argv None reads sys.argv."""
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            self.fail_for_unknown(unknown[0])
        return args

    def fail_for_unknown(self, argument: str, also_known: Iterable[str] = ()) -> NoReturn:
        """Exits with status 2 for an unknown argument; also_known: more options that it may be a misspelling of."""
        name = argument.split("=")[0]
        known = [*(option for action in self._actions for option in action.option_strings), *also_known]
        fail(f"Unknown option {name!r}.{did_you_mean(name, known)} All options: {self.prog} --help")


def one_of(*words: str) -> Callable[[str], str]:
    """An argument type that accepts one of these words."""

    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}.{did_you_mean(text, words)}")
        return text

    return check


def at_least(least: int) -> Callable[[str], int]:
    """An argument type that accepts whole numbers of `least` or more."""

    def check(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return check


def port(text: str) -> int:
    """An argument type that accepts the number of a TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")
    return int(text)


def above_zero(text: str) -> float:
    """An argument type that accepts finite numbers above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """An argument type that accepts numbers from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 1; 90 % is 0.9")
    return value


def number(text: str) -> float:
    """The number in the text; NaN, for which every comparison is false, if there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_output(path: Path | None) -> None:
    """Raises ValueError unless `path` can be the name of a new file."""
    if path is not None and path.is_dir():
        raise ValueError(f"--output {path} is a folder. Pass the name of a file.")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} for --output {path}. Create it first.")


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command; returns its status, or 2 for invalid input, 1 for a failure, 128 + n after signal n.

    Prints errors as one line. SIGTERM raises SystemExit with that status.
    """
    try:
        with ended_by_signals():
            return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` closed the pipe; also avoid the flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandFailed, TrainingFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        return 130
