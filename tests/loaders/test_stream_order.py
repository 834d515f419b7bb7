"""The order of a stream: lanes end together, and one worker of one process reads a chunk if shares stay balanced."""

from collections import Counter

import numpy as np
import pytest

from pipeline.loaders.stream_order import (
    EpochOrder,
    epoch_order,
    lane_cuts,
    lanes_of,
    merged,
    num_lanes,
    plan_batches,
)


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def chunks_read(order: EpochOrder, lanes: int, num_processes: int, num_workers: int) -> list[list[int]]:
    """The chunks that each worker of each process reads in an epoch."""
    read = []
    for rank in range(num_processes):
        own = lanes_of(rank, num_processes, lanes)
        parts = [lanes_of(worker, num_workers, len(own)) for worker in range(num_workers)]
        plans = list(
            plan_batches(order, 0, 32, range(-(-len(order.rows) // 32)), [own[p.start : p.stop] for p in parts], 3)
        )
        for worker in range(num_workers):
            uses: Counter[int] = Counter()
            fetched = []
            for task in (plan.tasks[worker] for plan in plans):
                fetched += [chunk for chunk in set(task.fetch) if not uses[chunk]]
                uses.update(task.fetch)
                uses.subtract(task.drop)
            assert fetched and not any(uses.values())
            read.append(fetched)
    return read


@pytest.mark.parametrize("num_processes, num_workers", [(1, 4), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_a_chunk_is_read_by_one_worker_of_one_process(num_processes, num_workers):
    sizes = np.random.default_rng(0).integers(85, 96, 200)  # row groups of 100 that lost samples to validation
    starts = np.concatenate([[0], np.cumsum(sizes)])
    lanes = num_lanes(len(sizes), int(starts[-1]), 1000, num_processes)
    order = epoch_order(starts, lanes, 1000, (0, 5))
    read = flat(chunks_read(order, lanes, num_processes, num_workers))
    assert sorted(read) == list(range(len(sizes)))


def test_few_chunks_are_cut_so_that_no_process_waits_for_another():
    starts = np.arange(0, 901, 100)  # nine chunks
    order = epoch_order(starts, 8, 100, (0, 0))
    shares = np.diff(order.cuts).reshape(4, 2).sum(axis=1)
    assert shares.max() <= 1.1 * shares.min()
    read = flat(chunks_read(order, 8, 4, 1))
    assert set(read) == set(range(9)) and len(read) <= 9 + 3
    one = chunks_read(epoch_order(np.array([0, 500]), 8, 100, (0, 0)), 8, 2, 1)
    assert one == [[0], [0]]  # a single row group is read by both


def test_cuts_move_to_a_nearby_border():
    assert lane_cuts(np.array([101, 199, 300, 400]), 4).tolist() == [0, 101, 199, 300, 400]
    assert lane_cuts(np.array([150, 400]), 4).tolist() == [0, 100, 200, 300, 400]


def test_lanes_end_together_and_pairs_stay_together():
    sizes = np.array([40, 20, 0, 21])
    turns = merged(sizes)
    assert np.bincount(turns).tolist() == [40, 20, 0, 21]
    assert (turns[:80:2] == turns[1:80:2]).all()
    for end in range(8, 81, 8):
        assert np.abs(np.bincount(turns[:end], minlength=4) - end * sizes / 81).max() <= 2
