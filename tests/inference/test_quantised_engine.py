"""The engine serves what the generator writes with the same weights in few bits."""

import jax
import numpy as np

from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.paged_engine import PagedEngine
from jaxherd.models import presets
from jaxherd.models.quantise import quantise


def scout():
    return presets.llama4_text(
        vocab_size=300, embed_dim=128, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        num_experts=2, expert_dim=128, chunk_size=12, init_std=0.1,
        max_length=64,
    )  # fmt: skip


def test_streams_equal_the_offline_text():
    """In the form that serves on CPU, where layers lie apart."""
    module = quantise(jax.jit(scout().build)(jax.random.key(0)), "int4_mixed")
    rng = np.random.RandomState(0)
    requests = [
        Request(tuple(rng.randint(0, 256, length).tolist()), count)
        for length, count in ((3, 6), (15, 9), (7, 2), (1, 7))
    ]
    wanted = Generator(module, prefill_chunk=16, decode_steps=4, prepare=True).run(requests)
    engine = PagedEngine(
        module, slots=2, page_size=8, prefill_chunk=16, prefill_rows=1, decode_steps=3,
        cache_tokens=64, prepare=True,
    )  # fmt: skip
    found = engine.run(requests)
    assert [r.tokens for r in found] == [r.tokens for r in wanted]
    assert engine.module.config.weight_formats()
