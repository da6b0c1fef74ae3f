"""Exact assignment of noise to examples."""

import itertools

import numpy as np
import pytest

from jaxherd.data.coupling import couple, coupled_noise, masked_distances, squared_distances


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


def test_masked_distances_count_the_frames_of_the_first():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 4, 6, 2, 2)).astype(np.float32)
    mask = (np.arange(6) < np.array([6, 0, 2, 5])[:, None]).astype(np.float32)
    wanted = [[(np.square(a[i] - b[j]).sum(axis=(1, 2)) * mask[i]).sum() for j in range(4)]
              for i in range(4)]  # fmt: skip
    np.testing.assert_allclose(masked_distances(a, b, mask), wanted, rtol=1e-5)
    found = couple(a, b, mask)
    cost = np.asarray(wanted)
    every = [cost[np.arange(4), list(p)].mean() for p in itertools.permutations(range(4))]
    assert found.cost_after == pytest.approx(min(every), rel=1e-5)
    whole, plain = couple(a, b, np.ones_like(mask)), couple(a, b)
    np.testing.assert_array_equal(whole.permutation_B, plain.permutation_B)
    assert whole.cost_before == pytest.approx(plain.cost_before, rel=1e-9)


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
