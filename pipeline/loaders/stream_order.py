"""The order of a stream: chunks shuffled, dealt to lanes, shuffled within windows, and merged into global batches.

A chunk is what is read in one go, a row group for example. A lane is a part of the epoch that one process and one worker
read from start to end. Every global batch takes from each lane in proportion to its length, so all lanes end together, and
the batches depend on the number of lanes, not on how many processes or workers share the lanes out. Everything is a pure
function of (seed, epoch) and the chunks' sizes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.common.randomness import permutation, uniforms

CHUNK_ORDER, WITHIN_WINDOW = 5, 6  # purposes in the addresses of randomness
FEWEST_LANES, MOST_LANES = 8, 64
CHUNKS_PER_LANE = 8  # at least, before there are more lanes: then whole chunks make lanes of nearly one length
SNAP = 1 / 16  # of a lane: a cut that is so near to a chunk's border moves there


def num_lanes(num_chunks: int, num_samples: int, shuffle_buffer: int, num_processes: int) -> int:
    """How many lanes a split has: a power of two from 8 to 64, as long as the processes can share them out evenly.

    More lanes mix more chunks, but hold as many in memory: no more than shuffle_buffer samples where 8 chunks allow it.
    A number of processes that would get very uneven shares, or more of them than lanes, decides the number of lanes.
    """
    most = min(num_chunks / CHUNKS_PER_LANE, shuffle_buffer * num_chunks / max(num_samples, 1), MOST_LANES)
    lanes = max(FEWEST_LANES, 2 ** int(math.log2(max(most, 1))))
    even = lanes % num_processes == 0 or lanes >= 4 * num_processes
    return lanes if even else num_processes * max(1, lanes // num_processes)


def lane_cuts(ends: np.ndarray, lanes: int) -> np.ndarray:
    """Where the lanes start and end in a row of chunks that end at these samples; int64 [lanes + 1].

    Equal parts, but a cut moves to the border of a chunk that is near, so that nobody reads a chunk for a few of its
    samples. Cuts that separate more lanes (halves, quarters) move further: processes are separated there.
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
    """The lane of each position of the epoch; int16 [samples]. Lanes give pairs at even distances; odd ones come last.

    Pairs, because mixup and cutmix mix two neighbours.
    """
    pairs = sizes // 2
    lanes = np.repeat(np.arange(len(sizes)), pairs)
    numbers = np.arange(len(lanes)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    turns = lanes[np.argsort((numbers + 0.5) / pairs[lanes], kind="stable")]
    return np.concatenate([np.repeat(turns, 2), np.flatnonzero(sizes % 2)]).astype(np.int16)


@dataclass(frozen=True)
class EpochOrder:
    """An epoch of a split.

    rows: int64 [N], lane after lane; cuts: int64 [lanes + 1], where each begins in rows; turns: int16 [N], the lane of each
    position of the epoch. A piece is what a lane has of a chunk: pieces, int64 [N], gives that of each of the rows, chunks,
    int64 [pieces], the chunk of a piece.
    """

    rows: np.ndarray
    cuts: np.ndarray
    turns: np.ndarray
    pieces: np.ndarray
    chunks: np.ndarray


def epoch_order(starts: np.ndarray, lanes: int, shuffle_buffer: int, place: tuple[int, int] | None) -> EpochOrder:
    """The order that belongs to the place (seed, epoch); with None the split's own, dealt out to lanes.

    starts: int64 [chunks + 1], the row at which each chunk's samples begin, and their number; no chunk is empty.
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
    # Every other lane runs backwards, so that both parts of a chunk that was cut are needed at the same time.
    from_start = piece_starts - cuts[lane_of_piece]
    from_end = cuts[lane_of_piece + 1] - np.append(piece_starts[1:], starts[-1])
    depth = np.where(lane_of_piece % 2, from_end, from_start)
    # A window is the pieces of a lane that begin within one stretch of it: its part of the buffer.
    windows = depth // (1 if place is None else max(1, shuffle_buffer // lanes))
    draws = positions if place is None else uniforms(rows, 1, *place, WITHIN_WINDOW)[:, 0]
    by_draw = np.lexsort((draws, windows[pieces], lane_of))
    rows, pieces = rows[by_draw], pieces[by_draw]
    return EpochOrder(rows, cuts, merged(counts), pieces, order[number_of_chunk[is_first]])


class Task(NamedTuple):
    """What a worker does for one batch: takes hold of chunks that are needed soon, gives images of rows, lets chunks go.

    begins: it is the worker's first task of this epoch.
    """

    epoch: int
    rows: np.ndarray
    fetch: list[int]
    drop: list[int]
    begins: bool


@dataclass(frozen=True)
class BatchPlan:
    """A process's share of a global batch: a task for each worker; counts, int64 [lanes]: what the whole batch takes of each."""

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
    """The plan of each of these batches. ahead: a chunk is fetched so many batches before its first sample is needed."""
    lanes = len(order.cuts) - 1
    batch_of_row = np.argsort(order.turns, kind="stable") // batch_size  # rows stand lane by lane: so do equal turns
    first, last = np.zeros((2, len(order.chunks)), np.int64)
    last[order.pieces] = batch_of_row  # the last assignment to an element holds
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
