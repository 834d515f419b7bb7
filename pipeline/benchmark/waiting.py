"""The time that a training loop waits for its batches."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline.benchmark.stepclock import StepClock

Item = TypeVar("Item")


def waiting(batches: Iterable[Item], clock: StepClock) -> Iterator[Item]:
    """Yields the batches and adds the time spent waiting for each, while the clock runs, to clock.waited."""
    iterator = iter(batches)
    end = object()
    while True:
        began = time.perf_counter()
        batch = next(iterator, end)
        if clock.is_running:
            clock.waited += time.perf_counter() - began
        if batch is end:
            return
        yield batch  # type: ignore[misc]
