"""Suggestions for a misspelled name: "Did you mean", and the check of a name against a table."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the close matches, or an empty string when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def check_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError when the name is not one of the known ones, which the message lists."""
    known = list(known)
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
