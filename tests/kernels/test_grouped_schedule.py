"""What the kernels visit and read, counted from the schedule and the index maps alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from jaxherd.kernels import grouped_matmul, quantize
from jaxherd.kernels.grouped_matmul import pallas_tpu_forward
from jaxherd.kernels.grouped_matmul.arg_specs import ARG_SPECS
from jaxherd.kernels.grouped_matmul.schedule import (
    forward_schedule,
    gradient_schedule,
    most_visits,
)
from jaxherd.kernels.grouped_matmul.tiles import FALLBACK, LIMITS, forward_tiles, gradient_tiles

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=7)
_forward = jax.jit(forward_schedule, static_argnums=(1, 2))
_gradient = jax.jit(gradient_schedule, static_argnums=(1, 2))


def visits(schedule):
    count = int(schedule.count)
    return [tuple(int(part[v]) for part in schedule[1:6]) for v in range(count)]


@given(sizes=SIZES, extra=st.sampled_from([0, 1, 37]), tile=st.sampled_from([8, 16]))
def test_every_row_is_written_once(sizes, extra, tile):
    sizes = (sizes * 7)[:7]
    rows = max(sum(sizes) + extra, 1)
    schedule = _forward(jnp.asarray(sizes, jnp.int32), rows, tile)
    owner = np.full(rows, -1)
    live, found = int(schedule.live_1[0]), visits(schedule)
    assert len(found) <= most_visits(rows, len(sizes), tile)
    for number, (at, source, group, start, stop) in enumerate(found):
        part = range(max(start, at * tile), min(stop, (at + 1) * tile, rows))
        assert len(part) > 0, "a visit without a row"
        assert (owner[part] == -1).all()
        owner[part] = group if number < live else len(sizes)
        assert number >= live or source == at
    wanted = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows - sum(sizes)])
    np.testing.assert_array_equal(owner, wanted)
    tiles = [at for at, *_ in found]
    assert tiles == sorted(tiles), "a tile that is left may not be visited again"


@given(sizes=SIZES, tile=st.sampled_from([8, 16]))
def test_every_group_has_a_gradient(sizes, tile):
    sizes = (sizes * 7)[:7]
    rows = max(sum(sizes), 1)
    schedule = _gradient(jnp.asarray(sizes, jnp.int32), rows, tile)
    found = visits(schedule)
    assert len(found) <= most_visits(rows, len(sizes), tile)
    groups = [group for _, _, group, _, _ in found]
    assert sorted(set(groups)) == list(range(7)) and groups == sorted(groups)
    summed = np.zeros(7, int)
    for at, _, group, start, stop in found:
        assert 0 <= at <= (rows - 1) // tile
        summed[group] += max(0, min(stop, (at + 1) * tile) - max(start, at * tile))
    np.testing.assert_array_equal(summed, sizes)


def matrices_read(rows, sizes, tile):
    """Return which matrices the kernel copies for one strip of columns: changes of its block."""
    schedule = _forward(jnp.asarray(sizes, jnp.int32), rows, tile)
    blocks = [group for _, _, group, _, _ in visits(schedule)]
    return [group for group, before in zip(blocks, [None, *blocks]) if group != before]


def test_two_rows_over_128_experts_read_two_matrices():
    """By the blocks the grid names, and by the cost that is told to XLA."""
    sizes = np.zeros(128, np.int32)
    sizes[[17, 93]] = 1
    assert matrices_read(2, sizes, 16) == [17, 93]
    assert matrices_read(64, sizes, 16) == [17, 93], "62 rows of the tail read nothing"
    spec = ARG_SPECS["maverick_decode_2"]
    x = jax.ShapeDtypeStruct((2, spec.inner), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((128, spec.inner, spec.columns), jnp.bfloat16)
    tiles = forward_tiles(
        2, spec.inner, spec.columns, LIMITS["v5e"], x_bytes=2, w_bytes=2, matrices=2
    )
    cost = pallas_tpu_forward.cost(x, (w, w), spec.columns, tiles)
    two_experts = 2 * 2 * spec.inner * spec.columns * 2
    assert two_experts <= cost.bytes_accessed <= 1.01 * two_experts


class Fetches:
    """Looks at what the kernel's own index maps name while its grid runs.

    The pipeline copies a block when its index differs from the one before.
    """

    def __init__(self, monkeypatch):
        self._calls = []
        make = pl.pallas_call

        def recording(kernel, *, grid_spec, **options):
            call = make(kernel, grid_spec=grid_spec, **options)

            def run(*operands):
                self._calls.append((grid_spec, operands))
                return call(*operands)

            return run

        monkeypatch.setattr(pallas_tpu_forward.pl, "pallas_call", recording)

    def of(self, operand: int, scalars=None) -> tuple[list[tuple[int, ...]], int]:
        """Return (copied blocks of an operand of the only call, in order, their bytes)."""
        ((spec, operands),) = self._calls
        count = spec.num_scalar_prefetch
        scalars = [np.asarray(s) for s in (scalars or operands[:count])]
        strips, _, blocks = spec.grid
        live_and_tail = int(scalars[-1]) if len(scalars) > count else int(spec.grid[1])
        block_spec, array = spec.in_specs[operand], operands[count + operand]
        copied = []
        for n, v, k in itertools.product(range(strips), range(live_and_tail), range(blocks)):
            at = tuple(int(i) for i in block_spec.index_map(n, v, k, *scalars[:count]))
            if not copied or copied[-1] != at:
                copied.append(at)
        sides = [1 if side is None else side for side in block_spec.block_shape]
        moved = sum(
            int(np.prod([min(s, n - i * s) for s, n, i in zip(sides, array.shape, at)]))
            for at in copied
        )
        return copied, moved * array.dtype.itemsize


GATE, UP = 1, 2
TWO = np.zeros(128, np.int32)
TWO[[17, 93]] = 1


@pytest.mark.parametrize("rows", [2, 64])
def test_two_rows_over_128_experts_copy_two_experts(rows, monkeypatch):
    """As it runs, in interpret mode; what must not be read is no number."""
    fetches, inner, columns = Fetches(monkeypatch), 256, 384
    rng = np.random.default_rng(0)
    x = np.full((rows, inner), np.nan, np.float32)
    x[:2] = rng.normal(size=(2, inner))
    weights = np.full((2, 128, inner, columns), np.nan, np.float32)
    weights[:, [17, 93]] = rng.normal(size=(2, 2, inner, columns)) / inner**0.5
    tiles = dataclasses.replace(
        forward_tiles(rows, inner, columns, FALLBACK, x_bytes=4, w_bytes=4, matrices=2),
        columns=128, inner=128, inner_chunk=128,
    )  # fmt: skip
    found = pallas_tpu_forward.forward(
        jnp.asarray(x), tuple(jnp.asarray(weights)), jnp.asarray(TWO), tiles=tiles, interpret=True
    )
    wanted = np.zeros((rows, columns))
    for row, expert in enumerate((17, 93)):
        gate, up = x[row] @ weights[0, expert], x[row] @ weights[1, expert]
        wanted[row] = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for operand in (GATE, UP):
        copied, moved = fetches.of(operand)
        assert {expert for expert, _, _ in copied} == {17, 93}
        assert moved == 2 * inner * columns * 4, "each of the two once, and nothing else"


def test_mavericks_two_rows_copy_two_experts(monkeypatch):
    """At the widths and tiles of the model, by the index maps of the call alone."""
    fetches, spec = Fetches(monkeypatch), ARG_SPECS["maverick_decode_2"]
    x = jax.ShapeDtypeStruct((spec.rows, spec.inner), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((128, spec.inner, spec.columns), jnp.bfloat16)
    tiles = forward_tiles(
        spec.rows, spec.inner, spec.columns, LIMITS["v5e"], x_bytes=2, w_bytes=2, matrices=2
    )

    def call(x, gate, up):
        return pallas_tpu_forward.forward(x, (gate, up), jnp.asarray(TWO), tiles=tiles)

    jax.eval_shape(call, x, w, w)
    schedule = forward_schedule(jnp.asarray(TWO), spec.rows, tiles.rows)
    for operand in (GATE, UP):
        copied, moved = fetches.of(operand, schedule)
        assert len(copied) > 2 and {expert for expert, _, _ in copied} == {17, 93}
        assert moved == 2 * spec.inner * spec.columns * 2


def test_a_matrix_is_read_once_for_all_its_tiles():
    assert matrices_read(512, [100, 0, 300, 0, 112], 64) == [0, 2, 4]
    assert matrices_read(512, [0, 0, 0, 0, 0], 64) == [0], "some block must stand there"


def test_codes_are_priced_by_their_bytes():
    w = quantize(jnp.ones((4, 256, 512)), bits=4, packed=True)
    tiles = forward_tiles(4, 256, 512, FALLBACK, x_bytes=2, w_bytes=0.5)
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    cost = pallas_tpu_forward.cost(x, (w,), 512, tiles)
    wanted = 4 * (256 * 512 // 2 + 512 * 4) + 2 * 4 * (256 + 512)
    assert cost.bytes_accessed == wanted


def stated(function, *arguments):
    """Return the cost estimates of the Pallas calls of a program, by the kernels' names."""
    found = {}

    def walk(jaxpr):
        for line in jaxpr.eqns:
            if line.primitive.name == "pallas_call":
                found.setdefault(line.params["name"], []).append(line.params["cost_estimate"])
            for inner in jax.tree.leaves(
                list(line.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns") and line.primitive.name != "pallas_call":
                    walk(inner)
                elif hasattr(inner, "jaxpr"):
                    walk(inner.jaxpr)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_rows_of_the_tail_cost_nothing_but_their_zeros(implementation):
    """A receive buffer of which half is expected to be filled: values, dx and dw."""
    rows, inner, columns, groups, half = 64, 128, 256, 2, 32
    x, w = jnp.ones((rows, inner)), jnp.ones((groups, inner, columns))

    def costs(expected):
        def run(x, w):
            y, pull = jax.vjp(
                lambda x, w: grouped_matmul(
                    x, w, jnp.array([16, 16]), expected_rows=expected,
                    implementation=implementation, interpret=True,
                ),
                x, w,
            )  # fmt: skip
            return pull(y)

        found = stated(run, x, w)
        assert {name: len(calls) for name, calls in found.items()} == {
            "grouped_matmul": 2, "grouped_matmul_dw": 1,
        }  # fmt: skip
        return (*found["grouped_matmul"], *found["grouped_matmul_dw"])

    flops = 2 * inner * columns
    assert [c.flops for c in costs(None)] == [rows * flops] * 3
    assert [c.flops for c in costs(half)] == [half * flops] * 3
    # Both read half of x less; y is written whole, and so is dx; dw reads half of x and dy.
    saved = [a.bytes_accessed - b.bytes_accessed for a, b in zip(costs(None), costs(half))]
    assert saved == [half * inner * 4, half * columns * 4, half * (inner + columns) * 4]


@pytest.mark.parametrize("chip", [*LIMITS, None])
@pytest.mark.parametrize("name", ARG_SPECS)
def test_tiles_fit_the_chip(chip, name):
    spec, limits = ARG_SPECS[name], LIMITS.get(chip, FALLBACK)
    tiles = forward_tiles(
        spec.rows, spec.inner, spec.columns, limits, x_bytes=2, w_bytes=2,
        matrices=2 if spec.form == "swiglu" else 1,
    )  # fmt: skip
    if chip is not None:
        assert tiles.inner == spec.inner, "all of K stays, so that matrices are read once"
    assert tiles.rows % tiles.row_chunk == 0 and tiles.columns % 128 == 0
    gradient = gradient_tiles(spec.rows, spec.inner, spec.columns, limits)
    held = gradient.inner * gradient.columns * (4 + 2 * 2)
    held += 2 * 2 * gradient.rows * (gradient.inner + gradient.columns)
    assert held <= limits.vmem_bytes
