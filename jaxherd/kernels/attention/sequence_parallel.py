"""Attention of rows that are cut along their length over devices.

Two exchanges, both inside of a `shard_map`, forward and backward:

- gather: each device collects the keys and values that its queries may need and attends to them in
  one call.  A rule without a bound needs all shards (all-gather; its transpose is a
  reduce-scatter); a local rule needs only the `hops` before its own, which come by
  collective-permute.
- ring: keys and values travel from device to device, one shard at a time; each is met with an
  online softmax and dropped, so that forward memory does not grow with the number of devices.
  Shards that no query of the device sees are not computed.

A chunked layer whose chunks are whole in each shard exchanges nothing.

Under a causal rule the last device has the most work; neither variant balances that.

Axis letters: B batch, T queries of a shard, S keys, N query heads, K key/value heads, H head size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from jaxherd.core import sharding
from jaxherd.core.errors import JaxherdError
from jaxherd.core.platform import platform
from jaxherd.kernels.attention import reference, splash
from jaxherd.kernels.attention.mask import AttentionMask

_MASKED = -1e30

# Queries whose scores with one shard's keys are held at once.
_BLOCK = 512


def hops(mask: AttentionMask, shard_length: int, shards: int) -> int:
    """Return how many shards before its own a shard's queries can see keys of, at most."""
    if mask.size is None or not mask.is_local:
        return shards - 1
    if mask.kind == "chunked" and mask.contiguous and shard_length % mask.size == 0:
        return 0
    return min(shards - 1, -(-(mask.size - 1) // shard_length))


def applies(q_BTNH, k_BTKH, mask: AttentionMask) -> bool:
    """Return whether the active mesh shards the length of these rows, and divides them."""
    partitioner = sharding.active()
    if partitioner is None or not mask.self_attention or q_BTNH.shape[1] != k_BTKH.shape[1]:
        return False
    sizes = {
        "batch": q_BTNH.shape[0], "length": q_BTNH.shape[1], "act_heads": q_BTNH.shape[2],
        "act_kv_heads": k_BTKH.shape[2],
    }  # fmt: skip
    return bool(partitioner.mesh_axes("length")) and all(
        size % partitioner.axis_size(*partitioner.mesh_axes(axis)) == 0
        for axis, size in sizes.items()
    )


def attend(
    q_BTNH, k_BTKH, v_BTKH, mask: AttentionMask, scale: float, variant: str, *,
    interpret: bool = False, inner: str | None = None,
):  # fmt: skip
    """Equal to `reference.attend` on rows whose length the active mesh shards.

    Args:
      q_BTNH, k_BTKH, v_BTKH, mask: whole rows, self-attention.
      variant: "gather" or "ring".
      inner: what "gather" computes with: "splash" or "xla"; by platform if None.
      interpret: of splash.
    Raises:
      JaxherdError: the length is not sharded, does not divide, or the tokens are not the same.
    """
    partitioner = sharding.active()
    axes = () if partitioner is None else partitioner.mesh_axes("length")
    if partitioner is None or not axes:
        raise JaxherdError(
            f"attention: {variant!r} needs an active layout that shards the length; use 'xla'."
        )
    if not mask.self_attention or q_BTNH.shape[1] != k_BTKH.shape[1]:
        raise JaxherdError(
            f"attention: {variant!r} needs keys that are the queries' own tokens; use 'xla'."
        )
    shards = partitioner.axis_size(*axes)
    if q_BTNH.shape[1] % shards:
        raise JaxherdError(
            f"attention: a length of {q_BTNH.shape[1]} is not divisible by the {shards} devices that "
            "shard it; pad the rows or use a layout with fewer."
        )
    heads = partitioner.spec(("batch", "length", "act_heads", None))
    kv_heads = partitioner.spec(("batch", "length", "act_kv_heads", None))
    rows = partitioner.spec(("batch", "length"))
    leaves, structure = jax.tree.flatten(mask)
    # Positions and segments are cut as the tokens are, prefix lengths as the rows are.
    leaf_specs = [rows if leaf.ndim == 2 else PartitionSpec(rows[0]) for leaf in leaves]
    function = {"gather": gather_attention, "ring": ring_attention}[variant]
    if variant == "gather":
        inner = inner or ("splash" if platform() == "tpu" else "xla")
        function = functools.partial(function, inner=inner, interpret=interpret)
    name = axes[0] if len(axes) == 1 else axes

    def local(q, k, v, *leaves):
        own = jax.tree.unflatten(structure, leaves)
        return function(q, k, v, mask=own, scale=scale, axis_name=name, shards=shards)

    return jax.shard_map(
        local, mesh=partitioner.mesh, in_specs=(heads, kv_heads, kv_heads, *leaf_specs),
        out_specs=heads, check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, *leaves)  # fmt: skip


def gather_attention(
    q_BTNH, k_BTKH, v_BTKH, *, mask: AttentionMask, scale: float, axis_name: Any, shards: int,
    inner: str = "xla", interpret: bool = False,
):  # fmt: skip
    """Attend to all keys that are needed, collected first; to be called inside of a `shard_map`.

    Args:
      q_BTNH, k_BTKH, v_BTKH: this device's shard.
      mask: of the shard's own tokens, with positions inside of the whole document.
      axis_name, shards: the mesh axis of the length, and its size.
      inner: "splash" or "xla".
    """
    length = q_BTNH.shape[1]
    before = hops(mask, length, shards)
    me = jax.lax.axis_index(axis_name)
    keys: tuple[Any, ...] = (k_BTKH, v_BTKH, mask.k_positions_BS, mask.k_segments_BS)
    k: Any
    v: Any
    if before == 0:
        k, v, positions, segments = keys
        offset: Any = 0
    elif before == shards - 1:
        k, v, positions, segments = (
            None if x is None else jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
            for x in keys
        )
        offset = me * length
    else:
        parts = [keys]
        for hop in range(1, before + 1):
            moved = tuple(_from_before(x, axis_name, shards, hop) for x in keys)
            # What wraps around is no key of ours.
            parts.insert(0, (*moved[:2], jnp.where(me >= hop, moved[2], -1), moved[3]))
        k, v, positions, segments = (
            None if column[0] is None else jnp.concatenate(column, axis=1) for column in zip(*parts)
        )
        offset = before * length
    seen = dataclasses.replace(
        mask, k_positions_BS=positions, k_segments_BS=segments, self_attention=before == 0,
        contiguous=False,
    )  # fmt: skip
    if inner == "splash":
        rule = splash.index_rule(seen, length, k.shape[1], offset)
        pairs = splash.row_pairs(seen, length, k.shape[1])
        return splash.attend_rule(q_BTNH * scale, k, v, rule, pairs=pairs, interpret=interpret)
    if length * k.shape[1] > 4 * _BLOCK * _BLOCK:
        return reference.attend_blocked(q_BTNH, k, v, seen, scale)
    return reference.attend(q_BTNH, k, v, seen, scale)


def ring_attention(
    q_BTNH, k_BTKH, v_BTKH, *, mask: AttentionMask, scale: float, axis_name: Any, shards: int
):
    """Attend to one shard of keys after the other; to be called inside of a `shard_map`.

    With a running maximum m, sum l and output o (all float32) a shard with scores s turns them into
    m' = max(m, max s), l' = l e^(m - m') + sum e^(s - m'), o' = o e^(m - m') + e^(s - m') v.
    Arguments as of `gather_attention`.  The gradient keeps every shard that passed by, unless the
    caller rematerialises.
    """
    me = jax.lax.axis_index(axis_name)
    keys = (k_BTKH, v_BTKH, mask.k_positions_BS, mask.k_segments_BS)
    batch, length, heads = q_BTNH.shape[:3]
    state = (
        jnp.zeros(q_BTNH.shape, jnp.float32),
        jnp.full((batch, length, heads), _MASKED, jnp.float32),
        jnp.zeros((batch, length, heads), jnp.float32),
    )
    for hop in range(hops(mask, length, shards) + 1):
        if hop:
            keys = tuple(_from_before(x, axis_name, shards, 1) for x in keys)
        k, v, positions, segments = keys
        seen = dataclasses.replace(
            mask, k_positions_BS=positions, k_segments_BS=segments,
            self_attention=False, contiguous=False,
        )  # fmt: skip
        visible = _may_see(seen)
        if mask.kind not in ("bidirectional", "prefix"):
            # Tokens lie in order: what wraps around is in the future.
            visible &= me >= hop

        def meet(state, q, k, v, seen=seen):
            return _merge(state, _partial(q, k, v, seen, scale))

        state = jax.lax.cond(visible, meet, lambda state, *_: state, state, q_BTNH, k, v)
    out, _, total = state
    # Sums of rows that saw nothing are zero, and so are their outputs.
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_BTNH.dtype)


def _from_before(x, axis_name, shards: int, hop: int) -> Any:
    """Return what the device `hop` places earlier holds."""
    if x is None:
        return None
    return jax.lax.ppermute(x, axis_name, [(i, (i + hop) % shards) for i in range(shards)])


def _may_see(mask: AttentionMask) -> jax.Array:
    """Return whether any query may see any key: never false if one does."""
    p, r = mask.q_positions_BT, mask.k_positions_BS
    last, first = p.max(axis=1), jnp.where(p < 0, 2**30, p).min(axis=1)
    k_last, k_first = r.max(axis=1), jnp.where(r < 0, 2**30, r).min(axis=1)
    by_rule = jnp.ones_like(last, bool)
    if mask.kind == "prefix" and mask.prefix_length_B is not None:
        by_rule = (k_first <= last) | (k_first < mask.prefix_length_B)
    elif mask.kind != "bidirectional":
        by_rule = k_first <= last
    if mask.kind == "chunked" and mask.size:
        by_rule &= k_last // mask.size >= first // mask.size
    elif mask.kind == "sliding_window" and mask.size:
        by_rule &= k_last > first - mask.size
    some = (last >= 0) & (k_last >= 0)
    if mask.q_segments_BT is None or mask.k_segments_BS is None:
        return (some & by_rule).any()
    s, t = mask.q_segments_BT, mask.k_segments_BS
    meet = (s.min(axis=1) <= t.max(axis=1)) & (t.min(axis=1) <= s.max(axis=1))
    # Positions of different documents say nothing about each other.
    one = (s.min(axis=1) == s.max(axis=1)) & (t.min(axis=1) == t.max(axis=1))
    return (some & meet & (by_rule | ~one)).any()


def _merge(a, b):
    (o_a, m_a, l_a), (o_b, m_b, l_b) = a, b
    m = jnp.maximum(m_a, m_b)
    w_a, w_b = jnp.exp(m_a - m), jnp.exp(m_b - m)
    return o_a * w_a[..., None] + o_b * w_b[..., None], m, l_a * w_a + l_b * w_b


def _partial(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float):
    """Return (output before division, maxima, sums) over these keys, some queries at a time."""
    length = q_BTNH.shape[1]
    block = min(_BLOCK, length)
    pad = -length % block
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    mask = reference.padded(mask, pad, 0, 0)

    @jax.checkpoint
    def one(start):
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, block, axis=1)
        return _partial_block(q, k_BSKH, v_BSKH, mask.queries(start, block), scale)

    parts = jax.lax.map(one, jnp.arange(0, length + pad, block))
    return tuple(rearrange(x, "n B t ... -> B (n t) ...")[:, :length] for x in parts)


def _partial_block(q_BTNH, k_BSKH, v_BSKH, mask, scale):
    kv_heads, groups = k_BSKH.shape[2], q_BTNH.shape[2] // k_BSKH.shape[2]
    q = rearrange(q_BTNH * scale, "B T (K G) H -> B T K G H", K=kv_heads)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask.dense()[:, None, None], scores, _MASKED)
    m = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), _MASKED / 2))
    weights = jnp.exp(scores - m[..., None])
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    m, total = (rearrange(x, "B K G T -> B T (K G)", G=groups) for x in (m, weights.sum(axis=-1)))
    return rearrange(out, "B T K G H -> B T (K G) H"), m, total
