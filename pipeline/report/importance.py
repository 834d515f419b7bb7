"""Importance of settings: the share of the variance of the results that each setting explains."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST_RUNS = 6  # with fewer, chance dominates
MOST_GROUPS = 4  # groups of a number that has more distinct values


def importances(settings: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """omega squared of each setting, 0 to 1, largest first; empty with too few runs or equal results.

    settings: one dict per run, with the same names. Runs are grouped by the value of one setting at a time; numbers with many
    values form groups of equal size by rank. The share is (SS_between - (k - 1) MS_within) / (SS_total + MS_within) for k groups
    (https://en.wikipedia.org/wiki/Effect_size#Omega-squared_(%CF%892)), and 0 if that is negative. Unlike the plain share
    SS_between / SS_total it does not increase with the number of groups. It is the main effect only: interactions of settings
    are not included.
    """
    results = np.asarray(values, dtype=np.float64)
    if len(results) < FEWEST_RUNS or np.ptp(results) == 0:
        return {}
    shares = {name: omega_squared(groups([run.get(name) for run in settings]), results) for name in settings[0]}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def groups(column: Sequence[Any]) -> list[int]:
    """The group of each run by its value of one setting."""
    distinct = {repr(value) for value in column}
    if len(distinct) > MOST_GROUPS and all(is_number(value) for value in column):
        order = np.argsort(np.argsort(column, kind="stable"), kind="stable")
        first_rank = {value: int(order[column.index(value)]) for value in column}  # keeps equal values in one group
        return [first_rank[value] * MOST_GROUPS // len(column) for value in column]
    names = sorted(distinct)
    return [names.index(repr(value)) for value in column]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def omega_squared(labels: Sequence[int], results: np.ndarray) -> float:
    """The share of the variance of the results, float [N], between the groups; 0 if it cannot be determined."""
    parts = [results[np.asarray(labels) == label] for label in sorted(set(labels))]
    free = len(results) - len(parts)
    if len(parts) < 2 or free < 1:
        return 0.0
    total = float(((results - results.mean()) ** 2).sum())
    within = float(sum(((part - part.mean()) ** 2).sum() for part in parts))
    mean_within = within / free
    return max((total - within - (len(parts) - 1) * mean_within) / (total + mean_within), 0.0)
