"""From dh to the gradients of both products of the gated experts, for the rows that there are.

    h = silu(a) b:   da = dh b silu'(a),   db = dh silu(a)

As plain array code it passes over the whole buffer of rows, of which a uniform load fills half in
expert parallelism (`layers/exchange.py`).  Here tiles of the tail are neither read nor written: what
they hold no kernel reads.  Axis letters: M rows, N columns, G groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_ROWS, _COLUMNS = 256, 1024


def gated_gradient(
    dh_MN: jax.Array,
    a_MN: jax.Array,
    b_MN: jax.Array,
    group_sizes_G: jax.Array,
    *,
    expected_rows: int | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Return (da_MN, db_MN) in the dtype of a; their tail holds anything.

    Args:
      dh_MN: gradient of h; its tail may hold anything.
      a_MN, b_MN: the products x gate and x up.
      group_sizes_G: their sum is the number of rows that count.
      expected_rows: how many that is taken to be in the cost estimate; all by default.
      interpret: as of `pallas_call`.
    """
    rows, columns = a_MN.shape
    tile = _ROWS if rows > _ROWS else -(-rows // 16) * 16
    strip = _COLUMNS if columns > _COLUMNS else -(-columns // 128) * 128
    used = group_sizes_G.sum().astype(jnp.int32)
    live = jnp.maximum((used + tile - 1) // tile, 1)

    def block(n, i, used_1, live_1):
        # The tail stays on the last tile with rows: nothing is copied for it.
        return jnp.minimum(i, live_1[0] - 1), n

    spec = pl.BlockSpec((tile, strip), block)
    counted = rows if expected_rows is None else expected_rows
    size = counted * columns
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, tile=tile),
            out_shape=[jax.ShapeDtypeStruct(a_MN.shape, a_MN.dtype)] * 2,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                in_specs=[spec] * 3,
                out_specs=[spec] * 2,
                grid=(-(-columns // strip), -(-rows // tile)),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
            ),
            cost_estimate=pl.CostEstimate(
                flops=8 * size,
                transcendentals=size,
                bytes_accessed=size * (4 * a_MN.dtype.itemsize + dh_MN.dtype.itemsize),
            ),
            interpret=interpret,
            name="gated_gradient",
        )(used[None], live[None], dh_MN, a_MN, b_MN)
    )


def _kernel(used_1, live_1, dh_ref, a_ref, b_ref, da_ref, db_ref, *, tile: int):
    i = pl.program_id(1)

    @pl.when(i < live_1[0])
    def _():
        dh, a, b = (ref[...].astype(jnp.float32) for ref in (dh_ref, a_ref, b_ref))
        sigmoid = jax.nn.sigmoid(a)
        da = dh * b * sigmoid * (1 + a * (1 - sigmoid))
        db = dh * a * sigmoid
        row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) + i * tile
        mine = row < used_1[0]
        da_ref[...] = jnp.where(mine, da, 0).astype(da_ref.dtype)
        db_ref[...] = jnp.where(mine, db, 0).astype(db_ref.dtype)
