"""Paged attention for TPU: one grid step is a few pages of one sequence.

The list of steps is made at run time from the lengths (`schedule`), and the grid is as long as the
list, so that short sequences in a batch with a long one cost what they need.  Pages come through
the grid's own pipeline by scalar-prefetched page numbers: only pages that a rule lets a query see
are read, each once.

All key/value heads of a page are multiplied at once (`wide`).  The matrix unit's time is that of
loading the pages, which happens once for all heads; the zeros ride along.

Axis letters: B sequences, T new tokens, N query heads, K key/value heads, G = N / K, H head size,
D = K H, R = T N rows, S steps, n pages of a step, p tokens of a page, s = n p tokens of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxherd.kernels.paged_attention.pool import PagePool
from jaxherd.kernels.paged_attention.schedule import most_pages, schedule
from jaxherd.kernels.paged_attention.wide import own_part, widen

_LANES = 128
_MASKED = -1e30

# Enough to hide a step's fixed cost behind its reads; pages of a step are operands, so not many.
_STEP_TOKENS, _STEP_PAGES = 512, 8

# Tokens are sublanes: whole tiles of each type.
_SUBLANES = {"float32": 8, "bfloat16": 16, "int8": 32}


def unsupported(q_BTNH, pool: PagePool) -> str | None:
    """Return why the kernel cannot run for these arguments, or None if it can."""
    dtype = pool.k_PpD.dtype.name
    if dtype not in _SUBLANES:
        return f"the pool is {dtype}, not one of {', '.join(_SUBLANES)}"
    if pool.k_PpD.shape[2] % _LANES:
        return f"all heads of a token are {pool.k_PpD.shape[2]} wide, no multiple of {_LANES}"
    if pool.page_size % _SUBLANES[dtype]:
        return f"pages of {pool.page_size} {dtype} tokens are no multiple of {_SUBLANES[dtype]}"
    if pool.k_scale_PKp is not None and pool.page_size % _LANES:
        return f"pages of {pool.page_size} tokens with scales are no multiple of {_LANES}"
    return None


def pages_of_step(page_size: int, most: int) -> int:
    """Return how many pages a grid step takes."""
    return max(1, min(_STEP_TOKENS // page_size, _STEP_PAGES, most))


def attend(q_BTNH, pool: PagePool, page_table_BQ, lengths_B, kind, size, scale, *, interpret):
    """Return [B, T, N, H]; see `api.paged_attention`."""
    batch, new, heads, head_dim = q_BTNH.shape
    page, width = pool.page_size, pool.k_PpD.shape[2]
    kv_heads = width // head_dim
    groups = heads // kv_heads
    most = most_pages(page_table_BQ.shape[1], new, page, kind, size)
    n = pages_of_step(page, most)
    plan = schedule(page_table_BQ, lengths_B, new, page, kind, size, n)
    rows = new * heads

    q_BRD = widen((q_BTNH * scale).astype(q_BTNH.dtype), kv_heads)
    has_scales = pool.k_scale_PKp is not None

    def row(s, row_S, *_):
        return row_S[s], 0, 0

    def page_at(i):
        return lambda s, row_S, first_S, pages_S, lengths: (pages_S[s * n + i], 0, 0)

    page_specs = [pl.BlockSpec((1, page, width), page_at(i)) for i in range(n)]
    scale_specs = [pl.BlockSpec((1, kv_heads, page), page_at(i)) for i in range(n)]
    operands = [pool.k_PpD] * n + [pool.v_PpD] * n
    specs = page_specs * 2
    if has_scales:
        operands += [pool.k_scale_PKp] * n + [pool.v_scale_PKp] * n
        specs = specs + scale_specs * 2
    out_BRD = pl.pallas_call(
        functools.partial(
            _kernel, n=n, page=page, new=new, heads=heads, groups=groups, kind=kind, size=size,
            has_scales=has_scales,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.total_1[0],),
            in_specs=[pl.BlockSpec((1, rows, width), row), *specs],
            out_specs=pl.BlockSpec((1, rows, width), row),
            scratch_shapes=[
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, rows, width), q_BTNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(q_BTNH, pool, most),
        interpret=interpret,
        name="paged_attention",
    )(plan.row_S, plan.first_S, plan.pages_Sn.reshape(-1), lengths_B, q_BRD, *operands)  # fmt: skip
    return own_part(out_BRD, new, kv_heads)


def cost(q_BTNH, pool: PagePool, pages: int) -> pl.CostEstimate:
    """Return what the kernel does when each sequence needs `pages` pages, the most it can."""
    batch, new, heads, _ = q_BTNH.shape
    page, width = pool.page_size, pool.k_PpD.shape[2]
    tokens, rows = batch * pages * page, new * heads
    moved = 2 * tokens * width * pool.k_PpD.dtype.itemsize
    if pool.k_scale_PKp is not None:
        moved += 2 * batch * pages * pool.k_scale_PKp[0].size * 4
    moved += 2 * batch * rows * width * q_BTNH.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * rows * tokens * width, transcendentals=rows * tokens, bytes_accessed=moved
    )


def _kernel(row_S, first_S, pages_S, lengths_B, q_ref, *refs, n, page, new, heads, groups, kind,
            size, has_scales):  # fmt: skip
    del pages_S
    k_refs, v_refs, refs = refs[:n], refs[n : 2 * n], refs[2 * n :]
    k_scales = v_scales = ()
    if has_scales:
        k_scales, v_scales, refs = refs[:n], refs[n : 2 * n], refs[2 * n :]
    o_ref, m_ref, l_ref, acc_ref = refs
    step, steps = pl.program_id(0), pl.num_programs(0)
    row, first = row_S[step], first_S[step]
    length = lengths_B[row]
    previous = row_S[jnp.maximum(step - 1, 0)]
    following = row_S[jnp.minimum(step + 1, steps - 1)]

    @pl.when((step == 0) | (previous != row))
    def start():
        m_ref[...] = jnp.full_like(m_ref, _MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    tokens = n * page

    def visit(last: bool):
        q = q_ref[0]
        k = jnp.concatenate([ref[0] for ref in k_refs]).astype(q.dtype)
        exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jax.lax.dot_general(
            q, k, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        if has_scales:
            scores = scores * _per_row(k_scales, groups, new)
        position = first * page + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        low, high = _bounds(length, scores.shape, new, heads, kind, size)
        # A page that was never written in full may hold anything, also no numbers.
        scores = jnp.where((position <= high) & (position >= low), scores, _MASKED)
        m_old, l_old = m_ref[...], l_ref[...]
        m = jnp.maximum(m_old, scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - jnp.maximum(m[:, :1], _MASKED / 2))
        shrink = jnp.exp(m_old - m)
        m_ref[...] = m
        l_ref[...] = shrink * l_old + weights.sum(axis=1, keepdims=True)
        if has_scales:
            weights = weights * _per_row(v_scales, groups, new, length - first * page)
        v = jnp.concatenate([ref[0] for ref in v_refs]).astype(q.dtype)
        if last:
            written = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < length - first * page
            v = jnp.where(written, v, jnp.zeros_like(v))
        acc_ref[...] = shrink[:, :1] * acc_ref[...] + jnp.dot(
            weights.astype(q.dtype), v, precision=exact, preferred_element_type=jnp.float32
        )

    whole = first * page + tokens <= length

    @pl.when(whole)
    def inside():
        visit(last=False)

    @pl.when(jnp.logical_not(whole) & (first * page < length))
    def at_the_end():
        visit(last=True)

    @pl.when((step == steps - 1) | (following != row))
    def finish():
        total = l_ref[:, :1]
        out = acc_ref[...] * (1.0 / jnp.where(total > 0, total, 1.0))
        o_ref[0] = out.astype(o_ref.dtype)


def _per_row(scale_refs, groups: int, new: int, written=None):
    """Return [R, s]: each row's own head's scale of each token."""
    scales = jnp.concatenate([ref[0] for ref in scale_refs], axis=1)
    if written is not None:
        token = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
        scales = jnp.where(token < written, scales, 0.0)
    rows = [
        jnp.broadcast_to(scales[k : k + 1], (groups, scales.shape[1]))
        for k in range(scales.shape[0])
    ]
    return jnp.concatenate(rows * new)


def _bounds(length, shape, new: int, heads: int, kind, size):
    """Return the first and last position that each row sees: scalars for one new token."""

    def of(token):
        position = length - new + token
        if kind == "chunked":
            low = jax.lax.div(jnp.maximum(position, 0), size) * size
        elif kind == "sliding_window":
            low = position - size + 1
        else:
            low = jnp.int32(0)
        return low, position

    low, high = of(0)
    if new == 1:
        return low, high
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    low, high = jnp.full(shape, low), jnp.full(shape, high)
    for token in range(1, new):
        later = row >= token * heads
        next_low, next_high = of(token)
        low, high = jnp.where(later, next_low, low), jnp.where(later, next_high, high)
    return low, high
