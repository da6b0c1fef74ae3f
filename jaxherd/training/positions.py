"""What is too large to form for all positions at once, formed for a part of them at a time.

Axis letters: B batch, T tokens, n chunks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core import sharding

# What a chunk forms (such as float32 logits) takes at most this many bytes on one device.
CHUNK_BYTES = 1 << 28
# What divides the columns of an array that the TPU compiler scatters instead of summing whole.
_LANES = 256


def over_positions(
    function: Callable[..., Any],
    arrays: Any,
    inputs: Sequence[jax.Array],
    *,
    bytes_per_position: int,
    chunk_bytes: int = CHUNK_BYTES,
    axes: Any = None,
) -> Any:
    """Return `function(arrays, *inputs)`, positions of which do not depend on each other.

    Chunks are computed one after the other and again for the gradient, so that what a position
    needs never exists for all of them.  On a mesh every device goes through its own positions with
    the arrays gathered once; their gradient is summed in float32.

    Args:
      function: maps (arrays, inputs [B, t, ...]) to a pytree of arrays [B, t, ...].
      arrays: any pytree, such as the output projections of one or two models.
      inputs: [B, T, ...] each.
      bytes_per_position: what `function` forms for one position.
      chunk_bytes: most bytes of a chunk on one device.
      axes: logical axes of `arrays`, a tree of tuples; None takes them as whole on every device.
    """

    def local(arrays, *inputs):
        return _in_chunks(function, bytes_per_position, chunk_bytes, arrays, inputs)

    partitioner = sharding.active()
    if partitioner is None or partitioner.mesh.size == 1:
        return local(arrays, *inputs)
    if partitioner.mesh_axes("act_vocab"):
        # A split vocabulary is left to the compiler's partitioner: here arrays are global, and
        # each device holds its share of a chunk.
        names = ("batch", "length", "act_vocab")
        chunk_bytes *= partitioner.axis_size(*(m for a in names for m in partitioner.mesh_axes(a)))
        return _in_chunks(function, bytes_per_position, chunk_bytes, arrays, inputs)
    whole = jax.sharding.PartitionSpec()
    leaves, tree = jax.tree.flatten(arrays)
    specs = [whole] * len(leaves)
    if axes is not None:
        specs = [partitioner.spec(names) for names in tree.flatten_up_to(axes)]
    parts = Parts.of(arrays, specs)
    rows = partitioner.spec(("batch", "length"))

    def on_device(arrays, *inputs):
        return local(parts.trim(parts.gather(arrays)), *inputs)

    return jax.shard_map(
        on_device,
        mesh=partitioner.mesh,
        in_specs=(tree.unflatten(specs), *(rows for _ in inputs)),
        out_specs=rows,
        check_vma=False,
    )(arrays, *inputs)


def _in_chunks(function, bytes_per_position, chunk_bytes, arrays, inputs):
    batch, length = inputs[0].shape[:2]
    if chunk_count(batch * length * bytes_per_position, length, chunk_bytes) == 1:
        return function(arrays, *inputs)
    # In float32 here and in its own dtype inside: so the sum over chunks of its gradient is wide.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)

    @jax.checkpoint
    def chunk(wide, *part):
        own = jax.tree.map(lambda w, x: w.astype(x.dtype), wide, arrays)
        return function(own, *part)

    def body(_, part):
        return None, chunk(wide, *part)

    _, found = jax.lax.scan(body, None, strided(bytes_per_position, chunk_bytes, *inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length, *x.shape[3:]), found)


def strided(bytes_per_position: int, chunk_bytes: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return [B, T, ...] cut to [n, B, T / n, ...]; chunk j holds positions j, j + n, ..."""
    batch, length = arrays[0].shape[:2]
    chunks = chunk_count(batch * length * bytes_per_position, length, chunk_bytes)
    return tuple(
        jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *x.shape[2:]), 2, 0) for x in arrays
    )


def chunk_count(total_bytes: int, length: int, chunk_bytes: int) -> int:
    """Return the smallest divisor of the length that brings a chunk below its size."""
    wanted = max(1, -(-total_bytes // chunk_bytes))
    for chunks in range(wanted, length + 1):
        if length % chunks == 0:
            return chunks
    return length


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the leaves of a tree are split over the mesh, inside `shard_map`.

    Arrays move axis by axis and with padded columns: over several axes at once, or with a
    vocabulary such as Llama 4's, the TPU compiler sums arrays whole instead of scattering them.
    """

    specs: tuple[jax.sharding.PartitionSpec, ...] = ()
    columns: tuple[int, ...] = ()

    @classmethod
    def of(cls, tree: Any, specs: Sequence[jax.sharding.PartitionSpec]) -> "Parts":
        """Return the parts of a tree whose leaves are split so."""
        widths = tuple(leaf.shape[-1] if leaf.ndim else 1 for leaf in jax.tree.leaves(tree))
        return cls(tuple(specs), widths)

    def gather(self, tree: Any) -> Any:
        """Return the tree of whole arrays; an array that is split before its columns is padded."""

        def one(x, split, outer):
            if outer:
                x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LANES)])
            for dimension, axes in split:
                for axis in reversed(axes):
                    x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
            return x

        return self._each(lambda x, split, outer, _: one(x, split, outer), tree)

    def trim(self, tree: Any) -> Any:
        """Return gathered arrays without what pads them."""
        return self._each(lambda x, split, outer, columns: x[..., :columns], tree)

    def scatter(self, tree: Any) -> Any:
        """Return this device's parts of the sum of trees as `gather` gives them."""

        def one(x, split, outer, columns):
            for dimension, axes in split:
                for axis in axes:
                    x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
            # Behind a barrier: the TPU compiler fails where it joins both cuts of a bfloat16 array.
            return jax.lax.optimization_barrier(x)[..., :columns] if outer else x

        return self._each(one, tree)

    def _each(self, move: Callable, tree: Any) -> Any:
        if not self.specs:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        moved = []
        for leaf, spec, columns in zip(leaves, self.specs, self.columns):
            split = [
                (d, (axes,) if isinstance(axes, str) else axes)
                for d, axes in enumerate(spec)
                if axes
            ]
            outer = bool(split) and split[-1][0] < leaf.ndim - 1 and columns > _LANES
            moved.append(move(leaf, split, outer, columns))
        return structure.unflatten(moved)


WHOLE = Parts()
