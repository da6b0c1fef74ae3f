"""Paged attention for NVIDIA GPUs, through Pallas and Triton.

A program is one sequence, one key/value head and one share of the sequence's tokens: with few
sequences the tokens are cut among more programs, so that all multiprocessors read.  It walks the
tokens that the rule lets the new ones see, page by page through the table, reads the head's part of
each once for all of its query heads, and keeps a running softmax; the shares are joined after it.

Compiled for H100 ahead of time and run in interpret mode; never timed, so never a default.

Axis letters: B sequences, T new tokens, N query heads, K key/value heads, G = N / K, H head size, C
shares of a sequence; r rows (the T G queries of a head, padded), s tokens of a tile, h a padded head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxherd.kernels.paged_attention.pool import PagePool
from jaxherd.kernels.paged_attention.schedule import first_position, most_pages, page_range

_MASKED = -1e30
_TILE = 64  # tokens of a step, or a page where that is smaller
_LEAST = 16  # the smallest side of a product in Triton
_PROGRAMS = 264  # two for each multiprocessor of an H100
_SHARE = 8  # tiles that are worth a program of their own


def unsupported(q_BTNH, pool: PagePool) -> str | None:
    """Return why the kernel cannot run for these arguments, or None if it can."""
    dtype = pool.k_PpD.dtype.name
    if dtype not in ("float32", "bfloat16", "int8"):
        return f"the pool is {dtype}, not one of float32, bfloat16, int8"
    if pool.page_size < _LEAST or pool.page_size & (pool.page_size - 1):
        return f"pages of {pool.page_size} tokens are no power of two from {_LEAST} on"
    return None


def shares(batch: int, kv_heads: int, tiles: int) -> int:
    """Return among how many programs the tiles of one sequence and head are divided."""
    return max(1, min(math.ceil(_PROGRAMS / (batch * kv_heads)), tiles // _SHARE))


def attend(q_BTNH, pool: PagePool, page_table_BQ, lengths_B, kind, size, scale, *, interpret):
    """Return [B, T, N, H]; see `api.paged_attention`."""
    batch, new, heads, head_dim = q_BTNH.shape
    page = pool.page_size
    kv_heads = pool.k_PpD.shape[2] // head_dim
    groups = heads // kv_heads
    tile = min(page, _TILE)
    most = most_pages(page_table_BQ.shape[1], new, page, kind, size)
    parts = shares(batch, kv_heads, most * page // tile)
    first_B, count_B = page_range(lengths_B, new, page, kind, size)
    # In tiles: the pages in sight, up to the last token.
    start_B = first_B * (page // tile)
    stop_B = jnp.where(count_B > 0, -(-lengths_B // tile), start_B)
    rows = max(_LEAST, pl.next_power_of_2(new * groups))
    wide = pl.next_power_of_2(head_dim)
    scales = (pool.k_scale_PKp, pool.v_scale_PKp)
    operands = (q_BTNH * scale).astype(q_BTNH.dtype), pool.k_PpD, pool.v_PpD
    read = batch * most * page * kv_heads * head_dim
    sums_BKCrh, peaks_BKCr, totals_BKCr = pl.pallas_call(
        functools.partial(
            _kernel, tile=tile, rows=rows, kv_heads=kv_heads, parts=parts, kind=kind, size=size
        ),
        grid=(parts, kv_heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows, wide), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
        # Full tables under a causal rule: lengths are known at run time only.
        cost_estimate=pl.CostEstimate(
            flops=4 * read * groups * new,
            transcendentals=read // head_dim * groups * new,
            bytes_accessed=2 * read * pool.k_PpD.dtype.itemsize
            + (0 if scales[0] is None else 2 * read // head_dim * 4),
        ),
        interpret=interpret,
        name="paged_attention",
    )(page_table_BQ, lengths_B, start_B, stop_B, *operands, *scales)
    weights_BKCr = jnp.exp(
        peaks_BKCr - jnp.maximum(peaks_BKCr.max(axis=2, keepdims=True), _MASKED / 2)
    )
    total_BKr = (weights_BKCr * totals_BKCr).sum(axis=2)
    sum_BKrh = (weights_BKCr[..., None] * sums_BKCrh).sum(axis=2)
    out_BKrh = sum_BKrh / jnp.where(total_BKr > 0, total_BKr, 1.0)[..., None]
    out = out_BKrh[:, :, : new * groups, :head_dim]
    return rearrange(out, "B K (T G) H -> B T (K G) H", T=new).astype(q_BTNH.dtype)


def _kernel(
    table_ref, lengths_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, k_scale_ref, v_scale_ref,
    sum_ref, peak_ref, total_ref, *, tile: int, rows: int, kv_heads: int, parts: int, kind, size,
):  # fmt: skip
    part, kv_head, sequence = (pl.program_id(i) for i in range(3))
    new, heads, head_dim = q_ref.shape[1:]
    groups, each = heads // kv_heads, k_ref.shape[1] // tile
    row_r = jnp.arange(rows, dtype=jnp.int32)
    token_r = jax.lax.div(row_r, jnp.full_like(row_r, groups))
    column_h = jnp.arange(sum_ref.shape[-1], dtype=jnp.int32)
    inside_h = column_h < head_dim
    q_rh = pltriton.load(
        q_ref.at[
            sequence, token_r[:, None], (kv_head * groups + row_r - token_r * groups)[:, None],
            column_h[None, :],
        ],
        mask=(token_r < new)[:, None] & inside_h[None, :],
        other=0.0,
    )  # fmt: skip
    length = lengths_ref[sequence]
    # Rows of padding are as the last token, so that nothing of them is out of range.
    high_r = length - new + jnp.minimum(token_r, new - 1)
    low_r = first_position(jnp.maximum(high_r, 0), kind, size)
    exact = "highest" if q_rh.dtype == jnp.float32 else None

    def scaled(ref, page, at_s, kept_s):
        return pltriton.load(ref.at[page, kv_head, at_s], mask=kept_s, other=0.0)

    def visit(i, carry):
        peak_r, total_r, sum_rh = carry
        page = table_ref[sequence, jax.lax.div(i, each)]
        at_s = jax.lax.rem(i, each) * tile + jnp.arange(tile, dtype=jnp.int32)
        position_s = i * tile + jnp.arange(tile, dtype=jnp.int32)
        # What was never written may be no number at all.
        written_s = position_s < length
        place = (page, at_s[:, None], kv_head * head_dim + column_h[None, :])
        inside = written_s[:, None] & inside_h[None, :]
        k_sh, v_sh = (
            pltriton.load(ref.at[place], mask=inside, other=jnp.zeros((), ref.dtype))
            .astype(q_rh.dtype)
            for ref in (k_ref, v_ref)
        )  # fmt: skip
        scores_rs = pl.dot(q_rh, k_sh, trans_b=True, precision=exact).astype(jnp.float32)
        if k_scale_ref is not None:
            scores_rs *= scaled(k_scale_ref, page, at_s, written_s)[None, :]
        seen_rs = (position_s[None, :] <= high_r[:, None]) & (position_s[None, :] >= low_r[:, None])
        scores_rs = jnp.where(seen_rs, scores_rs, _MASKED)
        now_r = jnp.maximum(peak_r, scores_rs.max(axis=1))
        weights_rs = jnp.exp(scores_rs - jnp.maximum(now_r, _MASKED / 2)[:, None])
        shrink_r = jnp.exp(peak_r - now_r)
        total_r = shrink_r * total_r + weights_rs.sum(axis=1)
        if v_scale_ref is not None:
            weights_rs *= scaled(v_scale_ref, page, at_s, written_s)[None, :]
        added_rh = pl.dot(weights_rs.astype(q_rh.dtype), v_sh, precision=exact)
        return now_r, total_r, shrink_r[:, None] * sum_rh + added_rh.astype(jnp.float32)

    start, stop = start_ref[sequence], stop_ref[sequence]
    share = jax.lax.div(stop - start + parts - 1, parts)
    begin = start + part * share
    carry = (
        jnp.full(rows, _MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, sum_ref.shape[-1]), jnp.float32),
    )
    peak_r, total_r, sum_rh = jax.lax.fori_loop(
        begin, jnp.minimum(begin + share, stop), visit, carry
    )
    own = (sequence, kv_head, part)
    pltriton.store(peak_ref.at[*own, row_r], peak_r)
    pltriton.store(total_ref.at[*own, row_r], total_r)
    pltriton.store(sum_ref.at[*own, row_r[:, None], column_h[None, :]], sum_rh)
