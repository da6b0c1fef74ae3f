"""One entry to the grouped product; `implementation` says which code runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.platform import platform
from jaxherd.kernels.grouped_matmul import blocked, reference

IMPLEMENTATIONS = ("reference", "blocked", "ragged_dot", "megablox")


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GKN: Float[Array, "G K N"],
    group_sizes_G: Int[Array, "G"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiply consecutive groups of rows by their own matrices, dropping nothing.

    y[m] = x[m] w[g(m)], where the first `group_sizes[0]` rows belong to group 0, and so on.  Rows
    past the sum of the sizes belong to no group and give zeros.

    Args:
      x_MK: rows sorted by group.
      w_GKN: one matrix a group.
      group_sizes_G: rows of each group; zero is allowed; the sum is at most M.
      implementation: "reference", "blocked" (XLA loop), "ragged_dot" (XLA's own), "megablox"
        (jax's Pallas kernel, TPU), or None, which takes megablox on TPU and blocked elsewhere.
      interpret: run a Pallas implementation in interpret mode, for tests on CPU.
    Returns:
      [M, N] in the dtype of `x_MK`, accumulated in float32.
    Raises:
      JaxherdError: an unknown implementation.
    """
    if implementation is None:
        implementation = "megablox" if platform() == "tpu" else "blocked"
    if implementation == "reference":
        return reference.grouped_matmul(x_MK, w_GKN, group_sizes_G)
    if implementation == "blocked":
        return blocked.grouped_matmul(x_MK, w_GKN, group_sizes_G, False)
    if implementation == "ragged_dot":
        y_MN = jax.lax.ragged_dot(x_MK, w_GKN, group_sizes_G.astype(jnp.int32))
        return _zero_tail(y_MN, group_sizes_G)
    if implementation == "megablox":
        from jaxherd.kernels.grouped_matmul import megablox

        y_MN = megablox.grouped_matmul(x_MK, w_GKN, group_sizes_G, interpret)
        return _zero_tail(y_MN, group_sizes_G)
    raise JaxherdError(
        f"grouped_matmul: no implementation {implementation!r}; "
        + nearest(implementation, IMPLEMENTATIONS)
    )


def _zero_tail(y_MN, group_sizes_G):
    """Kernels leave rows of no group uninitialised: a select, never a product, makes them zero."""
    rows_M1 = jnp.arange(y_MN.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(rows_M1 < group_sizes_G.sum(), y_MN, 0)
