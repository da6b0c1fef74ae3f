"""Attention for NVIDIA GPUs, through Pallas and Triton: every rule, values and gradients.

Rules over positions become numbers per token as for splash (`splash.index_rule`): the index of the
last key that a query may see, ids of documents, a window.  A block of queries loops over the run of
key blocks that it needs, a block of keys over the queries that need it, both counted by `blocks`
before the call: what is out of reach of a window, in another chunk or in another document is never
visited.  No operand is padded or repeated: loads are masked, and the query heads of a key/value head
share it; its gradient is summed over them inside of the kernel.

Compiled for H100 ahead of time and run in interpret mode; never timed, so never a default.

Axis letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size;
q, s blocks of queries and of keys; t, k, h tokens of a block, its keys and a padded head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels.attention import blocks
from jaxherd.kernels.attention.mask import AttentionMask
from jaxherd.kernels.attention.splash import IndexRule, index_rule, row_pairs, unsupported

_BLOCK = 64
_MASKED = -1e30


def attend(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, scale: float, *, interpret: bool = False):
    """Equal to `reference.attend` where `unsupported` returns None, but for padding's own queries.

    Raises:
      JaxherdError: the arguments are not supported; the sentence says why.
    """
    reason = unsupported(q_BTNH, k_BSKH, mask)
    if reason is not None:
        raise JaxherdError(f"attention: pallas_gpu cannot run because {reason}; use 'xla'.")
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    rule = index_rule(mask, length, keys)
    queries_Bq2, keys_Bs2 = _runs(rule, length, keys)
    tokens = tuple(
        None if x is None else jnp.asarray(x, jnp.int32)
        for x in (rule.top_BT, rule.q_ids_BT, rule.k_ids_BS)
    )
    static = (rule.window, row_pairs(mask, length, keys), interpret)
    q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
    out_BTNH: Any = _attention(q_BTNH, k_BSKH, v_BSKH, tokens, (queries_Bq2, keys_Bs2), static)
    return out_BTNH


def _runs(rule: IndexRule, length: int, keys: int) -> tuple[Any, Any]:
    """Return ([b, q, 2], [b, s, 2]): first block to meet and the one after the last; b is B or 1."""
    more, more_keys = -length % _BLOCK, -keys % _BLOCK
    arrays = (rule.top_BT, rule.q_ids_BT, rule.k_ids_BS)
    given = [x for x in arrays if x is not None]
    xp: Any = np if all(isinstance(x, np.ndarray) for x in given) else jnp

    def one(top, q_ids, k_ids):
        needed = np.ones(((length + more) // _BLOCK, (keys + more_keys) // _BLOCK), bool)
        if given:
            top = None if top is None else xp.pad(top, (0, more), mode="edge")
            if q_ids is not None:
                q_ids = xp.pad(q_ids, (0, more), constant_values=-1)
                k_ids = xp.pad(k_ids, (0, more_keys), constant_values=-1)
            needed = blocks.needed_by_tokens(
                top, rule.reach, q_ids, k_ids, _BLOCK, _BLOCK, keys + more_keys
            )
        return _ends(needed, xp), _ends(needed.T, xp)

    if all(x.shape[0] == 1 for x in given):
        ends_q, ends_s = one(*(None if x is None else x[0] for x in arrays))
        return jnp.asarray(ends_q, jnp.int32)[None], jnp.asarray(ends_s, jnp.int32)[None]
    # What all rows share is the same for each.
    shared = (x if x is None or x.shape[0] > 1 else x[0] for x in arrays)
    axes = tuple(None if x is None or x.shape[0] == 1 else 0 for x in arrays)
    ends_q, ends_s = jax.vmap(one, in_axes=axes)(*shared)
    return ends_q.astype(jnp.int32), ends_s.astype(jnp.int32)


def _ends(needed, xp):
    """Return [rows, 2]: the first True of each row and the one after the last; equal if none."""
    columns = needed.shape[1]
    some = needed.any(axis=1)
    first = xp.where(some, needed.argmax(axis=1), 0)
    last = xp.where(some, columns - needed[:, ::-1].argmax(axis=1), 0)
    return xp.stack([first, last], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BTNH, k_BSKH, v_BSKH, tokens, runs, static):
    return _forward(q_BTNH, k_BSKH, v_BSKH, tokens, runs, static)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, tokens, runs, static):
    window, pairs, interpret = static
    batch, length, heads, _ = q_BTNH.shape
    out_BTNH, peak_BNT = pl.pallas_call(
        functools.partial(_forward_kernel, window=window),
        grid=(pl.cdiv(length, _BLOCK), heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        **_how(2, pairs, q_BTNH, k_BSKH, interpret),
        name="attention",
    )(runs[0], *tokens, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, tokens, runs, out_BTNH, peak_BNT)


def _backward(static, saved, dout_BTNH):
    window, pairs, interpret = static
    q_BTNH, k_BSKH, v_BSKH, tokens, runs, out_BTNH, peak_BNT = saved
    batch, length, heads, _ = q_BTNH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    dout_BTNH = dout_BTNH.astype(q_BTNH.dtype)
    share_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )
    given = (*tokens, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, peak_BNT, share_BNT)
    dq_BTNH = pl.pallas_call(
        functools.partial(_dq_kernel, window=window),
        grid=(pl.cdiv(length, _BLOCK), heads, batch),
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        **_how(3, pairs, q_BTNH, k_BSKH, interpret),
        name="attention_dq",
    )(runs[0], *given)
    dk_BSKH, dv_BSKH = pl.pallas_call(
        functools.partial(_dkv_kernel, window=window),
        grid=(pl.cdiv(keys, _BLOCK), kv_heads, batch),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)),
        **_how(4, pairs, q_BTNH, k_BSKH, interpret),
        name="attention_dkv",
    )(runs[1], *given)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


_attention.defvjp(_forward, _backward)


def _how(products: int, pairs: int, q_BTNH, k_BSKH, interpret: bool) -> dict:
    """Return what all calls say: FLOPs of so many products over the pairs, operands once."""
    batch, _, heads, size = q_BTNH.shape
    moved = products * (q_BTNH.size + k_BSKH.size) * q_BTNH.dtype.itemsize
    return {
        "compiler_params": pltriton.CompilerParams(num_warps=4 if size <= 64 else 8, num_stages=2),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * pairs * batch * heads * size,
            transcendentals=pairs * batch * heads,
            bytes_accessed=moved,
        ),
        "interpret": interpret,
    }


def _dot(a, b, **how):
    exact = "highest" if a.dtype == jnp.float32 else None
    return pl.dot(a, b, precision=exact, **how).astype(jnp.float32)


def _numbers(ref, row, at, other):
    """Return one number per token of a block, `other` past the end; None stays None."""
    if ref is None:
        return None
    # What all rows share has one row.
    row = row if ref.shape[0] > 1 else 0
    return pltriton.load(ref.at[row, at], mask=at < ref.shape[1], other=other)


def _place(ref, row, at, head):
    """Return (reference to one head's tokens [t, h], which of it exists)."""
    size = ref.shape[3]
    h = jnp.arange(pl.next_power_of_2(size))
    inside = (at < ref.shape[1])[:, None] & (h < size)[None, :]
    return ref.at[row, at[:, None], head, h[None, :]], inside


def _tile(ref, row, at, head):
    place, inside = _place(ref, row, at, head)
    return pltriton.load(place, mask=inside, other=0.0)


def _store(ref, row, at, head, tile):
    place, inside = _place(ref, row, at, head)
    pltriton.store(place, tile.astype(ref.dtype), mask=inside)


def _seen(q_at, k_at, row, top_ref, q_ids_ref, k_ids_ref, length, keys, window):
    """Return [t, k]: which of a block's keys each of its queries may see."""
    seen = (q_at < length)[:, None] & (k_at < keys)[None, :]
    top_t = _numbers(top_ref, row, q_at, -1)
    if top_t is not None:
        seen &= k_at[None, :] <= top_t[:, None]
        if window is not None:
            seen &= k_at[None, :] > top_t[:, None] - window
    q_ids_t, k_ids_k = _numbers(q_ids_ref, row, q_at, -2), _numbers(k_ids_ref, row, k_at, -3)
    if q_ids_t is not None and k_ids_k is not None:
        seen &= q_ids_t[:, None] == k_ids_k[None, :]
    return seen


def _run_of(runs_ref, row, block):
    row = row if runs_ref.shape[0] > 1 else 0
    return runs_ref[row, block, 0], runs_ref[row, block, 1]


def _forward_kernel(
    runs_ref, top_ref, q_ids_ref, k_ids_ref, q_ref, k_ref, v_ref, out_ref, peak_ref, *, window
):
    block, head, row = (pl.program_id(i) for i in range(3))
    kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    q_at = block * _BLOCK + jnp.arange(_BLOCK)
    q_th = _tile(q_ref, row, q_at, head)
    length, keys = q_ref.shape[1], k_ref.shape[1]

    def visit(s, carry):
        peak_t, total_t, sum_th = carry
        k_at = s * _BLOCK + jnp.arange(_BLOCK)
        scores_tk = _dot(q_th, _tile(k_ref, row, k_at, kv_head), trans_b=True)
        seen_tk = _seen(q_at, k_at, row, top_ref, q_ids_ref, k_ids_ref, length, keys, window)
        scores_tk = jnp.where(seen_tk, scores_tk, _MASKED)
        now_t = jnp.maximum(peak_t, scores_tk.max(axis=1))
        # Masked scores underflow to zero, also where nothing was seen so far.
        weights_tk = jnp.exp(scores_tk - jnp.maximum(now_t, _MASKED / 2)[:, None])
        shrink_t = jnp.exp(peak_t - now_t)
        added_th = _dot(weights_tk.astype(v_ref.dtype), _tile(v_ref, row, k_at, kv_head))
        total_t = shrink_t * total_t + weights_tk.sum(axis=1)
        return now_t, total_t, shrink_t[:, None] * sum_th + added_th

    start = (
        jnp.full(_BLOCK, _MASKED, jnp.float32),
        jnp.zeros(_BLOCK, jnp.float32),
        jnp.zeros(q_th.shape, jnp.float32),
    )
    peak_t, total_t, sum_th = jax.lax.fori_loop(*_run_of(runs_ref, row, block), visit, start)
    some_t = jnp.where(total_t > 0, total_t, 1.0)
    _store(out_ref, row, q_at, head, sum_th / some_t[:, None])
    # The logarithm of the sum of exponentials; the gradient looks at it where a key is seen alone.
    pltriton.store(peak_ref.at[row, head, q_at], peak_t + jnp.log(some_t), mask=q_at < length)


def _gradient_of_scores(q_th, k_kh, v_kh, dout_th, peak_t, share_t, seen_tk):
    """Return ([t, k] the weights, [t, k] the gradient of the scores), both float32."""
    scores_tk = _dot(q_th, k_kh, trans_b=True)
    weights_tk = jnp.exp(jnp.where(seen_tk, scores_tk - peak_t[:, None], _MASKED))
    dweights_tk = _dot(dout_th, v_kh, trans_b=True)
    return weights_tk, weights_tk * (dweights_tk - share_t[:, None])


def _dq_kernel(
    runs_ref, top_ref, q_ids_ref, k_ids_ref, q_ref, k_ref, v_ref, dout_ref, peak_ref, share_ref,
    dq_ref, *, window,
):  # fmt: skip
    block, head, row = (pl.program_id(i) for i in range(3))
    kv_head = jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])
    length, keys = q_ref.shape[1], k_ref.shape[1]
    q_at = block * _BLOCK + jnp.arange(_BLOCK)
    q_th, dout_th = _tile(q_ref, row, q_at, head), _tile(dout_ref, row, q_at, head)
    peak_t, share_t = (
        pltriton.load(ref.at[row, head, q_at], mask=q_at < length, other=0.0)
        for ref in (peak_ref, share_ref)
    )

    def visit(s, dq_th):
        k_at = s * _BLOCK + jnp.arange(_BLOCK)
        k_kh, v_kh = _tile(k_ref, row, k_at, kv_head), _tile(v_ref, row, k_at, kv_head)
        seen_tk = _seen(q_at, k_at, row, top_ref, q_ids_ref, k_ids_ref, length, keys, window)
        _, dscores_tk = _gradient_of_scores(q_th, k_kh, v_kh, dout_th, peak_t, share_t, seen_tk)
        return dq_th + _dot(dscores_tk.astype(k_kh.dtype), k_kh)

    start = jnp.zeros(q_th.shape, jnp.float32)
    dq_th = jax.lax.fori_loop(*_run_of(runs_ref, row, block), visit, start)
    _store(dq_ref, row, q_at, head, dq_th)


def _dkv_kernel(
    runs_ref, top_ref, q_ids_ref, k_ids_ref, q_ref, k_ref, v_ref, dout_ref, peak_ref, share_ref,
    dk_ref, dv_ref, *, window,
):  # fmt: skip
    block, kv_head, row = (pl.program_id(i) for i in range(3))
    groups = q_ref.shape[2] // k_ref.shape[2]
    length, keys = q_ref.shape[1], k_ref.shape[1]
    k_at = block * _BLOCK + jnp.arange(_BLOCK)
    k_kh, v_kh = _tile(k_ref, row, k_at, kv_head), _tile(v_ref, row, k_at, kv_head)
    first, stop = _run_of(runs_ref, row, block)
    count = stop - first

    def visit(i, carry):
        dk_kh, dv_kh = carry
        # All query blocks of one query head, then those of the next.
        group = jax.lax.div(i, count)
        head = kv_head * groups + group
        q_at = (first + i - group * count) * _BLOCK + jnp.arange(_BLOCK)
        q_th, dout_th = _tile(q_ref, row, q_at, head), _tile(dout_ref, row, q_at, head)
        peak_t, share_t = (
            pltriton.load(ref.at[row, head, q_at], mask=q_at < length, other=0.0)
            for ref in (peak_ref, share_ref)
        )
        seen_tk = _seen(q_at, k_at, row, top_ref, q_ids_ref, k_ids_ref, length, keys, window)
        weights_tk, dscores_tk = _gradient_of_scores(
            q_th, k_kh, v_kh, dout_th, peak_t, share_t, seen_tk
        )
        dv_kh += _dot(weights_tk.astype(dout_th.dtype), dout_th, trans_a=True)
        dk_kh += _dot(dscores_tk.astype(q_th.dtype), q_th, trans_a=True)
        return dk_kh, dv_kh

    zeros = jnp.zeros(k_kh.shape, jnp.float32)
    dk_kh, dv_kh = jax.lax.fori_loop(0, groups * count, visit, (zeros, zeros))
    _store(dk_ref, row, k_at, kv_head, dk_kh)
    _store(dv_ref, row, k_at, kv_head, dv_kh)
