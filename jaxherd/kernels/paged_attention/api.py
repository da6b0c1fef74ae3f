"""One entry to attention over a paged cache."""

import importlib
from types import ModuleType
from typing import Literal

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxherd.core import sharding
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.platform import platform
from jaxherd.kernels.paged_attention import by_row, reference
from jaxherd.kernels.paged_attention.pool import PagePool

IMPLEMENTATIONS = ("reference", "by_row", "pallas_tpu", "pallas_gpu")


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    pool: PagePool,
    page_table_BQ: Int[Array, "B Q"],
    lengths_B: Int[Array, "B"],
    *,
    kind: Literal["causal", "chunked", "sliding_window"] = "causal",
    size: int | None = None,
    scale: float | None = None,
    temperature_BT: Float[Array, "B T"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attend from the last T tokens of each sequence to what the rule lets them see of it.

    out = softmax(scale (temperature q) k^T + mask) v over the sequence's pages; the new tokens' own
    keys and values are already in the pool (`PagePool.write`).  Only pages with a visible token are
    read: of a chunked layer those of the current chunk, of a sliding window the last ones, so that
    other pages of such a layer may be given to other sequences and their table entries be anything.

    Args:
      q_BTNH: one or a few new tokens a sequence; token t is at position lengths - T + t.
      pool: pages of this layer; the head size is that of the queries.
      page_table_BQ: page of positions [i p, (i + 1) p) in column i.
      lengths_B: tokens of each sequence with the new ones; 0 for an idle row.
      kind, size: the rule, as of `AttentionMask`.
      scale, temperature_BT: as of `attention`.
      implementation: "reference" (gather, then attend), "by_row" (one sequence after the other),
        "pallas_tpu", "pallas_gpu" (ours through Triton; compiled for H100, not timed), or None,
        which takes pallas_tpu on TPU where it applies, by_row on CPU and reference elsewhere.
      interpret: run a Pallas kernel in interpret mode, for tests on CPU.
    Returns:
      [B, T, N, H]; a token at a negative position (length below T) gives zeros.
    Raises:
      JaxherdError: an unknown implementation, one that cannot run, or sizes that do not fit.
    """
    width, (heads, head_dim) = pool.k_PpD.shape[2], q_BTNH.shape[2:]
    if width % head_dim or heads % (width // head_dim):
        raise JaxherdError(
            f"paged_attention: {heads} query heads of {head_dim} do not fit a pool whose tokens are "
            f"{width} wide; that must be kv_heads x {head_dim} with kv_heads dividing {heads}."
        )
    if kind != "causal" and (size is None or size < 1):
        raise JaxherdError(f"paged_attention: {kind} needs a size of at least 1, got {size}.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxherdError(
            f"paged_attention: no implementation {implementation!r}; "
            + nearest(implementation, IMPLEMENTATIONS)
        )
    if implementation is None:
        best = {"tpu": "pallas_tpu", "cpu": "by_row"}.get(platform(), "reference")
        takes = best != "pallas_tpu" or _kernel(best).unsupported(q_BTNH, pool) is None
        implementation = best if takes else "reference"
    elif implementation.startswith("pallas"):
        reason = _kernel(implementation).unsupported(q_BTNH, pool)
        if reason is not None:
            raise JaxherdError(
                f"paged_attention: {implementation} cannot run because {reason}; use 'reference'."
            )
    if temperature_BT is not None:
        q_BTNH = (q_BTNH * temperature_BT[:, :, None, None]).astype(q_BTNH.dtype)
    factor = float(head_dim**-0.5 if scale is None else scale)
    if not implementation.startswith("pallas"):
        attend = {"reference": reference, "by_row": by_row}[implementation].attend
        return attend(q_BTNH, pool, page_table_BQ, lengths_B, kind, size, factor)

    def local(q, pool, table, lengths):
        attend = _kernel(implementation).attend
        return attend(q, pool, table, lengths, kind, size, factor, interpret=interpret)

    partitioner = sharding.active()
    if partitioner is None or partitioner.mesh.size == 1:
        return local(q_BTNH, pool, page_table_BQ, lengths_B)
    axes = partitioner.mesh_axes("act_heads")
    if axes != partitioner.mesh_axes("act_kv_heads"):
        raise JaxherdError(
            "paged_attention: query heads and key/value heads are sharded differently; use a layout "
            "with as many head shards as divide the key/value heads, or 'reference'."
        )
    # Sequences share the pool, so that only heads are cut.
    whole = PartitionSpec()
    pool_specs = PagePool(
        PartitionSpec(None, None, axes), PartitionSpec(None, None, axes),
        *(None if s is None else PartitionSpec(None, axes) for s in
          (pool.k_scale_PKp, pool.v_scale_PKp)),
    )  # fmt: skip
    return jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(PartitionSpec(None, None, axes), pool_specs, whole, whole),
        out_specs=PartitionSpec(None, None, axes),
        check_vma=False,
    )(q_BTNH, pool, page_table_BQ, lengths_B)


def _kernel(implementation: str) -> ModuleType:
    return importlib.import_module(f"jaxherd.kernels.paged_attention.{implementation}")
