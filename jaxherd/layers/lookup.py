"""Reading rows of a table whose columns are split over the devices that hold the tokens.

Left to XLA, the gradient is summed whole on every device before each keeps its columns: twice the
bytes of the table over the links.  Here each device reads its columns for the tokens of the whole
group and one exchange brings them together; the gradient goes the same way back, so that only
activations travel.

Axis letters: B batch, T tokens, V rows of the table, D its width, P devices of the group.
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
        columns_PBTD = jnp.take(table_VD, tokens_PBT, axis=0)
        x_PBTD = jax.lax.all_to_all(columns_PBTD, group, split_axis=0, concat_axis=0, tiled=True)
        return rearrange(x_PBTD, "P B T D -> B T (P D)")

    return jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(jax.sharding.PartitionSpec(None, group), rows),
        out_specs=partitioner.spec(("batch", "length", None)),
        check_vma=False,
    )(table_VD, tokens)


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
