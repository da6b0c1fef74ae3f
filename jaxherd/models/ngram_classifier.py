"""A small classifier of texts by their character n-grams.

    x = sum of E[n-gram] over a window / sqrt(n-grams);  logits = W2 gelu(W1 x + b1) + b2

Each class has a probability of its own, sigmoid(logit): a text may belong to several, or to none.

Axis letters: B texts, N n-grams, D width, F hidden width, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Module, abstract, count_params
from jaxherd.data.ngrams import NgramConfig
from jaxherd.layers.linear import Embedding, Linear


@dataclasses.dataclass(frozen=True)
class NgramClassifierConfig:
    """Sizes.

    Attributes:
      labels: the classes, by name.
      ngrams: how texts are read.
      width, hidden: D and F.
    """

    labels: tuple[str, ...]
    ngrams: NgramConfig = NgramConfig()
    width: int = 32
    hidden: int = 32

    def __post_init__(self):
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise JaxherdError(f"labels={self.labels} must be different names, one at least.")
        if self.width < 1 or self.hidden < 1:
            raise JaxherdError(f"width={self.width} and hidden={self.hidden} must be at least 1.")

    def build(self, key: jax.Array) -> "NgramClassifier":
        """Return a freshly initialised module."""
        return NgramClassifier(self, key=key)

    def num_params(self) -> int:
        """Return the number of trained scalars."""
        return count_params(abstract(self.build, jax.random.key(0)))

    def train_flops(self, batch: int, length: int) -> float:
        """Return the useful FLOPs of a step of `batch` texts of `length` n-grams."""
        forward = length * self.width + 2 * self.hidden * (self.width + len(self.labels))
        return 3.0 * batch * forward


class NgramClassifier(Module):
    """See the file's head."""

    def __init__(self, config: NgramClassifierConfig, *, key: jax.Array):
        self.config = config
        keys = jax.random.split(key, 3)
        self.embedding = Embedding(config.ngrams.buckets, config.width, key=keys[0], std=1.0)
        self.inner = Linear(
            config.width, config.hidden, ("embed", "mlp"), key=keys[1], bias=True, std=0.3
        )
        self.outer = Linear(
            config.hidden, len(config.labels), ("mlp", None), key=keys[2], bias=True, std=0.3
        )

    def __call__(self, ngrams_BN: Int[Array, "B N"]) -> Float[Array, "B C"]:
        """Return float32 logits of n-gram numbers; -1 is no n-gram."""
        there_BN = ngrams_BN >= 0
        rows_BND = self.embedding(jnp.maximum(ngrams_BN, 0)) * there_BN[..., None]
        # The root keeps the size of x where n-grams are many and their vectors cancel out.
        count_B1 = jnp.maximum(there_BN.sum(axis=1, keepdims=True), 1)
        x_BD = rows_BND.sum(axis=1) / jnp.sqrt(count_B1)
        return self.outer(jax.nn.gelu(self.inner(x_BD))).astype(jnp.float32)
