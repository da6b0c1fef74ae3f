"""Pieces of prompts over pages, through the attention kernel, against attention to the whole prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.kernels import AttentionMask, attention
from jaxherd.kernels.attention import splash
from jaxherd.layers.paged_cache import CacheRule, PagedCache

PAGE, LENGTH, HEADS, KV_HEADS, SIZE = 16, 512, 4, 2, 64
RULES = {
    "causal": CacheRule("causal"),
    # Edges of chunks inside of pieces, at their ends, inside of pages and in every block.
    "chunked": CacheRule("chunked", 128),
    "small_chunks": CacheRule("chunked", 40),
    "large_chunks": CacheRule("chunked", 300),
    "window": CacheRule("sliding_window", 100),
}
# The second row is a shorter prompt and idles at the end.
LENGTHS = (LENGTH, 300)
PIECE = 128


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", RULES)
def test_pieces_see_what_the_whole_prompt_sees(name):
    rule, batch = RULES[name], len(LENGTHS)
    index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (batch, LENGTH))
    positions = jnp.asarray(np.where(index < np.array(LENGTHS)[:, None], index, -1))
    q = draw(batch, LENGTH, HEADS, SIZE)
    k, v = draw(2, batch, LENGTH, KV_HEADS, SIZE)
    whole = AttentionMask(positions, positions, kind=rule.kind, size=rule.size, self_attention=True)
    wanted = attention(q, k, v, mask=whole, implementation="reference")

    # Pages in any order, among those of other layers, and nothing in them to begin with.
    width = LENGTH // PAGE
    pool = PagedCache.empty(3, batch * width, PAGE, KV_HEADS, SIZE, jnp.float32)
    pool = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), pool)
    cache = PagedCache(pool, jnp.asarray(1), 3)
    order = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    table = jnp.asarray(order.reshape(batch, width))
    found = []
    for start in range(0, LENGTH, PIECE):
        at = slice(start, start + PIECE)
        cache = cache.write(k[:, at], v[:, at], positions[:, at], table)
        keys, values, mask = cache.rows(positions[:, at], table, rule, SIZE, jnp.float32)
        assert splash.unsupported(q[:, at], keys, mask) is None
        found.append(
            attention(q[:, at], keys, values, mask=mask, implementation="splash", interpret=True)
        )
        plain = dataclasses.replace(mask, keys_by_position=False)
        np.testing.assert_allclose(
            attention(q[:, at], keys, values, mask=plain, implementation="reference"),
            wanted[:, at],
            atol=1e-5,
        )
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, atol=1e-5)


def test_a_piece_within_its_chunk_visits_the_keys_of_its_chunk_alone():
    rule = RULES["chunked"]
    positions = jnp.arange(512, 576)[None]
    cache = PagedCache(
        PagedCache.empty(1, 40, PAGE, KV_HEADS, SIZE, jnp.float32), jnp.asarray(0), 1
    )
    table = jnp.arange(40)[None]
    keys, _, mask = cache.rows(positions, table, rule, SIZE, jnp.float32)
    seen = np.asarray(mask.k_positions_BS[0])
    assert seen[seen >= 0].tolist() == list(range(512, 576)), "pages of the chunk alone"
    given = splash.index_rule(mask, 64, keys.shape[1])
    needed, width, _ = splash.block_map(
        given.top_BT[0], given.q_ids_BT[0], given.k_ids_BS[0], given, 64, PAGE, 64, keys.shape[1]
    )
    assert np.asarray(needed).sum() == 64 // PAGE
    assert width <= (64 + 128) // PAGE + 1
