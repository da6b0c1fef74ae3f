"""The grouped product as a TPU kernel: y = x w, y = x w^T and silu(x gate) * (x up) in one pass,
the last also with x gate and x up themselves, which its gradient needs.

Grid: (strips of columns, visits, blocks of K).  Strips come first and are independent, so that two
cores of a chip share them.  A visit is a tile of rows and a group (`schedule`); visits of one group
follow each other, and with all of K in the block its strip of the matrix is copied once.  Inside, a
loop over chunks of rows skips those without a row of the group: a tile that ten groups share is
multiplied about once and not ten times.

Rows of the tail are written as zeros by the kernel itself: their visits read nothing and multiply
nothing, where a select afterwards would read and write all of y again.

Axis letters: M rows, K inner, G groups, N columns, B blocks of K with a scale of their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxherd.kernels.grouped_matmul.schedule import forward_schedule, most_visits
from jaxherd.kernels.grouped_matmul.tiles import Tiles
from jaxherd.kernels.quantized_matmul.tensor import QuantizedMatrix

Weights = jax.Array | QuantizedMatrix


def forward(
    x_MK: jax.Array,
    weights: tuple[Weights, ...],
    group_sizes_G: jax.Array,
    *,
    tiles: Tiles,
    transposed: bool = False,
    row_scale_M: jax.Array | None = None,
    products: bool = False,
    addend_MN: jax.Array | None = None,
    expected_rows: int | None = None,
    interpret=False,
) -> Any:
    """Return y_MN; with two weights silu(s x w_0) * (s x w_1).

    Args:
      x_MK: rows sorted by group; those of the tail may hold anything.
      weights: [G, K, N], one, or gate and up; plain or in few bits.
      group_sizes_G: rows of each group.
      tiles: see `tiles.forward_tiles`.
      transposed: the weights are given as [G, N, K] (not for codes).
      row_scale_M: s, a factor of each row of x; it meets the float32 accumulator.
      products: return (y_MN, x w_0, x w_1), rounded to the dtype of x and without s.
      addend_MN: added to y (with one weight) in float32; its tail may hold anything.
      expected_rows: see `cost`.
      interpret: as of `pallas_call`.
    """
    (rows, inner), shape = x_MK.shape, weights[0].shape
    columns = shape[1 if transposed else 2]
    blocks, strips = -(-inner // tiles.inner), -(-columns // tiles.columns)
    schedule = forward_schedule(group_sizes_G, rows, tiles.rows)

    def block_of(v, k, live):
        # The tail stays on the block that is already there.
        return jnp.where(v < live[0], k, blocks - 1) if blocks > 1 else 0

    def x_map(n, v, k, live, tile, source, group, start, stop):
        return source[v], block_of(v, k, live)

    def w_map(n, v, k, live, tile, source, group, start, stop):
        at = block_of(v, k, live)
        return (group[v], n, at) if transposed else (group[v], at, n)

    def scales_map(n, v, k, live, tile, source, group, start, stop):
        return group[v], 0, n

    def row_map(n, v, k, live, tile, source, group, start, stop):
        return source[v], 0

    def y_map(n, v, k, live, tile, source, group, start, stop):
        return tile[v], n

    def addend_map(n, v, k, live, tile, source, group, start, stop):
        return source[v], n

    packed = isinstance(weights[0], QuantizedMatrix) and weights[0].packed
    operands, specs = [x_MK], [pl.BlockSpec((tiles.rows, tiles.inner), x_map)]
    if row_scale_M is not None:
        operands.append(row_scale_M.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((tiles.rows, 1), row_map))
    # A byte holds rows 2 i and 2 i + 1 of K.
    block_rows = tiles.inner // 2 if packed else tiles.inner
    block = (tiles.columns, block_rows) if transposed else (block_rows, tiles.columns)
    for w in weights:
        operands.append(w.values if isinstance(w, QuantizedMatrix) else w)
        specs.append(pl.BlockSpec((None, *block), w_map))
        for part in _code_parts(w):
            operands.append(part.astype(jnp.float32))
            specs.append(pl.BlockSpec((None, part.shape[1], tiles.columns), scales_map))
    if addend_MN is not None:
        operands.append(addend_MN)
        specs.append(pl.BlockSpec((tiles.rows, tiles.columns), addend_map))
    results = 1 + len(weights) if products else 1
    kernel = functools.partial(
        _kernel,
        tiles=tiles,
        inner=inner,
        transposed=transposed,
        scaled=row_scale_M is not None,
        packed=packed,
        parts=tuple(len(_code_parts(w)) for w in weights),
        added=addend_MN is not None,
        results=results,
    )
    name = "grouped_swiglu" if len(weights) > 1 else "grouped_matmul"
    found = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((rows, columns), x_MK.dtype)] * results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            in_specs=specs,
            out_specs=[pl.BlockSpec((tiles.rows, tiles.columns), y_map)] * results,
            grid=(strips, schedule.count, blocks),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32) for _ in weights],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=cost(
            x_MK,
            weights,
            columns,
            tiles,
            results=results,
            added=addend_MN is not None,
            expected_rows=expected_rows,
        ),
        interpret=interpret,
        name=f"{name}_products" if products else name,
    )(*schedule[:6], *operands)
    return found if products else found[0]


def cost(
    x_MK, weights, columns: int, tiles: Tiles, *, results: int = 1, added: bool = False,
    expected_rows: int | None = None,
) -> pl.CostEstimate:  # fmt: skip
    """Return what the product of the rows needs, if `expected_rows` of them belong to a group.

    Each strip of columns reads x once; the matrix of a group is read once if the group has a row,
    and there are no more such groups than rows.  If K is cut, every visit reads it again.  The tail
    is neither read nor multiplied, but written.  A chunk of rows that groups share is multiplied
    for each of them; that depends on the routing and is not counted.

    Args:
      x_MK, weights, tiles: as of `forward`; shapes are enough.
      columns: N.
      results: how many arrays of [M, N] are written.
      added: whether one is read.
      expected_rows: all of them by default.
    """
    rows, inner = x_MK.shape
    used, groups = rows if expected_rows is None else expected_rows, weights[0].shape[0]
    touched = min(groups, used)
    reads = touched if tiles.inner >= inner else most_visits(used, touched, tiles.rows)
    matrix_bytes = sum(
        w.nbytes / groups if isinstance(w, QuantizedMatrix) else inner * columns * w.dtype.itemsize
        for w in weights
    )
    strips = -(-columns // tiles.columns)
    x_bytes = used * inner * x_MK.dtype.itemsize * strips
    y_bytes = (results * rows + added * used) * columns * x_MK.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * used * inner * columns * len(weights),
        bytes_accessed=int(x_bytes + reads * matrix_bytes + y_bytes),
        transcendentals=used * columns if len(weights) > 1 else 0,
    )


def _code_parts(w: Weights) -> list[jax.Array]:
    """Return the scales and zero points of a code."""
    if not isinstance(w, QuantizedMatrix):
        return []
    return [w.scales] if w.zeros is None else [w.scales, w.zeros]


class _Matrix(NamedTuple):
    """One matrix inside the kernel; the last two are None where there are none."""

    values: Any
    scales: Any
    zeros: Any


def _kernel(
    live, tile, source, group, start, stop, x_ref, *refs, tiles: Tiles, inner, transposed, scaled,
    packed, parts, added, results,
):  # fmt: skip
    refs = list(refs)
    row_scale_ref = refs.pop(0) if scaled else None
    matrices = [
        _Matrix(refs.pop(0), *(refs.pop(0) for _ in range(count)), *(None,) * (2 - count))
        for count in parts
    ]
    addend_ref = refs.pop(0) if added else None
    result_refs, accumulators = refs[:results], refs[results:]
    v, k = pl.program_id(1), pl.program_id(2)
    chunk = tiles.row_chunk
    first, last = start[v] - tile[v] * tiles.rows, stop[v] - tile[v] * tiles.rows
    first, last = jnp.maximum(first, 0), jnp.minimum(last, tiles.rows)

    def write(y_ref, at, begin, y):
        """Store the rows of the visit; `y` starts at row `begin` of the tile."""
        whole = (first <= begin) & (begin + chunk <= last)

        @pl.when(whole)
        def _():
            y_ref[at, :] = y.astype(y_ref.dtype)

        @pl.when(jnp.logical_not(whole))
        def _():
            row = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) + begin
            mine = (row >= first) & (row < last)
            old = y_ref[at, :].astype(jnp.float32)
            y_ref[at, :] = jnp.where(mine, y, old).astype(y_ref.dtype)

    def each_chunk(body):
        def step(r, carry):
            begin = pl.multiple_of(r * chunk, chunk)
            body(pl.ds(begin, chunk), begin)
            return carry

        # `div` and not `//`: nothing is negative, and the sign of `//` asks which TPU this is.
        jax.lax.fori_loop(jax.lax.div(first, chunk), jax.lax.div(last + chunk - 1, chunk), step, 0)

    def multiply(at, begin):
        for accumulator, matrix in zip(accumulators, matrices):

            @pl.when(k == 0)
            def _(accumulator=accumulator):
                accumulator[at, :] = jnp.zeros((chunk, tiles.columns), jnp.float32)

            _accumulate(accumulator, x_ref, matrix, at, k, tiles, inner, transposed, packed)

        @pl.when(k == pl.num_programs(2) - 1)
        def _():
            sums = []
            for accumulator, matrix in zip(accumulators, matrices):
                total = accumulator[at, :]
                if matrix.scales is not None and matrix.scales.shape[0] == 1:
                    total = total * matrix.scales[...]
                sums.append(total)
            for product_ref, product in zip(result_refs[1:], sums):
                write(product_ref, at, begin, product)
            if row_scale_ref is not None:
                sums = [total * row_scale_ref[at, :] for total in sums]
            y = sums[0] if len(sums) == 1 else jax.nn.silu(sums[0]) * sums[1]
            if addend_ref is not None:
                y = y + addend_ref[at, :].astype(jnp.float32)
            write(result_refs[0], at, begin, y)

    @pl.when(v < live[0])
    def _():
        each_chunk(multiply)

    @pl.when((v >= live[0]) & (k == 0))
    def _():
        def clear(at, begin):
            for result_ref in result_refs:
                write(result_ref, at, begin, jnp.zeros((chunk, tiles.columns), jnp.float32))

        each_chunk(clear)


def _accumulate(
    accumulator, x_ref, matrix: _Matrix, at, k, tiles: Tiles, inner, transposed, packed
):  # fmt: skip
    """Add x[at] w to the accumulator, a chunk of the inner axis at a time."""
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    ragged = inner % tiles.inner != 0

    def step(begin, size):
        here = pl.ds(begin, size)
        x = x_ref[at, here]
        if packed:
            # The same bits seen as int4: no instruction, and rows come out in their order.
            w = pltpu.bitcast(matrix.values[pl.ds(_over(begin, 2), size // 2), :], jnp.int4)
        else:
            w = matrix.values[:, here] if transposed else matrix.values[here, :]
        if matrix.scales is not None:
            w = _decode(w, matrix, k * tiles.inner + begin, size, inner, x.dtype)
        if ragged:
            # The last block reaches past the end of K, where anything may stand.
            left = inner - k * tiles.inner - begin
            x = _keep(x, left, 1)
            w = _keep(w, left, 1 if transposed else 0)
        accumulator[at, :] += jax.lax.dot_general(
            x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32
        )

    chunk = tiles.inner_chunk
    whole, rest = divmod(tiles.inner, chunk)

    def loop(c, carry):
        step(pl.multiple_of(c * chunk, chunk), chunk)
        return carry

    if whole == 1:
        step(0, chunk)
    else:
        jax.lax.fori_loop(0, whole, loop, 0)
    if rest:
        step(whole * chunk, rest)


def _decode(values, matrix: _Matrix, begin, size: int, inner: int, dtype):
    """Return a chunk of a code in the activations' type; one scale a column waits for the end."""
    blocks, columns = matrix.scales.shape
    if blocks == 1:
        if matrix.zeros is None:
            return values.astype(dtype)
        return (values.astype(jnp.float32) - matrix.zeros[...]).astype(dtype)
    width = inner // blocks
    here = pl.ds(_over(begin, width), size // width)
    parts = values.astype(jnp.float32).reshape(size // width, width, columns)
    if matrix.zeros is not None:
        parts = parts - matrix.zeros[here, :][:, None, :]
    return (parts * matrix.scales[here, :][:, None, :]).reshape(size, columns).astype(dtype)


def _over(value, divisor: int):
    return value // divisor if isinstance(value, int) else jax.lax.div(value, divisor)


def _keep(a, size, axis: int):
    index = jax.lax.broadcasted_iota(jnp.int32, a.shape, axis)
    return jnp.where(index < size, a.astype(jnp.float32), 0).astype(a.dtype)
