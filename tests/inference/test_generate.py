import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference import steps
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.sampling import Sampling
from jaxherd.inference.serving_form import serving_form
from jaxherd.layers.attention import AttentionConfig
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.models import presets
from jaxherd.models.decoder import DecoderConfig, LayerConfig

VOCAB = 300  # holds the byte tokenizer's ids


def hybrid() -> DecoderConfig:
    """Full, chunked and sliding layers, all shorter than the sequences of the tests."""
    full = AttentionConfig(2, 1, 8)
    chunked = dataclasses.replace(full, kind="chunked", size=7, qk_norm="unit_after_rope")
    sliding = dataclasses.replace(full, kind="sliding_window", size=5)
    feed_forward = FeedForwardConfig(16)
    layers = tuple(LayerConfig(a, feed_forward) for a in (full, chunked, sliding))
    return DecoderConfig(VOCAB, 16, layers, tie_embeddings=True, max_length=128, init_std=0.3)


@pytest.fixture(scope="module")
def module():
    return hybrid().build(jax.random.key(0))


@pytest.fixture(scope="module")
def generator(module):
    return Generator(module, prefill_chunk=16, decode_steps=4)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.RandomState(seed).randint(0, 256, length).tolist())


full = jax.jit(lambda m, t: m(t))


def slow_greedy(module, tokens, count) -> list[int]:
    """Without any cache: the whole sequence again for every token."""
    tokens = list(tokens)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (60 - len(tokens))], jnp.int32)
        tokens.append(int(full(module, padded)[0, len(tokens) - 1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("length", [1, 6, 16, 37])
def test_greedy_equals_the_full_forward_pass(module, generator, length):
    """Prompts of one and of several pieces, over the edges of chunks and windows."""
    tokens = prompt(length, seed=length)
    assert generator.run([Request(tokens, 20)])[0].tokens == slow_greedy(module, tokens, 20)


def test_a_ragged_batch_equals_one_by_one(generator):
    requests = [
        Request(prompt(n, seed=n), count, Sampling(t, top_p=p), seed=n)
        for n, count, t, p in [
            (3, 9, 0.0, 1.0), (37, 14, 0.0, 1.0), (16, 11, 0.9, 0.8), (1, 5, 2.0, 1.0)
        ]
    ]  # fmt: skip
    together = [r.tokens for r in generator.run(requests)]
    alone = [generator.run([request])[0].tokens for request in requests]
    assert together == alone
    assert [len(tokens) for tokens in together] == [9, 14, 11, 5]


@pytest.mark.parametrize("chunk", [5, 64])
def test_pieces_of_the_prompt_do_not_matter(module, generator, chunk):
    other = Generator(module, prefill_chunk=chunk, decode_steps=4)
    request = Request(prompt(37), 12)
    assert other.run([request]) == generator.run([request])


def test_routed_llama4_layers_decode_like_the_full_forward():
    config = presets.llama4_text(
        vocab_size=VOCAB, embed_dim=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
        num_experts=3, top_k=2, expert_dim=8, dense_dim=12, moe_step=2, chunk_size=6,
        init_std=0.3, max_length=64,
    )  # fmt: skip
    module = config.build(jax.random.key(1))
    generator = Generator(module, prefill_chunk=8, decode_steps=4)
    tokens = prompt(11)
    assert generator.run([Request(tokens, 13)])[0].tokens == slow_greedy(module, tokens, 13)


def test_each_program_is_compiled_once_a_shape(module):
    # A cache size of its own, so that nothing is compiled for it yet.
    generator = Generator(module, prefill_chunk=32, decode_steps=3, max_length=120)
    three = tuple(Request(prompt(2), 2) for _ in range(3))
    before = dict(steps.traces)
    for length in (3, 9, 16, 11, 2):
        generator.run([Request(prompt(length), 7), *three])
    counts = {name: steps.traces[name] - before[name] for name in before}
    assert counts == {"prefill": 1, "start": 1, "decode": 1}
    generator.run([Request(prompt(40), 7), *three])
    counts = {name: steps.traces[name] - before[name] for name in before}
    # A first piece of 32 and a later one of 16.
    assert counts == {"prefill": 3, "start": 1, "decode": 1}


def test_stop_tokens_end_a_row(module, generator):
    request = Request(prompt(6), 20)
    tokens = generator.run([request])[0].tokens
    stop = tokens[7]
    stopping = Generator(module, stop_ids=[stop], prefill_chunk=16, decode_steps=4)
    result = stopping.run([request])[0]
    assert result.tokens == tokens[: tokens.index(stop) + 1]
    assert result.reason == "stop"


class Letters(ByteTokenizer):
    """Every token is two letters, so that a stop string may end inside one."""

    def id_bytes(self, token_id):
        return bytes([97 + token_id % 26, 97 + token_id // 26])


def test_stop_strings_over_token_borders(module):
    tokenizer = Letters()
    generator = Generator(module, tokenizer, stop_ids=(), prefill_chunk=16, decode_steps=4)
    request = Request(prompt(6), 20)
    whole = generator.run([request])[0]
    text = "".join(tokenizer.id_bytes(t).decode() for t in whole.tokens)
    assert whole.text == text and whole.reason == "length"
    stop = text[13:18]  # from inside one token to inside another
    cut = text[: text.find(stop)]
    result = generator.run([dataclasses.replace(request, stop_strings=("QQ", stop))])[0]
    assert (result.text, result.reason) == (cut, "stop")
    assert len(result.tokens) < 20
    pieces = list(generator.stream(dataclasses.replace(request, stop_strings=(stop,))))
    assert "".join(pieces) == cut and len(pieces) > 1


def test_streaming_gives_the_text_of_the_result(module):
    generator = Generator(module, ByteTokenizer(), stop_ids=(), prefill_chunk=16, decode_steps=4)
    request = Request(prompt(6), 15, Sampling(1.0), seed=3)
    assert "".join(generator.stream(request)) == generator.run([request])[0].text


def test_seeds(generator):
    request = Request(prompt(6), 12, Sampling(1.5), seed=1)
    same = generator.run([request])[0].tokens
    assert generator.run([request])[0].tokens == same
    assert generator.run([dataclasses.replace(request, seed=2)])[0].tokens != same
    assert generator.run([request], key=jax.random.key(7))[0].tokens != same


def test_the_function(module):
    one = jaxherd.generate(module, list(prompt(6)), max_new_tokens=8)
    assert one == slow_greedy(module, prompt(6), 8)
    several = jaxherd.generate(module, [list(prompt(6)), list(prompt(9))], max_new_tokens=8)
    assert several[0] == one and len(several) == 2
    assert jaxherd.generate(module, np.asarray(prompt(6)), max_new_tokens=8) == one
    assert jaxherd.generate(module, jnp.asarray([prompt(6)]), max_new_tokens=8) == [one]
    options = dict(max_new_tokens=8, temperature=1.3, top_p=0.9)
    a = jaxherd.generate(module, list(prompt(6)), key=jax.random.key(1), **options)
    b = jaxherd.generate(module, list(prompt(6)), key=jax.random.key(2), **options)
    assert a != b
    assert a == jaxherd.generate(module, list(prompt(6)), key=jax.random.key(1), **options)


@pytest.mark.parametrize(
    "tokens, count, message",
    [
        ([], 3, "empty"),
        ([[1], []], 3, "empty"),
        ([1, 2], 0, "max_new_tokens"),
        ([1, VOCAB], 3, "outside the vocabulary"),
        ([1, -1], 3, "outside the vocabulary"),
        ([1] * 120, 20, "120 tokens and 20 new ones.*128"),
        (["a"], 3, "list of ints"),
        ([1.5], 3, "list of ints"),
        (np.ones((2, 3)), 3, "integers"),
    ],
)
def test_errors_come_before_any_compile(module, tokens, count, message):
    before = dict(steps.traces)
    with pytest.raises(JaxherdError, match=message):
        jaxherd.generate(module, tokens, max_new_tokens=count)
    assert steps.traces == before


def test_serving_form_is_the_same_function(module):
    tokens = jnp.asarray([prompt(20)], jnp.int32)
    prepared = serving_form(module)
    np.testing.assert_allclose(prepared(tokens), module(tokens), atol=1e-5)
    assert not prepared.config.scan_layers and not prepared.config.tie_embeddings
    half = serving_form(jax.tree.map(lambda x: x.astype(jnp.bfloat16), module))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}
