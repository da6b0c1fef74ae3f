"""Exact assignment of noise to examples."""

import itertools

import numpy as np
import pytest

from jaxherd.data.coupling import couple, coupled_noise, squared_distances


def test_the_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 6, 4, 3)).astype(np.float32)
    found = couple(x, z)
    cost = squared_distances(x.reshape(6, -1), z.reshape(6, -1))
    every = [cost[np.arange(6), list(p)].mean() for p in itertools.permutations(range(6))]
    assert found.cost_after == pytest.approx(min(every))
    assert found.cost_before == pytest.approx(np.trace(cost) / 6)
    assert sorted(found.permutation_B) == list(range(6))
    pairs = ((x - z[found.permutation_B]) ** 2).sum(axis=(1, 2)).mean()
    assert pairs == pytest.approx(found.cost_after, rel=1e-5)


def test_noise_that_fits_is_found_again():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((32, 5, 2)).astype(np.float32)
    order = rng.permutation(32)
    np.testing.assert_array_equal(order[couple(x, x[order]).permutation_B], np.arange(32))


def test_the_seed_decides():
    x = np.random.default_rng(2).standard_normal((16, 3, 2)).astype(np.float32)
    (a, coupling), (b, _), (c, _) = (coupled_noise(x, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert coupling.cost_after < coupling.cost_before
    # What is drawn does not depend on the data, only who gets it.
    other, _ = coupled_noise(-x, 7)
    np.testing.assert_array_equal(np.sort(a.reshape(16, -1), 0), np.sort(other.reshape(16, -1), 0))
    with pytest.raises(ValueError, match="differ in shape"):
        couple(x, x[:, :2])
