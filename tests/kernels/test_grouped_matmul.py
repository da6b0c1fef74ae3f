"""Every implementation of the grouped products against the definition, and that against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from parity import Parity

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import grouped_matmul, grouped_swiglu, quantize
from jaxherd.kernels.grouped_matmul import api, pallas_tpu
from jaxherd.kernels.grouped_matmul.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.kernels.grouped_matmul.tiles import Limits

XLA = ("blocked", "ragged_dot")
PALLAS = ("pallas_tpu", "pallas_gpu")
# Tiles so small that a toy operand has several of them along every axis; and K cut in blocks.
SMALL = Limits(2**20, rows=16, row_chunk=16, inner_chunk=128, columns=128, side=128,
               gradient_chunk=16)  # fmt: skip
CUT = Limits(300_000, rows=16, row_chunk=16, inner_chunk=128, columns=128, side=128,
             gradient_chunk=16)  # fmt: skip
MATMUL = Parity(grouped_matmul, (0, 1))
CASES = {
    "even": (12, 5, 4, (3, 3, 3, 3)),
    "empty_groups": (12, 5, 4, (0, 7, 0, 5)),
    "one_takes_all": (12, 5, 4, (0, 0, 12, 0)),
    "tail": (12, 5, 4, (2, 0, 3, 1)),
    "nothing": (12, 5, 4, (0, 0, 0, 0)),
    "one_group": (9, 7, 3, (9,)),
    "uneven": (37, 9, 6, (20, 1, 0, 16)),
}
# Several tiles of rows and columns, borders inside of tiles, K and N that nothing divides.
PALLAS_CASES = {
    "borders_in_tiles": (70, 40, 200, (20, 1, 0, 16)),
    "one_takes_all": (48, 136, 130, (0, 48, 0)),
    "nothing": (33, 7, 5, (0, 0)),
    "all_tiles_shared": (40, 129, 24, (5, 3, 7, 0, 1, 2, 9, 13)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(api, "limits_of", lambda chip: SMALL)


def draw(rows, inner, columns, groups, dtype="float32", seed=0, matrices=1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inner)), dtype)
    ws = [
        jnp.asarray(rng.normal(size=(groups, inner, columns)) / inner**0.5, dtype)
        for _ in range(matrices)
    ]
    return x, *ws


def tail_of(sizes, garbage):
    """Dirt in the rows of x, of the score and of what comes back that belong to no group."""
    used = int(np.asarray(sizes).sum())

    def dirty(position, array):
        if position in (0, 4, "cotangent"):
            return array.at[used:].set(garbage)
        return array

    return dirty


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


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_a_loop(case):
    rows, inner, columns, sizes = CASES[case]
    x, w = draw(rows, inner, columns, len(sizes))
    dy = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    y, back = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), implementation="reference"), x, w
    )
    wanted = loop_gradients(x, w, sizes, dy)
    for found, expected in zip((y, *back(dy)), (loop(x, w, sizes), *wanted)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(implementation, case):
    rows, inner, columns, sizes = CASES[case]
    x, w = draw(rows, inner, columns, len(sizes))
    MATMUL.check(implementation, (x, w, jnp.asarray(sizes, jnp.int32)))


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize("case", PALLAS_CASES)
def test_pallas_values_and_gradients(implementation, case):
    rows, inner, columns, sizes = PALLAS_CASES[case]
    x, w = draw(rows, inner, columns, len(sizes))
    MATMUL.check(
        implementation,
        (x, w, jnp.asarray(sizes, jnp.int32)),
        interpret=True,
        dirty=tail_of(sizes, np.nan),
    )


def test_inner_axis_in_blocks(monkeypatch):
    """Where all of K does not fit, it is cut, and what the last block reads past K is masked."""
    monkeypatch.setattr(api, "limits_of", lambda chip: CUT)
    x, w = draw(40, 400, 150, 3)
    sizes = jnp.array([13, 0, 20], jnp.int32)
    MATMUL.check("pallas_tpu", (x, w, sizes), interpret=True, dirty=tail_of(sizes, np.nan))


def test_uninitialised_memory_does_not_leak():
    """The interpreter that models TPU memory: all of it starts as NaN, outputs and scratch too."""
    memory = pltpu.InterpretParams(uninitialized_memory="nan")
    sizes = jnp.array([13, 0, 20], jnp.int32)

    def call(x, w, sizes, *, implementation, interpret):
        if implementation == "reference":
            return grouped_matmul(x, w, sizes, implementation="reference")
        return pallas_tpu.grouped_matmul(x, w, sizes, SMALL, memory)

    Parity(call, (0, 1)).check(
        "pallas_tpu", (*draw(40, 24, 130, 3), sizes), dirty=tail_of(sizes, np.nan)
    )


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_garbage_in_the_tail_does_not_leak(implementation, garbage):
    sizes = jnp.array([2, 0, 3], jnp.int32)
    MATMUL.check(implementation, (*draw(11, 5, 4, 3), sizes), dirty=tail_of(sizes, garbage))


@given(
    sizes=st.lists(st.integers(0, 21), min_size=3, max_size=3),
    dirty=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("implementation", XLA)
def test_any_sizes(implementation, sizes, dirty, seed):
    x, w = draw(63, 7, 5, 3, seed=seed)
    given_x = tail_of(sizes, np.nan)(0, x) if dirty else x
    y = _forward[implementation](given_x, w, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(y, loop(x, w, sizes), rtol=1e-5, atol=1e-5)


_forward = {
    name: jax.jit(lambda x, w, s, name=name: grouped_matmul(x, w, s, implementation=name))
    for name in XLA
}


@settings(max_examples=4)
@given(
    rows=st.integers(1, 60),
    inner=st.integers(1, 140),
    columns=st.integers(1, 140),
    shares=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    half=st.booleans(),
    used=st.sampled_from([1.0, 0.6]),
)
@pytest.mark.parametrize("implementation", PALLAS)
def test_any_shape(implementation, rows, inner, columns, shares, half, used):
    """One compilation per example: few of them; the fixed cases are the main test."""
    total = max(sum(shares), 1)
    sizes = jnp.array([int(rows * used) * s // total for s in shares], jnp.int32)
    x, w = draw(rows, inner, columns, len(sizes), "bfloat16" if half else "float32")
    MATMUL.check(
        implementation, (x, w, sizes), interpret=True, gradients=False, dirty=tail_of(sizes, np.nan)
    )


@settings(max_examples=3)
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 140),
    columns=st.integers(1, 140),
    shares=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    half=st.booleans(),
)
@pytest.mark.parametrize("implementation", PALLAS)
def test_gradients_of_any_shape(implementation, rows, inner, columns, shares, half):
    total = max(sum(shares), 1)
    sizes = jnp.array([rows * s // total for s in shares], jnp.int32)
    x, w = draw(rows, inner, columns, len(sizes), "bfloat16" if half else "float32")
    # The definition rounds what comes back once more in bfloat16.
    tolerance = 3e-2 if half else 2e-5
    MATMUL.check(
        implementation, (x, w, sizes), interpret=True, dirty=tail_of(sizes, np.nan),
        tolerance=tolerance,
    )  # fmt: skip


@settings(max_examples=2)
@given(
    rows=st.integers(2, 40),
    inner=st.integers(1, 140),
    columns=st.integers(1, 140),
    groups=st.integers(1, 4),
)
def test_gradients_of_any_experts(rows, inner, columns, groups):
    """Of x, both matrices and the row's score."""
    spec = ArgSpec("any", rows, inner, columns, groups, "swiglu", "float32")
    parity, arguments, sizes = call_of(spec)
    parity.check(
        "pallas_tpu", arguments, interpret=True, dirty=tail_of(sizes, np.nan), tolerance=2e-5
    )


@pytest.mark.parametrize("implementation", ("reference", *XLA))
def test_bfloat16_accumulates_in_float32(implementation):
    x, w = draw(16, 513, 4, 2, "bfloat16")
    sizes = jnp.array([5, 9], jnp.int32)
    wanted = loop(np.asarray(x, np.float32), np.asarray(w, np.float32), sizes)
    y = grouped_matmul(x, w, sizes, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=1e-2, atol=1e-2)


def call_of(spec):
    """Return (parity, arguments) of a spec; the row score is the last argument of a swiglu."""
    matrices = 2 if spec.form == "swiglu" else 1
    x, *weights = draw(
        spec.rows, spec.inner, spec.columns, spec.groups, spec.dtype, matrices=matrices
    )
    if spec.code:
        dtype = {"float8_e4m3fn": "float8_e4m3fn", "int8": "int8"}.get(spec.code, "int4")
        weights = [quantize(w, dtype=dtype, group=spec.group) for w in weights]
        if spec.code == "packed_int4":
            weights = [w.pack() for w in weights]
    sizes = jnp.asarray(spec.group_sizes(used=0.8 if spec.rows > 8 else 1.0))
    differentiable = (0,) if spec.code else tuple(range(1 + matrices))
    if matrices == 1:
        return Parity(grouped_matmul, differentiable), (x, *weights, sizes), sizes
    scale = jax.nn.sigmoid(draw(spec.rows, 1, 1, 1, seed=3)[0][:, 0]).astype(spec.dtype)

    def call(x, gate, up, sizes, scale, **choice):
        return grouped_swiglu(x, gate, up, sizes, row_scale_M=scale, **choice)

    return Parity(call, (*differentiable, 4)), (x, *weights, sizes, scale), sizes


@pytest.mark.parametrize("name", ARG_SPECS)
def test_arg_specs(name):
    """What the models call, smaller, with gradients where they are trained; tails are dirty."""
    spec = ARG_SPECS[name].shrunk()
    parity, arguments, sizes = call_of(spec)
    # A bfloat16 definition rounds after every step, which the fused kernel does not.
    parity.check(
        "pallas_tpu",
        arguments,
        interpret=True,
        gradients=spec.trained,
        dirty=tail_of(sizes, np.nan),
        tolerance=3e-2 if spec.dtype == "bfloat16" else 2e-5,
    )


@pytest.mark.parametrize("implementation", ("blocked", "pallas_gpu"))
@pytest.mark.parametrize("name", ["small_float32", "maverick_decode_int8"])
def test_arg_specs_elsewhere(name, implementation):
    spec = ARG_SPECS[name].shrunk()
    parity, arguments, sizes = call_of(spec)
    parity.check(
        implementation,
        arguments,
        interpret=True,
        gradients=spec.trained,
        dirty=tail_of(sizes, np.nan),
        tolerance=3e-2 if spec.dtype == "bfloat16" else 2e-5,
    )


@pytest.mark.parametrize("form, code, group", [
    ("swiglu", None, None), ("swiglu", "packed_int4", 32), ("matmul", "int8", None),
])  # fmt: skip
@pytest.mark.parametrize("implementation", [*XLA, *PALLAS])
def test_garbage_in_the_tail_of_experts(implementation, form, code, group):
    """Rows, their scores and what comes back: no number where no group is; of codes too."""
    spec = ArgSpec("garbage", 40, 64, 130, 3, form, "float32", code, group)
    parity, arguments, sizes = call_of(spec)
    assert 0 < int(sizes.sum()) < spec.rows
    parity.check(
        implementation, arguments, interpret=True, dirty=tail_of(sizes, np.nan), tolerance=2e-5
    )


@pytest.mark.parametrize("code, group", [(None, None), ("packed_int4", 32)])
def test_uninitialised_memory_does_not_leak_from_experts(code, group):
    """All memory starts as NaN, also that of the two products that are kept for the gradient."""
    memory = pltpu.InterpretParams(uninitialized_memory="nan")
    _, (x, gate, up, sizes, scale), _ = call_of(
        ArgSpec("memory", 40, 64, 130, 3, "swiglu", "float32", code, group)
    )
    dirty = tail_of(sizes, np.nan)
    found = jax.jit(pallas_tpu._gated, static_argnums=(4, 5, 6, 7))(
        dirty(0, x), (gate, up), sizes, dirty(4, scale), SMALL, memory, None, True
    )
    products = [grouped_matmul(x, w, sizes, implementation="reference") for w in (gate, up)]
    hidden = jax.nn.silu(products[0] * scale[:, None]) * products[1] * scale[:, None]
    for one, other in zip(found, (hidden, *products), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("case", ["empty_groups", "tail", "one_takes_all"])
def test_megablox_interpreted(case):
    """jax's Pallas kernel under our seam, in interpret mode, with garbage in the tail."""
    sizes = {"empty_groups": (0, 100, 0, 156), "tail": (30, 0, 99, 1), "one_takes_all": (0, 256)}[
        case
    ]
    x, w = draw(256, 128, 128, len(sizes))
    MATMUL.check(
        "megablox",
        (x, w, jnp.asarray(sizes, jnp.int32)),
        interpret=True,
        dirty=tail_of(sizes, np.nan),
        tolerance=1e-4,
    )


def test_what_is_wrong_is_told():
    x, w, sizes = jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2])
    with pytest.raises(JaxherdError, match="did you mean 'blocked'"):
        grouped_matmul(x, w, sizes, implementation="bloked")
    with pytest.raises(JaxherdError, match="did you mean 'pallas_tpu'"):
        grouped_swiglu(x, w, w, sizes, implementation="palas_tpu")
    for name in ("pallas_tpu", "pallas_gpu", "megablox"):
        with pytest.raises(JaxherdError, match="this program is for cpu"):
            grouped_matmul(x, w, sizes, implementation=name)
    with pytest.raises(JaxherdError, match="'pallas_gpu' runs on gpu"):
        grouped_swiglu(x, w, w, sizes, implementation="pallas_gpu")
    # The annotations tell it first where they are checked, as in the tests.
    with pytest.raises(JaxherdError, match="x has K = 2"):
        api._check("grouped_matmul", x, [jnp.ones((1, 3, 2))], sizes)
    with pytest.raises(JaxherdError, match="2 group sizes for 1 matrices"):
        api._check("grouped_matmul", x, [w], jnp.array([1, 1]))
    with pytest.raises(JaxherdError, match="3 rows are expected of a matrix with 2"):
        grouped_matmul(x, w, sizes, expected_rows=3)
    with pytest.raises(JaxherdError, match="differ in shape"):
        api._check("grouped_swiglu", x, [w, jnp.ones((1, 2, 3))], sizes)
