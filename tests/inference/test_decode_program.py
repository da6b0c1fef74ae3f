"""The program that is planned is one that decodes: run on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import split
from jaxherd.core.sharding import Partitioner
from jaxherd.inference.decode_program import decode_flops, decode_program
from jaxherd.models import presets
from jaxherd.models.quantise import recipe_of

CONFIG = presets.llama4_text(
    vocab_size=64, embed_dim=128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    num_experts=2, expert_dim=128, chunk_size=8, init_std=0.1, max_length=64,
)  # fmt: skip


def test_it_decodes(devices):
    """Three tokens of four rows, over two axes, as one device does."""
    config = recipe_of("int4_mixed").apply(CONFIG)
    partitioner = Partitioner.create(Layout("mixed", data=4, fsdp=1, tensor=2), devices)
    step, arguments = decode_program(config, partitioner, rows=4, length=16, dtype="float32")
    model = jax.jit(config.build)(jax.random.key(0))
    _, *weights = split(model)
    placed = jax.device_put(
        [*weights, jax.tree.leaves(model.init_cache(4, 16))],
        jax.tree.map(lambda a: a.sharding, [*arguments[:3]]),
    )
    assert not placed[0]["segments"]["0"]["0"]["feed_forward"][
        "up"
    ].values.sharding.is_fully_replicated
    params, buffers, cache = placed
    history = [jnp.asarray([3, 1, 60, 7], jnp.int32)]
    for position in range(3):
        cache, chosen = step(params, buffers, cache, history[-1], jnp.full(4, position, jnp.int32))
        history.append(chosen)
    wanted = jax.jit(lambda m, t: m(t).argmax(axis=-1))(model, jnp.stack(history[:-1], axis=1))
    np.testing.assert_array_equal(jnp.stack(history[1:], axis=1), wanted)


def test_flops_count_the_cache():
    weights = CONFIG.forward_flops(1, 1) - CONFIG.layers[0].attention.score_flops(1)
    # A chunk of eight is all that the layer keeps.
    assert decode_flops(CONFIG, 4, 64) == pytest.approx(4 * (weights + 4 * 8 * 4 * 8))


def test_what_does_not_divide_is_told(devices):
    partitioner = Partitioner.create(Layout("data", data=8, fsdp=1), devices)
    with pytest.raises(JaxherdError, match="'batch' of size 3 does not divide by 8"):
        decode_program(CONFIG, partitioner, rows=3, length=8, dtype="float32")
    with pytest.raises(JaxherdError, match="at least 1"):
        decode_program(CONFIG, partitioner, rows=0, length=8, dtype="float32")
