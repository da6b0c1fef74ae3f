"""Prompts with images: prefill in pieces and decoding from the cache are the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.data.images import ImageTokens, image_tokens
from jaxherd.inference import images as images_of_requests
from jaxherd.inference import steps
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.paged_engine import PagedEngine
from jaxherd.models import presets
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig, text_part
from jaxherd.models.vision_tower import VisionTowerConfig

MARKS = ImageTokens(30, 31, 32, 33, 34, 35)
CONFIG = MultimodalDecoderConfig.create(
    presets.llama4_text(
        vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        moe_layers=(1,), num_experts=3, expert_dim=8, dense_dim=12, chunk_size=6, nope_interval=2,
        init_std=0.3, max_length=64,
    ),
    VisionTowerConfig(
        image_size=8, patch_size=2, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16,
        output_dim=8, init_std=0.3,
    ),
    patch_token=MARKS.patch,
)  # fmt: skip


@pytest.fixture(scope="module")
def module():
    return jax.jit(CONFIG.build)(jax.random.key(0))


def tiles_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)


def text(length: int, seed: int) -> list[int]:
    return np.random.RandomState(seed).randint(0, 30, length).tolist()


# One image of one tile, text alone, an image of two tiles and their whole with another of one.
PROMPTS = [
    ([*text(3, 1), *image_tokens(1, 1, 4, MARKS), *text(2, 2)], tiles_of(1, 1)),
    (text(5, 3), None),
    ([*image_tokens(2, 1, 4, MARKS), *text(1, 4), *image_tokens(1, 1, 4, MARKS), *text(2, 5)],
     tiles_of(4, 2)),
]  # fmt: skip

full = jax.jit(lambda m, t, x: m(t, images=x))


def slow_greedy(module, tokens, tiles, count) -> list[int]:
    """Without any cache: the whole sequence again for every token."""
    tokens = list(tokens)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (60 - len(tokens))], jnp.int32)
        given = None if tiles is None else jnp.asarray(tiles)
        tokens.append(int(full(module, padded, given)[0, len(tokens) - 1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("chunk", [64, 7])
def test_a_ragged_batch_with_images_equals_the_full_forward(module, chunk):
    """Also where pieces of the prompt end inside an image."""
    generator = Generator(module, prefill_chunk=chunk, decode_steps=4)
    requests = [Request(tuple(tokens), 10, images=tiles) for tokens, tiles in PROMPTS]
    found = [result.tokens for result in generator.run(requests)]
    assert found == [slow_greedy(module, tokens, tiles, 10) for tokens, tiles in PROMPTS]
    # What is seen decides what is said.
    other = dataclasses.replace(requests[2], images=tiles_of(4, 9))
    assert generator.run([other])[0].tokens != found[2]


def test_the_function(module):
    (one, tiles), (plain, _), _ = PROMPTS
    found = jaxherd.generate(module, one, max_new_tokens=6, images=tiles)
    assert found == slow_greedy(module, one, tiles, 6)
    assert found == jaxherd.generate(module, one, max_new_tokens=6, images=jnp.asarray(tiles))
    several = jaxherd.generate(module, [one, plain], max_new_tokens=6, images=[tiles, None])
    assert several == [found, slow_greedy(module, plain, None, 6)]


def test_tiles_are_encoded_by_powers_of_two(module, monkeypatch):
    seen, encode = [], images_of_requests._encode

    def spy(module, tiles):
        seen.append(len(tiles))
        return encode(module, tiles)

    monkeypatch.setattr(images_of_requests, "_encode", spy)
    for count, sizes in ((1, [1]), (3, [4]), (8, [8]), (9, [8, 8]), (17, [8, 8, 8])):
        tokens = (MARKS.patch,) * (4 * count)
        request = Request(tokens, 1, images=tiles_of(count))
        encoded = images_of_requests.PromptImages.encode(module, [request])
        assert seen == sizes
        seen.clear()
        features = encoded.piece(0, len(tokens), len(tokens)).over(jnp.zeros((1, 4 * count, 16)))
        wanted = module.project(jnp.asarray(request.images)).reshape(1, -1, 16)
        np.testing.assert_allclose(features, wanted, atol=1e-5)
    assert images_of_requests.PromptImages.encode(module, [Request((1,), 1)]) is None
    assert not seen


@pytest.mark.parametrize(
    "tokens, images, message",
    [
        (PROMPTS[0][0], None, "4 image placeholders .token 35. and there are no images"),
        (PROMPTS[1][0], tiles_of(1), "0 image placeholders and the 1 tiles fill 4"),
        (PROMPTS[2][0], tiles_of(3), "16 image placeholders and the 3 tiles fill 12"),
        (PROMPTS[0][0], tiles_of(1)[0], r"not float32 \[8, 8, 3\]"),
        (PROMPTS[0][0], tiles_of(1)[None], r"not float32 \[1, 1, 8, 8, 3\]"),
        (PROMPTS[0][0], tiles_of(1).astype(np.int32), "not int32"),
        (PROMPTS[0][0], "cat.png", "not str"),
        ([PROMPTS[0][0]], tiles_of(1), "a list of 1"),
        ([PROMPTS[0][0]], [], "a list of 1"),
    ],
)
def test_errors_come_before_any_compile(module, tokens, images, message):
    before = dict(steps.traces)
    with pytest.raises(JaxherdError, match=message):
        jaxherd.generate(module, tokens, max_new_tokens=2, images=images)
    assert steps.traces == before


def test_a_model_without_a_tower_refuses_images(module):
    with pytest.raises(JaxherdError, match="does not read images"):
        jaxherd.generate(text_part(module), PROMPTS[0][0], max_new_tokens=2, images=tiles_of(1))


def test_continuous_batching_refuses_images_and_serves_text(module):
    engine = PagedEngine(module, slots=2, prepare=False, page_size=4, cache_tokens=64)
    with pytest.raises(JaxherdError, match="text alone"):
        engine.add(Request(tuple(PROMPTS[0][0]), 3, images=PROMPTS[0][1]))
    with pytest.raises(JaxherdError, match="there are no images"):
        engine.add(Request(tuple(PROMPTS[0][0]), 3))
    (result,) = engine.run([Request(tuple(PROMPTS[1][0]), 3)])
    assert result.tokens == slow_greedy(module, PROMPTS[1][0], None, 3)
