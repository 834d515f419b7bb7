"""Suggestions for a misspelled name, and the check of a name against a table."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest matches, after a space; of equally close ones the first of `known`. Empty if there is none.

    Upper and lower case are the same.
    """
    known, name = list(known), name.lower()
    cased = {match.lower(): match for match in reversed(known)}
    closest = difflib.get_close_matches(name, cased, n=len(known) or 1, cutoff=0.6)
    # as get_close_matches measures, which sorts equally close names backwards
    closeness = {cased[match]: difflib.SequenceMatcher(None, match, name).ratio() for match in closest}
    matches = sorted(closeness, key=lambda match: (-closeness[match], known.index(match)))[:3]
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def check_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError, with the list of known names, if `name` is not one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")
