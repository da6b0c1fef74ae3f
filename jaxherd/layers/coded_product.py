"""Products of activations with a matrix in few bits, on one device or on a mesh.

XLA cannot split a kernel over devices, so on a mesh each device multiplies its own part inside of
`shard_map`: columns stay where they are, a matrix that is split along its inner axis gives partial
sums, and one that is split along the model width (`fsdp`) is gathered as codes.

Axis letters: K inner, N columns.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxherd.core import sharding
from jaxherd.core.modules import Axes
from jaxherd.kernels.quantized_matmul import QuantizedMatrix, quantized_matmul

_implementation: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "coded_product", default=None
)


@contextlib.contextmanager
def coded_products(implementation: str | None) -> Iterator[None]:
    """Let products that are traced inside run on this code of `kernels.quantized_matmul`."""
    token = _implementation.set(implementation)
    try:
        yield
    finally:
        _implementation.reset(token)


def coded_product(
    x: Float[Array, "... K"], w_KN: QuantizedMatrix, axes: Axes | None = None
) -> Float[Array, "... N"]:
    """Return x W in the dtype of x.

    Args:
      x: activations; of three dimensions they are [batch, length, K].
      w_KN: the matrix.
      axes: logical names of K and N; without them a mesh makes no difference to how it is run.
    Raises:
      JaxherdError: as `quantized_matmul`; a group of rows with one scale that the mesh would cut.
    """
    partitioner = sharding.active()
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if partitioner is None or partitioner.mesh.size == 1 or inside or axes is None:
        return _local(x, w_KN)
    names = axes[-2:]  # of a layer cut out of its stack, which leaves the name of the stack
    K, N = (_split(partitioner, name) for name in names)
    cut = PartitionSpec(K or None, N or None)
    partitioner.check_divisible(names, cut, w_KN.shape, "quantised weights")
    w_KN.check_cut(partitioner, cut, "quantised weights")
    rows = partitioner.spec(("batch", "length")) if x.ndim == 3 else (None,) * (x.ndim - 1)
    rows = [
        part if size % partitioner.axis_size(*_names(part)) == 0 else None
        for part, size in zip(rows, x.shape)
    ]

    def local(x, w):
        y = _local(x, w, K)
        return jax.lax.psum(y, K) if K else y

    return jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(PartitionSpec(*rows, K or None), w_KN.specs(cut)),
        out_specs=PartitionSpec(*rows, N or None),
        check_vma=False,
    )(x, w_KN)


def _local(x, w_KN: QuantizedMatrix, across: tuple[str, ...] = ()):
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = quantized_matmul(x_MK, w_KN, across=across, implementation=_implementation.get())
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def _split(partitioner: sharding.Partitioner, name: str | None) -> tuple[str, ...]:
    """Return the mesh axes along which activations are split as well; others only store weights."""
    return () if name in (None, "embed", "head_embed") else partitioner.mesh_axes(name)


def _names(part) -> tuple[str, ...]:
    return () if part is None else ((part,) if isinstance(part, str) else tuple(part))


def coded_rows(w_DV: QuantizedMatrix, tokens: Int[Array, "..."], dtype) -> Float[Array, "... D"]:
    """Return the columns of a table in few bits for these tokens, as numbers.

    The table lies as its head reads it; a lookup gathers single columns, of which a TPU reads 128
    neighbours each: little beside the head at a decoding step, much for long prompts.
    """
    columns = jax.tree.map(lambda part: jnp.take(part, tokens.reshape(-1), axis=-1), w_DV)
    return columns.dequantize(dtype).T.reshape(*tokens.shape, w_DV.shape[0])
