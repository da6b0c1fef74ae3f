"""Counts, FLOPs, precision and remat of the vision tower; values are compared in tests/weights."""

import dataclasses
import importlib.util
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.modules import abstract, cast_floating, count_params, split
from jaxherd.layers.rope import RopeConfig, grid_angles
from jaxherd.models.vision_tower import VisionTowerConfig, shuffle_patches, unfold

_spec = importlib.util.spec_from_file_location(
    "products", pathlib.Path(__file__).with_name("products.py")
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
products = _module.products

TINY = VisionTowerConfig(
    image_size=8, patch_size=2, embed_dim=24, num_layers=2, num_heads=3, hidden_dim=40,
    output_dim=10, init_std=0.3,
)  # fmt: skip
ODD = dataclasses.replace(TINY, image_size=18, patch_size=3, shuffle=3, channels=1, num_layers=1)
KEY = jax.random.key(0)


def tiles(config, count=2):
    shape = (count, config.image_size, config.image_size, config.channels)
    return jax.random.uniform(KEY, shape, minval=-1)


@pytest.mark.parametrize("config", [TINY, ODD, VisionTowerConfig()], ids=["tiny", "odd", "llama4"])
def test_the_formula_counts_what_is_built(config):
    assert count_params(split(abstract(config.build, KEY))[1]) == config.num_params()


def test_the_published_size():
    """llama4.md 4: 871,932,416 with the projection into the text model's 5120."""
    config = VisionTowerConfig()
    assert config.num_params() + 4096 * 5120 == 871_932_416
    assert (config.grid, config.features, config.attention.head_dim) == (24, 144, 88)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_flops_are_those_of_the_program(config):
    module = jax.jit(config.build)(KEY)
    jaxpr = jax.make_jaxpr(lambda m: m(tiles(config, 3)))(module)
    assert products(jaxpr.jaxpr) == config.forward_flops(3)
    assert config.train_flops(3) == 3 * config.forward_flops(3)


def test_patches_and_blocks():
    """A patch lists colour by colour; a block lists top left, top right, bottom left, ..."""
    picture = jnp.arange(16.0).reshape(1, 4, 4, 1)
    both = jnp.concatenate([picture, picture + 100], axis=-1)
    patches = unfold(both, 2)
    assert patches.shape == (1, 4, 8)
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 6, 7, 102, 103, 106, 107])
    blocks = shuffle_patches(jnp.arange(32.0).reshape(1, 16, 2), 2)
    assert blocks.shape == (1, 4, 8)
    np.testing.assert_array_equal(blocks[0, 1], [4, 5, 6, 7, 12, 13, 14, 15])


def test_angles_of_the_released_tower():
    """llama4.md 4: w_j = 10000^(-2j/44); a patch at column 5 of row 2 turns by 6 w_j and 3 w_j."""
    cos, sin = grid_angles(RopeConfig(10000.0), 88, [6, 0], [3, 0])
    w = 10000.0 ** (-2 * np.arange(22) / 44)
    phases = np.concatenate([6 * w, 3 * w])
    np.testing.assert_allclose(cos[0], np.cos(phases), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(phases), atol=1e-6)
    np.testing.assert_array_equal(cos[1], np.ones(44))
    np.testing.assert_array_equal(sin[1], np.zeros(44))


def test_bfloat16_is_close():
    module = jax.jit(TINY.build)(KEY)
    run = jax.jit(lambda m: m(tiles(TINY)))
    exact, low = run(module), run(cast_floating(module, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: about 1e-2 after two layers and the adapter.
    assert float(jnp.abs(exact - low).max()) < 0.05 * float(jnp.abs(exact).max())


def test_remat_changes_nothing():
    module = jax.jit(TINY.build)(KEY)

    def gradient(remat):
        return jax.jit(jax.grad(lambda m: jnp.square(m(tiles(TINY), remat=remat)).mean()))(module)

    chex.assert_trees_all_close(gradient("none"), gradient("full"), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 9}, "tile of 9 pixels"),
        ({"shuffle": 3}, "blocks of 3"),
        ({"num_heads": 5}, "5 heads"),
        ({"num_heads": 4}, "multiple of 4"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
