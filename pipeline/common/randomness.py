"""Randomness with an address: every draw is a pure function of where it is used, so no generator state is saved.

Data order is a function of (seed, epoch), augmentation of (seed, epoch, sample), dropout of (seed, step, rank).
"""

import functools

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    """One splitmix64 output for each uint64 state (Steele et al., OOPSLA 2014, https://doi.org/10.1145/2714064.2660195)."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


@functools.lru_cache  # all batches of an epoch use the same address
def address(*parts: int) -> int:
    """A 63-bit seed for the place that the integers identify. Neighbouring places have unrelated seeds."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state ^ np.array([part], np.int64).view(np.uint64))
    return int(state[0] >> np.uint64(1))


def permutation(num_samples: int, *parts: int) -> np.ndarray:
    """A random permutation of 0 .. num_samples - 1 for the place; int64 [num_samples]."""
    return np.random.Generator(np.random.PCG64(address(*parts))).permutation(num_samples)


def uniforms(samples: np.ndarray, num_draws: int, *parts: int) -> np.ndarray:
    """Draws from [0, 1) for each sample number, independent of batch and process; float64 [B, num_draws].

    samples: int64 [B]. parts: identify the place, for example (seed, epoch, purpose).
    """
    key = np.uint64(address(*parts))
    rows = _mix(samples.astype(np.int64).view(np.uint64) ^ key)[:, None]
    draws = _mix(rows + _GOLDEN * np.arange(1, num_draws + 1, dtype=np.uint64)[None, :])
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
