"""Paged attention against attention over plain rows, over pools full of garbage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Parity

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import AttentionMask, PagePool, attention, paged_attention
from jaxherd.kernels.paged_attention import pallas_gpu
from jaxherd.kernels.paged_attention import schedule as schedules
from jaxherd.kernels.paged_attention.arg_specs import ARG_SPECS, ArgSpec

# A softmax over hundreds of products.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def filled(spec: ArgSpec, lengths, seed=0, garbage=np.nan):
    """Return (q, pool, table, k, v): pages in random order, garbage wherever nothing is to be read.

    k, v are the rows as the pool holds them (codes times scales).
    """
    rng = np.random.default_rng(seed)
    batch, page = spec.batch, spec.page_size
    pages = -(-spec.length // page)
    used = int(sum(-(-n // page) for n in lengths))
    order = iter(rng.permutation(used + 3))
    table = np.full((batch, pages), 2**30, np.int32)
    for row, length in enumerate(lengths):
        for i in range(-(-length // page)):
            table[row, i] = next(order)
    shape = (batch, spec.length, spec.kv_heads, spec.head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), spec.query_dtype) for _ in range(2))
    pool = PagePool.empty(used + 3, page, spec.kv_heads, spec.head_dim, spec.dtype)
    codes = spec.dtype == "int8"
    bad = jnp.int8(127) if codes else garbage
    pool = dataclasses.replace(
        pool,
        k_PpD=jnp.full_like(pool.k_PpD, bad),
        v_PpD=jnp.full_like(pool.v_PpD, bad),
        k_scale_PKp=jnp.full_like(pool.k_scale_PKp, garbage) if codes else None,
        v_scale_PKp=jnp.full_like(pool.v_scale_PKp, garbage) if codes else None,
    )
    index = np.arange(spec.length)
    positions = np.where(index < np.asarray(lengths)[:, None], index, -1).astype(np.int32)
    pool = pool.write(k, v, jnp.asarray(table), jnp.asarray(positions))
    q = rng.normal(size=(batch, spec.new, spec.heads, spec.head_dim))
    return jnp.asarray(q, spec.query_dtype), pool, jnp.asarray(table), k, v


def forgotten(spec, table, lengths):
    """Return the table with every entry out of reach replaced by nonsense."""
    first, _ = schedules.page_range(
        jnp.asarray(lengths), spec.new, spec.page_size, spec.kind, spec.size
    )
    index = np.arange(table.shape[1])
    return jnp.where(index < np.asarray(first)[:, None], -(2**30), table)


def call(spec, **fixed):
    def run(q, pool, table, lengths, **options):
        return paged_attention(
            q, pool, table, lengths, kind=spec.kind, size=spec.size, **fixed, **options
        )

    return run


def lengths_of(spec, seed=0):
    """Return ragged lengths: a full row, an odd one, an idle one if there is room."""
    rng = np.random.default_rng(seed)
    return [spec.length, int(rng.integers(spec.new, spec.length)), 0, 1][: spec.batch]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("name", ARG_SPECS)
def test_kernel_is_the_reference(name, implementation):
    spec = ARG_SPECS[name].shrunk()
    lengths = lengths_of(spec)
    q, pool, table, _, _ = filled(spec, lengths)
    table = forgotten(spec, table, lengths)
    Parity(call(spec), (), TOLERANCE).check(
        implementation, (q, pool, table, jnp.asarray(lengths)), interpret=True, gradients=False
    )


@pytest.mark.parametrize("name", ["scout_chunked", "mobilellm_pro_full_int8", "scout_draft_4"])
def test_triton_divides_long_sequences(name, monkeypatch):
    """Among several programs, some of which find nothing to do."""
    monkeypatch.setattr(pallas_gpu, "_SHARE", 1)
    spec = dataclasses.replace(ARG_SPECS[name].shrunk(), batch=3)
    assert pallas_gpu.shares(3, spec.kv_heads, 4) == 4
    lengths = lengths_of(spec)
    q, pool, table, _, _ = filled(spec, lengths)
    table = forgotten(spec, table, lengths)
    Parity(call(spec), (), TOLERANCE).check(
        "pallas_gpu", (q, pool, table, jnp.asarray(lengths)), interpret=True, gradients=False
    )


@pytest.mark.parametrize("name", ARG_SPECS)
def test_by_row_is_the_reference(name):
    spec = ARG_SPECS[name].shrunk()
    lengths = lengths_of(spec)
    q, pool, table, _, _ = filled(spec, lengths)
    table = forgotten(spec, table, lengths)
    given_ = (q, pool, table, jnp.asarray(lengths))
    Parity(call(spec), (), TOLERANCE).check("by_row", given_, gradients=False)


SHAPES = dict(
    kind=st.sampled_from(["causal", "chunked", "sliding_window"]), size=st.integers(1, 100),
    page_size=st.sampled_from([8, 16]), pages=st.integers(1, 9), new=st.integers(1, 3),
    groups=st.sampled_from([1, 4, 5, 8]), seed=st.integers(0, 99), batch=st.integers(1, 4),
)  # fmt: skip


def check_any(implementation, kind, size, page_size, pages, new, groups, seed, batch):
    spec = ArgSpec(
        "any", batch, page_size * pages, 2 * groups, 2, 64, kind, size, page_size, new,
        "float32", "float32",
    )  # fmt: skip
    lengths = np.random.default_rng(seed).integers(0, spec.length + 1, batch).tolist()
    q, pool, table, _, _ = filled(spec, lengths, seed)
    given_ = (q, pool, forgotten(spec, table, lengths), jnp.asarray(lengths))
    interpret = implementation.startswith("pallas")
    Parity(call(spec), (), TOLERANCE).check(
        implementation, given_, interpret=interpret, gradients=False
    )


@given(**SHAPES)
@settings(max_examples=8)
def test_any_shape(**drawn):
    check_any("pallas_tpu", **drawn)
    check_any("by_row", **drawn)


@given(**{**SHAPES, "page_size": st.sampled_from([16, 32])})
@settings(max_examples=4)
def test_any_shape_through_triton(**drawn):
    check_any("pallas_gpu", **drawn)


@pytest.mark.parametrize("kind, size", [("causal", None), ("chunked", 24), ("sliding_window", 20)])
@pytest.mark.parametrize("new", [1, 3])
def test_reference_is_attention_over_plain_rows(kind, size, new):
    spec = ArgSpec("plain", 4, 64, 4, 2, 64, kind, size, 16, new, "float32", "float32")
    lengths = [64, 25, 0, 2]
    q, pool, table, k, v = filled(spec, lengths)
    index = np.arange(64)
    mask = AttentionMask(
        jnp.asarray(lengths)[:, None] - new + jnp.arange(new),
        jnp.asarray(np.where(index < np.asarray(lengths)[:, None], index, -1)),
        kind=kind, size=size,
    )  # fmt: skip
    growth = jnp.linspace(0.5, 2, 4 * new).reshape(4, new)
    wanted = attention(
        q, k, v, mask=mask, scale=0.2, temperature_BT=growth, implementation="reference"
    )
    found = call(spec, implementation="reference")(
        q, pool, forgotten(spec, table, lengths), jnp.asarray(lengths), scale=0.2,
        temperature_BT=growth,
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (np.asarray(found[2]) == 0).all(), "an idle row gives zeros"


def test_int8_pools_hold_the_rows():
    spec = dataclasses.replace(ARG_SPECS["mobilellm_pro_full_int8"].shrunk(), batch=2)
    q, pool, table, k, v = filled(spec, [512, 200])
    stored = (
        pool.k_PpD[table[1, 1]].reshape(128, 4, 64) * pool.k_scale_PKp[table[1, 1]].T[..., None]
    )
    rows = np.asarray(k[1, 128:200], np.float32)
    assert np.abs(np.asarray(stored)[:72] - rows).max() <= np.abs(rows).max() / 127 / 2 + 1e-6


@given(
    kind=st.sampled_from(["causal", "chunked", "sliding_window"]), size=st.integers(1, 60),
    new=st.integers(1, 3), n=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5),
)  # fmt: skip
def test_the_steps_hold_the_needed_pages_once(kind, size, new, n, lengths):
    """Counted from the list that drives the kernel's reads."""
    page, pages = 8, 10
    table = np.arange(len(lengths) * pages, dtype=np.int32).reshape(len(lengths), pages)
    plan = schedules.schedule(jnp.asarray(table), jnp.asarray(lengths), new, page, kind, size, n)
    wanted = set()
    for row, length in enumerate(lengths):
        for p in range(max(length - new, 0), length):
            low = {"causal": 0, "chunked": p // size * size}.get(kind, max(p - size + 1, 0))
            wanted |= {int(table[row, r // page]) for r in range(low, p + 1)}
    total = int(plan.total_1[0])
    held = np.asarray(plan.pages_Sn)[:total]
    # Reads: an entry that differs from the one before it in its column.
    reads = [held[0, i] for i in range(n)]
    reads += [held[s, i] for s in range(1, total) for i in range(n) if held[s, i] != held[s - 1, i]]
    assert wanted <= set(map(int, reads))
    assert len(reads) <= len(wanted) + n, "at most one page a column is read in vain, at the start"
    most = schedules.most_pages(pages, new, page, kind, size)
    _, counts = schedules.page_range(jnp.asarray(lengths), new, page, kind, size)
    assert np.asarray(counts).max() <= most


def test_a_local_layer_costs_its_reach_and_not_its_length():
    from jaxherd.kernels.paged_attention.pallas_tpu import cost

    spec = ARG_SPECS["scout_chunked"]
    pool = jax.eval_shape(lambda: PagePool.empty(4096, 128, 8, 128, jnp.bfloat16))
    q = jax.ShapeDtypeStruct((64, 1, 40, 128), jnp.bfloat16)

    def moved(pages):
        most = schedules.most_pages(pages, 1, 128, spec.kind, spec.size)
        return cost(q, pool, most).bytes_accessed

    assert moved(1024) == moved(64), "131,072 tokens read what 8,192 do"
    # Keys and values of one chunk a sequence, and the wide rows of queries and outputs.
    assert moved(1024) == 64 * (8192 * 1024 * 2 * 2 + 2 * 40 * 1024 * 2)


def test_what_does_not_fit_is_said():
    spec = ArgSpec("bad", 1, 64, 4, 2, 64, page_size=16, dtype="float32", query_dtype="float32")
    q, pool, table, _, _ = filled(spec, [64])
    lengths = jnp.asarray([64])
    with pytest.raises(JaxherdError, match="4 query heads of 48 do not fit"):
        paged_attention(q[..., :48], pool, table, lengths)
    with pytest.raises(JaxherdError, match="chunked needs a size"):
        paged_attention(q, pool, table, lengths, kind="chunked")
    with pytest.raises(JaxherdError, match="did you mean 'pallas_tpu'"):
        paged_attention(q, pool, table, lengths, implementation="pallas_tp")
    pool = PagePool.empty(4, 12, 2, 64, jnp.bfloat16)
    with pytest.raises(JaxherdError, match="pages of 12 bfloat16 tokens are no multiple of 16"):
        paged_attention(q, pool, table, lengths, implementation="pallas_tpu")
    with pytest.raises(JaxherdError, match="12 tokens are no power of two from 16 on"):
        paged_attention(q, pool, table, lengths, implementation="pallas_gpu")
