"""Randomness: draws at an address are always the same, independent of other draws."""

import numpy as np

from pipeline.common.randomness import address, permutation, uniforms


def test_a_sample_draws_the_same_in_any_batch():
    whole = uniforms(np.arange(100), 5, 7, 3)
    order = np.array([50, 3, 99])
    assert (uniforms(order, 5, 7, 3) == whole[order]).all()
    assert (uniforms(np.arange(100), 2, 7, 3) == whole[:, :2]).all()


def test_draws_are_uniform_and_unrelated_across_addresses():
    draws = uniforms(np.arange(20_000), 2, 0, 0)
    other = uniforms(np.arange(20_000), 2, 0, 1)
    assert 0 <= draws.min() and draws.max() < 1
    assert np.abs(np.histogram(draws, bins=10, range=(0, 1))[0] / draws.size - 0.1).max() < 0.005
    together = np.corrcoef(np.concatenate([draws, other], axis=1).T)
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_addresses_and_permutations_differ_by_place_and_repeat():
    places = [(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len({address(*place) for place in places}) == len(places)
    assert address(1, 2) != address(2, 1)
    assert sorted(permutation(50, 1, 2)) == list(range(50))
    assert (permutation(50, 1, 2) == permutation(50, 1, 2)).all()
    assert (permutation(50, 1, 2) != permutation(50, 1, 3)).any()
