"""Log-probabilities in chunks and over devices against those of whole logits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.modules import split
from jaxherd.core.sharding import Partitioner
from jaxherd.methods.token_scores import token_log_probs
from tests.methods.tiny_decoder import VOCABULARY, batch, decoder, log_probs


def gradients(given, chunk_bytes, temperature=1.0):
    definition, params, buffers = split(decoder())

    def loss(params):
        model = definition.merge(params, buffers)
        scores = token_log_probs(model, given, chunk_bytes=chunk_bytes, temperature=temperature)
        return (scores * given["loss_weights"]).sum(), scores

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_chunks_change_nothing(chunks):
    given = batch()
    whole, scores = gradients(given, 1 << 30)
    size = -(-given["tokens"].size * 4 * VOCABULARY // chunks)
    found, chunked = gradients(given, size)
    np.testing.assert_allclose(scores, log_probs(decoder(), given), atol=1e-5)
    np.testing.assert_allclose(chunked, scores, atol=1e-5)
    chex.assert_trees_all_close(found, whole, atol=1e-4)


def test_temperature_divides_the_logits():
    given = batch()
    _, scores = gradients(given, 1 << 30, temperature=2.0)
    logits = decoder()(given["tokens"], positions=given["positions"]) / 2.0
    wanted = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), given["targets"][..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


@pytest.mark.parametrize("layout", [Layout("fsdp", fsdp=4), Layout("both", fsdp=2, sequence=2)])
def test_devices_change_nothing(layout):
    given = batch()
    whole, scores = gradients(given, 1 << 30)
    partitioner = Partitioner.create(layout, jax.devices()[:4])
    with partitioner.activate():
        found, sharded = gradients(given, 4 * 4 * VOCABULARY)
    np.testing.assert_allclose(sharded, scores, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(whole), atol=1e-4)
