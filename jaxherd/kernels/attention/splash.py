"""jax's splash attention (TPU) behind our mask, with our own map of blocks.

Splash visits the blocks that a map names and inside of a block compares the index of each key with
a number per query, and segment ids.  Every rule over positions becomes such numbers (`IndexRule`):

- causal: a query's number is its own index (where keys lie by position, that of its position);
- prefix: that index, or the last one of the prefix if it is larger;
- sliding window: in addition the key's index is less than `size` behind;
- chunked: ids that also count the chunk, under causal order;
- bidirectional: ids alone.

The map is ours because splash's own walks all T x S pairs on the host for every shape, knows
nothing of documents, and with its fused gradient visits every block and writes a partial dq for each
block of keys, O(T^2) memory.  Ours comes from the tokens' ids and positions, at run time if need be:
blocks of different documents are skipped, and long sequences take the two gradient kernels whose
grids shrink.

Head sizes that fill no 128 lanes (64, 72, 80, 88) need no padding by us: the array's tiles are
padded in memory in any case, and the matrix unit multiplies whole tiles, so that each costs what
128 does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxherd.core import sharding
from jaxherd.core.errors import JaxherdError
from jaxherd.kernels.attention import blocks
from jaxherd.kernels.attention.mask import AttentionMask, allowed_pairs

_LANES = 128
_BLOCKS = (1024, 768, 640, 512, 384, 256, _LANES)

# With more blocks of keys than this the fused gradient's partial dq (one per block) costs more
# memory than the second gradient kernel costs time.
_FUSED_BLOCKS = 8

# Of several rows, up to so many blocks of keys each, all run in one grid.
_SHORT_BLOCKS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexRule:
    """A mask by array index; arrays are NumPy where they are known when tracing.

    Attributes:
      top_BT: index of the last key that each query may see; None for no bound.
      q_ids_BT, k_ids_BS: a query sees keys of its own id alone, negative is padding; or None.
      window: a key's index must be greater than top - window.
      reach: no query needs more keys than this up to its top (bounds the visits), or None.
    """

    top_BT: Any
    q_ids_BT: Any
    k_ids_BS: Any
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The comparison inside of a block; hashable by value, since it is a static argument."""

    window: int | None

    def __call__(self, top, key):
        if self.window is None:
            return key <= top
        return (key <= top) & (key > top - self.window)


def unsupported(q_BTNH, k_BSKH, mask: AttentionMask) -> str | None:
    """Return why splash attention cannot run for these arguments, or None if it can."""
    same = mask.self_attention and q_BTNH.shape[1] == k_BSKH.shape[1]
    # Without an order ids tell all of the rule, wherever the keys come from.
    if not same and not mask.keys_by_position and mask.kind != "bidirectional":
        return "keys are neither the queries' own tokens nor in the order of their positions"
    partitioner = sharding.active()
    if partitioner is not None and partitioner.mesh_axes("length"):
        return "the length is sharded"
    return None


def index_rule(mask: AttentionMask, length: int, keys: int, offset: Any = 0) -> IndexRule:
    """Return the mask by array index; `offset` is the first query's among the keys."""
    size = mask.size if mask.is_local else None
    if mask.contiguous:
        index_T = np.arange(length, dtype=np.int32)
        top, ids, k_ids = index_T, None, None
        if mask.kind == "bidirectional":
            top = None
        elif mask.kind == "chunked" and size is not None and size < length:
            ids = k_ids = index_T // size
        if mask.kind == "prefix" and mask.prefix_length_B is not None:
            top = jnp.clip(mask.prefix_length_B[:, None] - 1, index_T, length - 1)
        return IndexRule(
            _row(top), _row(ids), _row(k_ids), size if mask.kind == "sliding_window" else None, size
        )
    p_BT = mask.q_positions_BT
    ids, k_ids = mask.q_segments_BT, mask.k_segments_BS
    if mask.keys_by_position or ids is None or k_ids is None:
        ids, k_ids = jnp.zeros_like(p_BT), jnp.zeros_like(mask.k_positions_BS)
    # Where keys are the queries' own tokens their indices are known when tracing, unless rows are cut.
    index_BT: Any = (offset + np.arange(length, dtype=np.int32))[None]
    # The index at which each token's document has position 0.
    document_BT = index_BT - p_BT
    if mask.keys_by_position:
        document_BT = _origin(mask.k_positions_BS)
        index_BT = p_BT + document_BT
    if mask.kind == "chunked" and size:
        chunks, k_chunks = p_BT // size, mask.k_positions_BS // size
        # Chunks of a document are consecutive and documents too: ids never decrease.
        most = jnp.maximum(jnp.max(chunks), jnp.max(k_chunks)) + 2
        ids, k_ids = ids * most + chunks, k_ids * most + k_chunks
    top_BT = None
    if mask.kind != "bidirectional":
        top_BT = index_BT
        if mask.kind == "prefix" and mask.prefix_length_B is not None:
            top_BT = document_BT + jnp.maximum(p_BT, mask.prefix_length_B[:, None] - 1)
            top_BT = jnp.minimum(top_BT, keys - 1)
    ids = jnp.where(p_BT >= 0, ids, -1)
    k_ids = jnp.where(mask.k_positions_BS >= 0, k_ids, -1)
    return IndexRule(top_BT, ids, k_ids, size if mask.kind == "sliding_window" else None, size)


def _origin(k_positions_BS):
    """Return [B, 1] the index, negative or zero, at which position 0 would lie among the keys."""
    index_S = jnp.arange(k_positions_BS.shape[1], dtype=k_positions_BS.dtype)
    # The same for every key that is there; with none there is nothing to see.
    return jnp.where(k_positions_BS >= 0, index_S - k_positions_BS, -(2**30)).max(
        axis=1, keepdims=True
    )


def _row(x):
    return x if x is None or x.ndim == 2 else x[None]


def attend(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float, *, interpret: bool = False):
    """Equal to `reference.attend` where `unsupported` returns None, but for padding's own queries.

    Raises:
      JaxherdError: the arguments are not supported; the sentence says why.
    """
    reason = unsupported(q_BTNH, k_BSKH, mask)
    if reason is not None:
        raise JaxherdError(f"attention: splash cannot run because {reason}; use 'xla'.")
    batch, length, size = *q_BTNH.shape[:2], mask.size
    pairs = row_pairs(mask, length, k_BSKH.shape[1])
    q_BTNH = q_BTNH * scale
    if (
        mask.contiguous and mask.kind == "chunked" and size and size < length
        and length % size == 0 and size % _LANES == 0
    ):  # fmt: skip
        # Chunks are rows of their own: no ids, no visit of another chunk, small gradients.
        q_BTNH, k_BSKH, v_BSKH = (
            rearrange(x, "B (c t) N H -> (B c) t N H", t=size) for x in (q_BTNH, k_BSKH, v_BSKH)
        )
        rule, pairs = (
            IndexRule(np.arange(size, dtype=np.int32)[None], None, None),
            size * (size + 1) // 2,
        )
    else:
        rule = index_rule(mask, length, k_BSKH.shape[1])
    local = functools.partial(attend_rule, pairs=pairs, interpret=interpret)
    partitioner = sharding.active()
    if partitioner is None or partitioner.mesh.size == 1:
        out_BTNH = local(q_BTNH, k_BSKH, v_BSKH, rule)
    else:
        heads = partitioner.spec(("batch", None, "act_heads", None))
        kv_heads = partitioner.spec(("batch", None, "act_kv_heads", None))
        rows = partitioner.spec(("batch", None))

        # Only what is known at run time is cut up; constants stay with the rule.
        dynamic, where = jax.tree.flatten(rule)
        traced = [isinstance(x, jax.Array) for x in dynamic]

        def call(q, k, v, *given):
            given = iter(given)
            leaves = [next(given) if t else x for t, x in zip(traced, dynamic)]
            return local(q, k, v, jax.tree.unflatten(where, leaves))

        moving = [x for t, x in zip(traced, dynamic) if t]
        out_BTNH = jax.shard_map(
            call,
            mesh=partitioner.mesh,
            in_specs=(heads, kv_heads, kv_heads, *(rows for _ in moving)),
            out_specs=heads,
            check_vma=False,
        )(q_BTNH, k_BSKH, v_BSKH, *moving)
    return out_BTNH.reshape(batch, length, *out_BTNH.shape[2:])


def row_pairs(mask: AttentionMask, length: int, keys: int) -> int:
    """Return the pairs that the rule allows in a row that is one document.

    For a packed row, whose documents do not see each other, and for one with padding this is an
    upper bound, as are all figures made of it; for a prefix rule, of which the causal pairs alone
    are counted, a lower one.  What is between is known at run time only.
    """
    if mask.kind == "bidirectional":
        return length * keys
    # Queries are the last tokens of the document.
    kind = "causal" if mask.kind == "prefix" else mask.kind
    earlier = allowed_pairs(kind, mask.size, keys - length) if keys > length else 0
    return allowed_pairs(kind, mask.size, keys) - earlier


def block_size(length: int) -> int:
    """Return the tokens of a block: of few large ones and little padding what costs least.

    A visit of b x b scores is taken to cost b^2 / 150 + 560 bundles: v5e's figures for 256 and for
    768, forward, heads of 64 (README.md).
    """

    def cost(block):
        return (-(-length // block)) ** 2 * (block * block / 150 + 560)

    return min(_BLOCKS, key=cost)


def attend_rule(q_BTNH, k_BSKH, v_BSKH, rule: IndexRule, *, pairs=None, interpret: bool = False):
    """Run splash under a rule by index, on one device (also inside of a `shard_map`).

    Queries come scaled.  A query that sees no key gives some average of values, never NaN.
    `pairs` are those of a row (`row_pairs`), from which the planner learns the FLOPs; None leaves
    them unsaid.
    """
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    block_q, block_kv = block_size(length), block_size(keys)
    more, more_keys = -length % block_q, -keys % block_kv
    if more_keys and rule.q_ids_BT is None and rule.top_BT is None:
        # Nothing else hides the padding from a bidirectional query.
        rule = dataclasses.replace(
            rule,
            q_ids_BT=np.zeros((1, length), np.int32),
            k_ids_BS=np.zeros((1, keys), np.int32),
        )
    top, q_ids = _pad(rule.top_BT, more, None), _pad(rule.q_ids_BT, more, -1)
    k_ids = _pad(rule.k_ids_BS, more_keys, -1)
    q, k, v = (
        rearrange(jnp.pad(x, ((0, 0), (0, m), (0, 0), (0, 0))), "B T N H -> B N T H")
        for x, m in ((q_BTNH, more), (k_BSKH, more_keys), (v_BSKH, more_keys))
    )
    # A map by ids differs by row, and rows of different maps run one after the other: for short rows
    # the ids are compared inside of the blocks alone.
    by_ids = q.shape[0] == 1 or k.shape[2] // block_kv > _SHORT_BLOCKS
    fused = k.shape[2] // block_kv <= _FUSED_BLOCKS
    one = functools.partial(
        _row_of_splash, block_q=block_q, block_kv=block_kv, rule=rule, by_ids=by_ids, fused=fused,
        interpret=interpret,
    )  # fmt: skip
    # What all rows share stays out of the loop over rows, and static if it is.
    arrays = (top, q_ids, k_ids)
    in_axes = tuple(None if x is None or x.shape[0] == 1 else 0 for x in arrays)
    given = (x[0] if x is not None and axis is None else x for x, axis in zip(arrays, in_axes))
    name = "attention"
    if pairs is not None:
        # Where the map differs by row, each row is a call of the kernel by itself.
        alone = in_axes[0] == 0 or (by_ids and in_axes[1] == 0)
        rows = 1 if alone else q_BTNH.shape[0]
        name = flops_scope(2.0 * pairs * rows * q_BTNH.shape[2] * q_BTNH.shape[3], fused)
    with jax.named_scope(name):
        out: Any = jax.vmap(one, in_axes=(0, 0, 0, *in_axes))(q, k, v, *given)
    return rearrange(out, "B N T H -> B T N H")[:, :length].astype(q_BTNH.dtype)


def flops_scope(product: float, fused: bool) -> str:
    """Return the scope's name that tells `planning/costs.py` the FLOPs of one call of each kernel.

    jax's kernels carry no cost estimate and take none (README.md).  `product` are the FLOPs of one
    matrix product over all pairs.  Forward makes two (q k^T, p v); the fused gradient five (q k^T,
    do v^T, p^T do, ds^T q, ds k), of two kernels that of k and v four and that of q three.
    """
    dkv, dq = (5, 0) if fused else (4, 3)
    return f"kernel_flops_fwd_{2 * product:.6e}_dkv_{dkv * product:.6e}_dq_{dq * product:.6e}"


def _pad(x, more, value):
    if x is None or more == 0:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    if value is None:
        return xp.pad(x, ((0, 0), (0, more)), mode="edge")
    return xp.pad(x, ((0, 0), (0, more)), constant_values=value)


def block_map(top_T, q_ids_T, k_ids_S, rule: IndexRule, block_q, block_kv, length, keys):
    """Return ([q, s] needed pairs, the most visits of a block of queries, and of one of keys)."""
    if top_T is None and q_ids_T is None:
        needed = np.ones((length // block_q, keys // block_kv), bool)
    else:
        needed = blocks.needed_by_tokens(
            top_T, rule.reach, q_ids_T, k_ids_S, block_q, block_kv, keys
        )
    if isinstance(needed, np.ndarray):
        return needed, *(max(1, int(needed.sum(axis=axis).max())) for axis in (1, 0))
    rows, columns = needed.shape
    if rule.reach is None:
        return needed, columns, rows
    return (
        needed,
        min(columns, blocks.most_visits(block_q, block_kv, rule.reach)),
        min(rows, blocks.most_visits(block_kv, block_q, rule.reach)),
    )


def _row_of_splash(
    q_NTH, k_KSH, v_KSH, top_T, q_ids_T, k_ids_S, *, block_q, block_kv, rule, by_ids, fused,
    interpret,
):  # fmt: skip
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as info,
    )

    length, keys = q_NTH.shape[1], k_KSH.shape[1]
    ids = (q_ids_T, k_ids_S) if by_ids else (None, None)
    needed, width, height = block_map(top_T, *ids, rule, block_q, block_kv, length, keys)
    xp = np if isinstance(needed, np.ndarray) else jnp
    top: Any = None if top_T is None else jnp.asarray(top_T, jnp.int32)

    def made(at, works) -> Any:
        most = max(needed.shape)
        small = np.int8 if most <= 127 else np.int16
        return info.MaskInfo(
            data_next=jnp.asarray(at.astype(small))[None],
            mask_next=None,
            block_mask=jnp.asarray(works.astype(np.int8))[None],
            partial_mask_blocks=None,
            # Its annotation says NumPy; the kernel takes any array.
            q_sequence=top,
        )

    # A block of queries that visited nothing would divide by a sum of zero.
    nothing = ~needed.any(axis=1, keepdims=True) & (np.arange(needed.shape[1]) == 0)
    forward = made(*blocks.visits(needed | nothing, width))
    if fused:
        # Its grid is whole: block [q, s] itself, or the next one that works, fetched early.
        index = xp.where(needed, np.arange(needed.shape[0])[:, None], needed.shape[0] - 1)
        backward = made(xp.minimum.accumulate(index[::-1], axis=0)[::-1], needed)
    else:
        at, works = blocks.visits(needed.T, height)
        backward = made(at.T, works.T)
    # Whole blocks at once, but what 1,024 keys need is more than the registers and VMEM like.
    compute = 512 if block_kv > 768 else block_kv
    kernel = splash.SplashAttentionKernel(
        forward,
        None if fused else forward,
        backward,
        is_mqa=False,
        save_residuals=False,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=None if fused else block_q,
            block_kv_dq=None if fused else block_kv,
            use_fused_bwd_kernel=fused,
        ),
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention_residuals",
        mask_function=None if top_T is None else _Seen(rule.window),
        interpret=interpret,
    )
    segments = None
    if q_ids_T is not None:
        segments = splash.SegmentIds(jnp.asarray(q_ids_T), jnp.asarray(k_ids_S))
    return kernel(q_NTH, k_KSH, v_KSH, segments)
