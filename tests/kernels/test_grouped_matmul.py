"""Every implementation of the grouped product against a loop: values, gradients, dirty tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import grouped_matmul

XLA = ("reference", "blocked", "ragged_dot")
CASES = {
    "even": (12, 5, 4, (3, 3, 3, 3)),
    "empty_groups": (12, 5, 4, (0, 7, 0, 5)),
    "one_takes_all": (12, 5, 4, (0, 0, 12, 0)),
    "tail": (12, 5, 4, (2, 0, 3, 1)),
    "nothing": (12, 5, 4, (0, 0, 0, 0)),
    "one_group": (9, 7, 3, (9,)),
    "uneven": (37, 9, 6, (20, 1, 0, 16)),
}


def loop(x, w, sizes):
    y = np.zeros((x.shape[0], w.shape[2]), np.float64)
    start = 0
    for group, size in enumerate(sizes):
        y[start : start + size] = np.asarray(x[start : start + size], np.float64) @ w[group]
        start += size
    return y


def loop_gradients(x, w, sizes, dy):
    dx, dw, start = np.zeros(x.shape), np.zeros(w.shape), 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        dx[part] = dy[part] @ w[group].T
        dw[group] = x[part].T @ dy[part]
        start += size
    return dx, dw


def both(implementation, x, w, sizes, dy):
    """Return y, dx, dw."""

    @jax.jit
    def run(x, w, sizes, dy):
        y, back = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w
        )
        return y, *back(dy)

    return [np.asarray(a) for a in run(x, w, np.asarray(sizes, np.int32), dy)]


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(implementation, case):
    rows, inner, columns, sizes = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inner)).astype(np.float32)
    w = rng.normal(size=(len(sizes), inner, columns)).astype(np.float32)
    dy = rng.normal(size=(rows, columns)).astype(np.float32)
    y, dx, dw = both(implementation, x, w, sizes, dy)
    wanted_dx, wanted_dw = loop_gradients(x, w, sizes, dy)
    np.testing.assert_allclose(y, loop(x, w, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, wanted_dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_garbage_in_the_tail_does_not_leak(implementation, garbage):
    rng = np.random.default_rng(0)
    sizes, used = (2, 0, 3), 5
    x = rng.normal(size=(11, 5)).astype(np.float32)
    w = rng.normal(size=(3, 5, 4)).astype(np.float32)
    dy = rng.normal(size=(11, 4)).astype(np.float32)
    wanted_dx, wanted_dw = loop_gradients(x, w, sizes, dy)
    x[used:], dy[used:] = garbage, garbage
    y, dx, dw = both(implementation, x, w, sizes, dy)
    assert (y[used:] == 0).all() and (dx[used:] == 0).all()
    np.testing.assert_allclose(y[:used], loop(x, w, sizes)[:used], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, wanted_dw, rtol=1e-5, atol=1e-5)


@given(
    sizes=st.lists(st.integers(0, 21), min_size=3, max_size=3),
    dirty=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("implementation", XLA)
def test_any_sizes(implementation, sizes, dirty, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(63, 7)).astype(np.float32)
    w = rng.normal(size=(3, 7, 5)).astype(np.float32)
    if dirty:
        x[sum(sizes) :] = np.nan
    y = _forward[implementation](x, w, np.asarray(sizes, np.int32))
    wanted = loop(np.nan_to_num(x), w, sizes)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


_forward = {
    name: jax.jit(lambda x, w, s, name=name: grouped_matmul(x, w, s, implementation=name))
    for name in XLA
}


@pytest.mark.parametrize("implementation", XLA)
def test_bfloat16_accumulates_in_float32(implementation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 513)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(2, 513, 4)), jnp.bfloat16)
    y, dx, dw = both(implementation, x, w, (5, 9), jnp.ones((16, 4), jnp.bfloat16))
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    wanted = loop(np.asarray(x, np.float32), np.asarray(w, np.float32), (5, 9))
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("case", ["empty_groups", "tail", "one_takes_all"])
def test_megablox_interpreted(case):
    """jax's Pallas kernel under our seam, in interpret mode, with garbage in the tail."""
    sizes = {"empty_groups": (0, 100, 0, 156), "tail": (30, 0, 99, 1), "one_takes_all": (0, 256)}[
        case
    ]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 128)).astype(np.float32)
    w = rng.normal(size=(len(sizes), 128, 128)).astype(np.float32)
    dy = rng.normal(size=(256, 128)).astype(np.float32)
    wanted = loop(x, w, sizes)
    wanted_dx, wanted_dw = loop_gradients(x, w, sizes, dy)
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.nan
    y, back = jax.vjp(
        lambda x, w: grouped_matmul(
            x, w, jnp.asarray(sizes), implementation="megablox", interpret=True
        ),
        x,
        w,
    )
    dx, dw = back(dy)
    for found, expected in ((y, wanted), (dx, wanted_dx), (dw, wanted_dw)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_unknown_implementation():
    with pytest.raises(JaxherdError, match="did you mean 'blocked'"):
        grouped_matmul(
            jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), implementation="bloked"
        )
