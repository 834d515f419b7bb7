"""Suggestions for a misspelled name, and the check of a name against a table."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the close matches, after a space; an empty string if there is none."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def check_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError, with the list of known names, if `name` is not one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
