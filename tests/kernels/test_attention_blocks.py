"""The blocks that attention visits are those that it needs, for every rule."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.kernels.attention import AttentionMask, blocks, pallas_gpu, splash


def by_the_mask(mask: AttentionMask, block_q: int, block_kv: int) -> np.ndarray:
    """Look at every pair."""
    dense = np.asarray(mask.dense())[0]
    rows, columns = -(-dense.shape[0] // block_q), -(-dense.shape[1] // block_kv)
    full = np.zeros((rows * block_q, columns * block_kv), bool)
    full[: dense.shape[0], : dense.shape[1]] = dense
    return full.reshape(rows, block_q, columns, block_kv).any(axis=(1, 3))


KINDS = st.sampled_from(["causal", "chunked", "sliding_window", "bidirectional", "prefix"])


@given(
    kind=KINDS, size=st.integers(1, 30), length=st.integers(1, 40), offset=st.integers(0, 20),
    block_q=st.sampled_from([1, 4, 8]), block_kv=st.sampled_from([2, 4, 16]),
    prefix=st.integers(0, 20),
)  # fmt: skip
def test_needed_blocks_of_one_document(kind, size, length, offset, block_q, block_kv, prefix):
    keys = offset + length
    mask = AttentionMask(
        jnp.arange(offset, keys)[None], jnp.arange(keys)[None],
        prefix_length_B=jnp.asarray([prefix]), kind=kind, size=size,
    )  # fmt: skip
    found = blocks.needed_blocks(
        kind, size, length, block_q, block_kv, offset=offset, prefix=prefix
    )
    np.testing.assert_array_equal(found, by_the_mask(mask, block_q, block_kv))


@given(
    kind=KINDS, size=st.integers(1, 30), cuts=st.lists(st.integers(1, 30), max_size=4),
    padding=st.integers(0, 20), block=st.sampled_from([4, 8]), prefix=st.integers(0, 9),
)  # fmt: skip
def test_visits_of_packed_rows_are_the_needed_ones(kind, size, cuts, padding, block, prefix):
    """What splash gets from the tokens' data, at run time."""
    length = 64
    edges = sorted({0, *(c for c in np.cumsum(cuts) if c < length - padding), length - padding})
    positions, segments = np.full(length, -1), np.zeros(length, int)
    for number, (start, end) in enumerate(zip(edges, edges[1:])):
        positions[start:end], segments[start:end] = np.arange(end - start), number + 1
    p, s = jnp.asarray(positions)[None], jnp.asarray(segments)[None]
    mask = AttentionMask(
        p, p, s, s, prefix_length_B=jnp.asarray([prefix]), kind=kind, size=size,
        self_attention=True,
    )  # fmt: skip
    rule = splash.index_rule(mask, length, length)
    needed, width, height = splash.block_map(
        None if rule.top_BT is None else rule.top_BT[0], rule.q_ids_BT[0], rule.k_ids_BS[0], rule,
        block, block, length, length,
    )  # fmt: skip
    wanted = by_the_mask(mask, block, block)
    np.testing.assert_array_equal(needed, wanted)
    for map_, most in ((needed, width), (needed.T, height)):
        at, works = (np.asarray(x) for x in blocks.visits(map_, most))
        visited = np.zeros(map_.shape, bool)
        for row in range(map_.shape[0]):
            visited[row, at[row][works[row]]] = True
        np.testing.assert_array_equal(visited, map_)
        assert works.sum() == wanted.sum(), "no block twice"


def test_a_chunked_layer_costs_what_its_length_does():
    """131,072 tokens in chunks of 8,192: 16 triangles of 8 x 8 blocks, by our map and by splash's."""
    block, size = 1024, 8192
    counts = {}
    for length in (32768, 65536, 131072):
        index = np.arange(length, dtype=np.int32)
        rule = splash.IndexRule(None, None, None, reach=size)
        needed, width, height = splash.block_map(
            index, index // size, index // size, rule, block, block, length, length
        )
        exact = blocks.needed_blocks("chunked", size, length, block, block)
        np.testing.assert_array_equal(needed, exact)
        counts[length] = needed.sum()
        assert (width, height) == (8, 8)
        assert counts[length] == length // size * (8 * 9 // 2)
    assert counts[131072] == 4 * counts[32768] == 576


@pytest.mark.parametrize(
    "kind, size", [("causal", None), ("sliding_window", 300), ("chunked", 256)]
)
def test_the_map_is_splashs_own(kind, size):
    """For one document jax's mask processing, which looks at every pair, names the same blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as info,
    )

    length, block = 1024, 128
    rule = {
        "causal": masks.CausalMask((length, length)),
        "sliding_window": masks.LocalMask((length, length), ((size or 1) - 1, 0), offset=0),
        "chunked": masks.ChunkedCausalMask((length, length), size or 1),
    }[kind]
    theirs, _ = info.process_mask(masks.MultiHeadMask([rule]), (block, block), shrink_grid=False)
    ours = blocks.needed_blocks(kind, size, length, block, block)
    np.testing.assert_array_equal(ours, theirs.block_mask[0] > 0)


@given(
    kind=KINDS, size=st.integers(1, 300), length=st.integers(1, 500), traced=st.booleans(),
    prefix=st.integers(0, 300),
)  # fmt: skip
@settings(max_examples=8)
def test_triton_walks_the_needed_blocks_alone(kind, size, length, traced, prefix):
    """A block's run of blocks, from both sides; of known and of traced numbers."""
    p = jnp.arange(length, dtype=jnp.int32)[None]
    mask = AttentionMask(
        p, p, prefix_length_B=jnp.asarray([prefix]) if kind == "prefix" else None, kind=kind,
        size=size if kind in ("chunked", "sliding_window") else None, self_attention=True,
        contiguous=not traced,
    )  # fmt: skip
    needed = by_the_mask(mask, 64, 64)
    rule = splash.index_rule(mask, length, length)
    for runs, wanted in zip(pallas_gpu._runs(rule, length, length), (needed, needed.T)):
        first, stop = np.asarray(runs[0]).T[..., None]
        columns = np.arange(wanted.shape[1])
        np.testing.assert_array_equal((first <= columns) & (columns < stop), wanted)


@given(length=st.integers(1, 20000))
def test_splash_blocks_are_few_and_padded_little(length):
    block = splash.block_size(length)
    number = -(-length // block)
    assert block % 128 == 0 and number <= -(-length // 1024) * 1.5 + 1
    assert number * block - length < max(256, 0.4 * length)
