"""Fusion: which tokens take features, what is refused, what text alone costs, shardings."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, count_params, split
from jaxherd.core.sharding import Partitioner
from jaxherd.models import presets
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig, text_part
from jaxherd.models.vision_tower import VisionTowerConfig

_spec = importlib.util.spec_from_file_location(
    "products", pathlib.Path(__file__).with_name("products.py")
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
products = _module.products

PATCH, KEY = 39, jax.random.key(0)
TINY = MultimodalDecoderConfig.create(
    presets.llama4_text(
        vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
        moe_layers=(), dense_dim=24, chunk_size=8, nope_interval=2, init_std=0.3,
    ),
    VisionTowerConfig(
        image_size=8, patch_size=2, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16,
        output_dim=8, init_std=0.3,
    ),
    patch_token=PATCH,
)  # fmt: skip


@pytest.fixture(scope="module")
def module():
    return jax.jit(TINY.build)(KEY)


def tokens_with(*counts: int, length: int = 12):
    """Rows with so many placeholders from the second token on."""
    rows = np.random.RandomState(0).randint(0, PATCH, (len(counts), length))
    for row, count in zip(rows, counts):
        row[1 : 1 + count] = PATCH
    return jnp.asarray(rows, jnp.int32)


def tiles_of(*shape: int):
    return jax.random.uniform(jax.random.key(1), (*shape, 8, 8, 3), minval=-1)


run = jax.jit(lambda m, t, x: m(t, images=x))


def test_the_formula_counts_what_is_built():
    built = split(abstract(TINY.build, KEY))[1]
    assert count_params(built) == TINY.num_params()
    assert TINY.text().num_params() + count_params(built["vision"]) + 8 * 16 == TINY.num_params()


def test_the_text_part_is_drawn_as_without_a_tower(module):
    alone = jax.jit(TINY.text().build)(KEY)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(text_part(module)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_take_the_places_of_placeholders_in_order(module):
    """Also across rows; other tokens keep their own embeddings."""
    tokens, tiles = tokens_with(8, 4), tiles_of(3)
    placed = jax.jit(lambda m, t, x: m.placed(t, x).over(m.embedding(t)))(module, tokens, tiles)
    features = module.project(tiles).reshape(12, 16)
    is_patch = np.asarray(tokens) == PATCH
    np.testing.assert_allclose(placed[is_patch], features, atol=1e-6)
    np.testing.assert_array_equal(placed[~is_patch], module.embedding(tokens)[~is_patch])


def test_rows_of_their_own_are_the_same(module):
    """[B, N, ...] with padding behind a row's tiles is [N, ...] in the order of the batch."""
    tokens, tiles = tokens_with(8, 4), tiles_of(3)
    own = jnp.stack([tiles[:2], jnp.stack([tiles[2], jnp.zeros_like(tiles[2])])])
    np.testing.assert_allclose(run(module, tokens, own), run(module, tokens, tiles), atol=1e-5)


def test_text_alone_does_not_touch_the_tower(module):
    tokens = tokens_with(0, 0)
    np.testing.assert_array_equal(module(tokens), text_part(module)(tokens))
    jaxpr = jax.make_jaxpr(lambda m: m(tokens))(module)
    alone = jax.make_jaxpr(lambda m: m(tokens))(text_part(module))
    assert products(jaxpr.jaxpr) == products(alone.jaxpr)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(module)]
    used = {id(v) for equation in jaxpr.jaxpr.eqns for v in equation.invars}
    touched = {path for path, v in zip(paths, jaxpr.jaxpr.invars) if id(v) in used}
    assert touched and not any("vision" in path or "projection" in path for path in touched)
    # A compiled program does not even receive what it does not use.
    arguments = jax.jit(lambda m: m(tokens)).lower(module).compile().input_shardings[0]
    assert len(jax.tree.leaves(arguments)) < len(paths)


def test_flops_of_tiles_are_those_of_the_program(module):
    tokens, tiles = tokens_with(8, 4), tiles_of(3)
    seeing = jax.make_jaxpr(lambda m: m(tokens, images=tiles))(module)
    blind = jax.make_jaxpr(lambda m: m(tokens))(module)
    of_tiles = TINY.forward_flops(2, 12, tiles=3) - TINY.forward_flops(2, 12)
    assert products(seeing.jaxpr) - products(blind.jaxpr) == of_tiles
    assert of_tiles == TINY.vision.forward_flops(3) + 2 * 12 * 8 * 16
    assert TINY.forward_flops(2, 12) == TINY.text().forward_flops(2, 12)
    assert TINY.train_flops(2, 12, 3) == 3 * TINY.forward_flops(2, 12, 3)


@pytest.mark.parametrize(
    "counts, shape, message",
    [
        ((8, 4), (2,), "12 image placeholders and the 2 tiles fill 8, 4 each"),
        ((7, 4), (3,), "11 image placeholders and the 3 tiles fill 12"),
        ((0, 0), (1,), "0 image placeholders"),
        ((8, 3), (2, 2), "row 1 holds 3"),
        ((12, 4), (2, 2), "row 0 holds 12"),
        ((8, 4), (3, 2), "2 rows of tokens and 3 of tiles"),
    ],
)
def test_counts_that_do_not_match_are_one_error(module, counts, shape, message):
    with pytest.raises(JaxherdError, match=message) as error:
        module(tokens_with(*counts, length=14), images=tiles_of(*shape))
    assert str(error.value).count(".") <= 3 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 8, 8, 3), np.uint8),
        np.zeros((3, 3, 8, 8), np.float32),
        np.zeros((3, 6, 6, 3), np.float32),
        np.zeros((8, 8, 3), np.float32),
    ],
    ids=["bytes", "colours first", "size", "one tile"],
)
def test_tiles_of_another_form_are_refused(images):
    with pytest.raises(JaxherdError, match=r"images must be tiles \[N, 8, 8, 3\] of floats"):
        TINY.check_images(tokens_with(8, 4), images)


def test_inside_a_program_a_wrong_count_is_no_number(module):
    """It cannot be raised there, and must not pass for an answer."""
    for tokens, tiles in (
        (tokens_with(8, 4), tiles_of(2)),
        (tokens_with(4, 4), tiles_of(3)),
        (tokens_with(12, 4, length=14), tiles_of(2, 2)),
    ):
        logits = run(module, tokens, tiles)
        assert np.isnan(logits[0]).any()


@pytest.mark.parametrize(
    "layout", [Layout("fsdp", fsdp=8), Layout("tensor", fsdp=4, tensor=2),
               Layout("sequence", fsdp=2, sequence=4)], ids=lambda x: x.name
)  # fmt: skip
def test_a_sharded_gradient_is_the_same(module, devices, layout):
    """The 17 tokens of a tile are split by no layout, not even one that splits text."""
    counts = [8, 4, 0, 4, 8, 8, 0, 4]
    tokens, tiles = tokens_with(*counts), tiles_of(8, 2)
    definition, params, buffers = split(module)

    def loss(params):
        logits = definition.merge(params, buffers)(tokens, images=tiles)
        return jnp.square(logits).mean()

    wanted = jax.jit(jax.grad(loss))(params)
    partitioner = Partitioner.create(layout, devices)
    with partitioner.activate():
        placed = jax.device_put(params, partitioner.tree_shardings(definition.axes()[0], params))
        found = jax.jit(jax.grad(loss))(placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    kernel = params["vision"]["layers"]["up"]["kernel"]
    assert placed["vision"]["layers"]["up"]["kernel"].addressable_shards[0].data.size < kernel.size


def test_replacing_fields_keeps_the_class():
    assert type(dataclasses.replace(TINY, scan_layers=False)) is MultimodalDecoderConfig
