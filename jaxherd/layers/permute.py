"""Reorder rows.  The gradient is a gather too, where that of a plain gather is a slow scatter.

Axis letters: R rows, D width, G groups.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(rows_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Return rows[order]; `inverse` undoes `order`, a permutation of all rows."""
    return jnp.take(rows_RD, order_R, axis=0, unique_indices=True, mode="clip")


def _forward(rows_RD, order_R, inverse_R):
    return permute(rows_RD, order_R, inverse_R), (order_R, inverse_R)


def _backward(saved, gradient_RD):
    order_R, inverse_R = saved
    return permute(gradient_RD, inverse_R, order_R), None, None


permute.defvjp(_forward, _backward)


def by_group(group_R: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the stable order of rows by group, its inverse, and the rows of each group [G].

    A row's place is the start of its group and how many of it came before, so that only the order
    itself is sorted, and as single integers: the TPU compiler makes of each sort of pairs several
    times the code (of Scout's step, a third of all).

    Args:
      group_R: int32, in [0, groups).
      groups: G; G R must be below 2^31.
    """
    rows = group_R.shape[0]
    if groups * rows >= 1 << 31:
        raise ValueError(f"{groups} groups of {rows} rows do not fit 32-bit keys")
    index_R = jnp.arange(rows, dtype=jnp.int32)
    order_R = jnp.sort(group_R.astype(jnp.int32) * rows + index_R, stable=False) % rows
    member_RG = jax.nn.one_hot(group_R, groups, dtype=jnp.int32)
    count_RG = jnp.cumsum(member_RG, axis=0)
    sizes_G = count_RG[-1]
    before_G = jnp.cumsum(sizes_G) - sizes_G
    inverse_R = (member_RG * (count_RG - 1 + before_G)).sum(axis=1)
    return order_R, inverse_R, sizes_G
