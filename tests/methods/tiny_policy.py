"""A decoder of bytes, and tasks with rewards that it can earn by chance, for tests of online RL."""

import dataclasses
import functools
import string

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.data.tokenizer_config import Bytes
from jaxherd.methods.verifiable_tasks import Problem
from jaxherd.models import presets

CONFIG = presets.llama(
    vocab_size=Bytes().vocab_size, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
    hidden_dim=24, tie_embeddings=False, init_std=0.3, max_length=64,
)  # fmt: skip


@functools.cache
def policy(seed: int = 0):
    """Return the same small decoder for every test that asks."""
    return CONFIG.build(jax.random.key(seed))


@jax.jit
def _forward(module, tokens_BT):
    return jax.nn.log_softmax(module(tokens_BT))


def log_probs(tokens, module=None):
    """Return log p [T, V] by a forward pass, all lengths in one program: what follows changes nothing."""
    row = np.zeros((1, CONFIG.max_length), np.int32)
    row[0, : len(tokens)] = tokens
    found = _forward(policy() if module is None else module, jnp.asarray(row))
    return np.asarray(found, np.float64)[0, : len(tokens)]


@dataclasses.dataclass(frozen=True)
class Letters:
    """Say lower-case letters: the reward is their share among four characters.

    Attributes:
      count: problems of each capability.
      exact: reward 1 or 0, for at least one letter.
    """

    count: int = 6
    exact: bool = False

    def problems(self, split):
        names = ("say", "tell")
        return [Problem(f"{name} {n}:", "", name) for name in names for n in range(self.count)]

    def reward(self, problem, completion):
        share = sum(c in string.ascii_lowercase for c in completion[:4]) / 4
        return float(share > 0) if self.exact else share
