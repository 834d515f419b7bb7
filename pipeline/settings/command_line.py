"""What the commands share: arguments whose mistakes cost one line, and failures as exit statuses."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.common.suggestions import did_you_mean
from pipeline.settings.parser import fail


class CommandFailed(RuntimeError):
    """The command cannot go on, or what it made is wrong; nothing half-made is left."""


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that names close matches of a misspelt option and ends with status 2 and one line."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}{'' if message.endswith('?') else '.'} All arguments: {self.prog} --help")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, options and positions in any order; argv None reads sys.argv."""
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            fail(f"Unknown option {name!r}.{did_you_mean(name, known)} All of them: {self.prog} --help")
        return args


def one_of(*words: str) -> Callable[[str], str]:
    """The type of an argument that is one of these words."""

    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}.{did_you_mean(text, words)}")
        return text

    return check


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number from `least` on."""

    def check(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return check


def check_output(path: Path | None) -> None:
    """Raises ValueError unless a file can be put there."""
    if path is not None and path.is_dir():
        raise ValueError(f"--output {path} is a folder. Name a file in it.")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} for --output {path}. Make it first.")


def exit_status(command: Callable[[], int]) -> int:
    """What the command returns; else 2 for wrong input, 1 for a failure after it, 130 for Ctrl-C, with one line each."""
    try:
        return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough; nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
