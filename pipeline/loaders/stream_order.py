"""The order of a stream: shuffles chunks, distributes them to lanes, shuffles within windows, merges into global batches.

A chunk is the unit of reading, for example a row group. A lane is a part of the epoch that one process and one of its workers
read from start to end. Every global batch takes samples from each lane in proportion to its length, so all lanes end together.
The batches depend on the number of lanes, but not on the number of processes or workers that read them. Everything is a pure
function of (seed, epoch) and the sizes of the chunks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.common.randomness import permutation, uniforms

CHUNK_ORDER, WITHIN_WINDOW = 5, 6  # the purpose in the address of a draw
FEWEST_LANES, MOST_LANES = 8, 64
CHUNKS_PER_LANE = 8  # the minimum for more than FEWEST_LANES: lanes of whole chunks are then of nearly equal length
SNAP = 1 / 16  # fraction of a lane: a cut that is this close to the border of a chunk moves to it


def num_lanes(num_chunks: int, num_samples: int, shuffle_buffer: int, num_processes: int) -> int:
    """The number of lanes of a split: a power of two from 8 to 64, if the processes can share it about evenly.

    More lanes mix more chunks but hold more of them in memory: with more than 8 lanes, one chunk per lane is at most
    shuffle_buffer samples. If shares would be very uneven, or there are more processes than lanes, the result is a multiple of
    the number of processes.
    """
    most = min(num_chunks / CHUNKS_PER_LANE, shuffle_buffer * num_chunks / max(num_samples, 1), MOST_LANES)
    lanes = max(FEWEST_LANES, 2 ** int(math.log2(max(most, 1))))
    even = lanes % num_processes == 0 or lanes >= 4 * num_processes
    return lanes if even else num_processes * max(1, lanes // num_processes)


def lane_cuts(ends: np.ndarray, lanes: int) -> np.ndarray:
    """The first sample of each lane, then the number of samples; int64 [lanes + 1]. ends: the end of each chunk, int64 [chunks].

    The lanes are equal parts, but a cut moves to a nearby border of a chunk, so that no process reads a chunk for a few of its
    samples. Cuts between larger groups of lanes (halves, quarters) move further, because they separate processes.
    """
    total = int(ends[-1])
    cuts = [0]
    borders = np.concatenate([[0], ends])
    for lane in range(1, lanes):
        ideal = total * lane / lanes
        nearest = int(borders[np.argmin(np.abs(borders - ideal))])
        near = abs(nearest - ideal) <= SNAP * math.gcd(lane, lanes) * total / lanes
        cuts.append(max(nearest if near else round(ideal), cuts[-1]))
    return np.array([*cuts, total], np.int64)


def merged(sizes: np.ndarray) -> np.ndarray:
    """The lane of each position of the epoch; int16 [samples]. sizes: samples of each lane, int64 [lanes].

    Each lane contributes pairs of samples at even distances, because mixup and cutmix mix neighbours. The unpaired samples of
    odd lanes come last.
    """
    pairs = sizes // 2
    lanes = np.repeat(np.arange(len(sizes)), pairs)
    numbers = np.arange(len(lanes)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    turns = lanes[np.argsort((numbers + 0.5) / pairs[lanes], kind="stable")]
    return np.concatenate([np.repeat(turns, 2), np.flatnonzero(sizes % 2)]).astype(np.int16)


@dataclass(frozen=True)
class EpochOrder:
    """An epoch of a split.

    rows: lane after lane, int64 [N]. cuts: the first index of each lane in rows, then N, int64 [lanes + 1]. turns: the lane of
    each position of the epoch, int16 [N]. A piece is the part of a chunk in one lane. pieces: the piece of each of the rows,
    int64 [N]. chunks: the chunk of each piece, int64 [pieces].
    """

    rows: np.ndarray
    cuts: np.ndarray
    turns: np.ndarray
    pieces: np.ndarray
    chunks: np.ndarray


def epoch_order(starts: np.ndarray, lanes: int, shuffle_buffer: int, place: tuple[int, int] | None) -> EpochOrder:
    """The order for the address `place` (seed, epoch); if None, the unshuffled order of the split, distributed to lanes.

    starts: the first row of each chunk, then the number of rows, int64 [chunks + 1]; no chunk is empty.
    """
    sizes = np.diff(starts)
    order = np.arange(len(sizes)) if place is None else permutation(len(sizes), *place, CHUNK_ORDER)
    ends = np.cumsum(sizes[order])
    cuts = lane_cuts(ends, lanes)
    counts = np.diff(cuts)
    positions = np.arange(starts[-1])
    rows = np.repeat(starts[order] - (ends - sizes[order]), sizes[order]) + positions
    lane_of = np.repeat(np.arange(lanes), counts)
    number_of_chunk = np.repeat(np.arange(len(order)), sizes[order])
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (np.diff(number_of_chunk) != 0) | (np.diff(lane_of) != 0)
    pieces = np.cumsum(is_first) - 1
    piece_starts = positions[is_first]
    lane_of_piece = lane_of[is_first]
    # Every other lane is read backwards, so that both parts of a chunk that was cut are needed at the same time.
    from_start = piece_starts - cuts[lane_of_piece]
    from_end = cuts[lane_of_piece + 1] - np.append(piece_starts[1:], starts[-1])
    depth = np.where(lane_of_piece % 2, from_end, from_start)
    # A window is the pieces of a lane that start within one interval, the lane's share of the buffer.
    windows = depth // (1 if place is None else max(1, shuffle_buffer // lanes))
    draws = positions if place is None else uniforms(rows, 1, *place, WITHIN_WINDOW)[:, 0]
    by_draw = np.lexsort((draws, windows[pieces], lane_of))
    rows, pieces = rows[by_draw], pieces[by_draw]
    return EpochOrder(rows, cuts, merged(counts), pieces, order[number_of_chunk[is_first]])


class Task(NamedTuple):
    """The work of a worker for one batch: starts to fetch chunks, returns the images of rows, releases chunks.

    begins: whether it is the first task of the worker in this epoch.
    """

    epoch: int
    rows: np.ndarray
    fetch: list[int]
    drop: list[int]
    begins: bool


@dataclass(frozen=True)
class BatchPlan:
    """The share of a process in a global batch: one task per worker. counts: samples of the batch per lane, int64 [lanes]."""

    tasks: list[Task]
    counts: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([task.rows for task in self.tasks])


def lanes_of(rank: int, num_processes: int, lanes: int) -> range:
    return range(lanes * rank // num_processes, lanes * (rank + 1) // num_processes)


def plan_batches(
    order: EpochOrder, epoch: int, batch_size: int, batches: range, lanes_of_workers: list[range], ahead: int
) -> Iterator[BatchPlan]:
    """Yields the plan of each batch. ahead: how many batches before its first sample a chunk is fetched."""
    lanes = len(order.cuts) - 1
    batch_of_row = np.argsort(order.turns, kind="stable") // batch_size  # rows are in lane order, and so are equal turns
    first, last = np.zeros((2, len(order.chunks)), np.int64)
    last[order.pieces] = batch_of_row  # the last assignment to an element wins
    first[order.pieces[::-1]] = batch_of_row[::-1]
    own = []
    for worker_lanes in lanes_of_workers:
        pieces = np.unique(order.pieces[order.cuts[worker_lanes.start] : order.cuts[worker_lanes.stop]])
        pieces = pieces[last[pieces] >= batches.start]
        own.append((pieces[np.argsort(first[pieces], kind="stable")], pieces[np.argsort(last[pieces], kind="stable")]))
    used = np.bincount(order.turns[: batches.start * batch_size], minlength=lanes)
    for batch in batches:
        counts = np.bincount(order.turns[batch * batch_size : (batch + 1) * batch_size], minlength=lanes)
        at = order.cuts[:-1] + used
        tasks = []
        for worker_lanes, (by_first, by_last) in zip(lanes_of_workers, own):
            rows = [order.rows[at[lane] : at[lane] + counts[lane]] for lane in worker_lanes]
            begins = batch == batches.start
            needed = range(0 if begins else batch + ahead, min(batch + ahead, batches.stop - 1) + 1)
            fetch = by_first[slice(*np.searchsorted(first[by_first], [needed.start, needed.stop]))]
            drop = by_last[slice(*np.searchsorted(last[by_last], [batch, batch + 1]))]
            chunks = (order.chunks[fetch].tolist(), order.chunks[drop].tolist())
            tasks.append(Task(epoch, np.concatenate([np.zeros(0, np.int64), *rows]), *chunks, begins))
        yield BatchPlan(tasks, counts)
        used += counts
