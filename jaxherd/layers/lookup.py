"""Reading rows of a table whose columns are split over the devices that hold the tokens.

Left to XLA, the gradient is summed whole on every device before each keeps its columns: twice the
bytes of the table over the links.  Here each device reads its columns for the tokens of the whole
group and one exchange brings them together; the gradient goes the same way back, so that only
activations travel.

Axis letters: B batch, T tokens, V rows of the table, D its width, P devices of the group, N the
tokens of one of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxherd.core import sharding


def lookup(table_VD: Float[Array, "V D"], tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Return table[tokens]."""
    partitioner = sharding.active()
    if partitioner is None or tokens.ndim != 2 or not _split(partitioner, table_VD, tokens):
        return jnp.take(table_VD, tokens, axis=0)
    group = partitioner.mesh_axes("embed")
    rows = partitioner.spec(("batch", "length"))

    def local(table_VD, tokens_BT):
        tokens_PBT = jax.lax.all_gather(tokens_BT, group)
        columns_PBTD = _read(table_VD, tokens_PBT)
        x_PBTD = jax.lax.all_to_all(columns_PBTD, group, split_axis=0, concat_axis=0, tiled=True)
        return rearrange(x_PBTD, "P B T D -> B T (P D)")

    return jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(jax.sharding.PartitionSpec(None, group), rows),
        out_specs=partitioner.spec(("batch", "length", None)),
        check_vma=False,
    )(table_VD, tokens)


@jax.custom_vjp
def _read(table_VD, tokens_PBT):
    return jnp.take(table_VD, tokens_PBT, axis=0)


def _read_forward(table_VD, tokens_PBT):
    return _read(table_VD, tokens_PBT), (table_VD, tokens_PBT)


def _read_backward(saved, d_PBTD):
    """Add the rows up, the tokens of one device after those of another.

    All at once the compiler would sort a million pairs for a pod's slice, which is more code than
    all of a layer's attention; the few thousand of one device fit single integers.
    """
    table_VD, tokens_PBT = saved
    words = table_VD.shape[0]

    def add(d_VD, part):
        tokens_N, d_ND = part
        order_N, sorted_N = _in_order(tokens_N, words)
        rows_ND = d_ND[order_N].astype(d_VD.dtype)
        return d_VD.at[sorted_N].add(rows_ND, indices_are_sorted=True), None

    parts = (
        rearrange(tokens_PBT, "P B T -> P (B T)"),
        rearrange(d_PBTD, "P B T D -> P (B T) D"),
    )
    # A frequent token adds up thousands of rows: in float32, or bfloat16 would stop at 256.
    d_VD, _ = jax.lax.scan(add, jnp.zeros(table_VD.shape, jnp.float32), parts)
    return d_VD.astype(table_VD.dtype), None


_read.defvjp(_read_forward, _read_backward)


def _in_order(tokens_N, words: int):
    """Return (places of the tokens in increasing order, the tokens in that order)."""
    count = tokens_N.shape[0]
    if words * count >= 1 << 31:
        order_N = jnp.argsort(tokens_N)
        return order_N, tokens_N[order_N]
    key_N = jnp.sort(tokens_N * count + jnp.arange(count, dtype=tokens_N.dtype), stable=False)
    return key_N % count, key_N // count


def _split(partitioner: Any, table_VD, tokens_BT) -> bool:
    """Whether the table's columns, and nothing else of it, are split, and all sizes divide."""
    names = [("embed", table_VD.shape[1])]
    names += [(n, size) for n, size in zip(("batch", "length"), tokens_BT.shape)]
    parts = [partitioner.axis_size(*partitioner.mesh_axes(name)) for name, _ in names]
    return (
        parts[0] > 1
        and not partitioner.mesh_axes("vocab")
        and all(size % part == 0 for (_, size), part in zip(names, parts))
    )
