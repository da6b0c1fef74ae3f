"""A decoder of two layers and batches for it, for the tests of objectives on tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.models import presets

VOCABULARY, ROWS, LENGTH = 37, 4, 12


@functools.cache
def decoder(seed: int = 0):
    """Return the same small decoder for every test that asks."""
    config = presets.llama(
        vocab_size=VOCABULARY, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
        hidden_dim=24, tie_embeddings=False, init_std=0.3,
    )  # fmt: skip
    return config.build(jax.random.key(seed))


def batch(seed: int = 0) -> dict[str, jax.Array]:
    """Return rows whose answers start and end in different places."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    place = np.arange(LENGTH)
    begin, end = chance.integers(1, 5, (ROWS, 1)), chance.integers(7, LENGTH, (ROWS, 1))
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH)),
        "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32),
        "loss_weights": jnp.asarray((place >= begin) & (place < end), jnp.float32),
    }


def log_probs(model, given) -> np.ndarray:
    """Return log p of every target from whole logits."""
    logits = model(given["tokens"], positions=given["positions"])
    scores = jax.nn.log_softmax(logits, axis=-1)
    return np.asarray(jnp.take_along_axis(scores, given["targets"][..., None], -1)[..., 0])
