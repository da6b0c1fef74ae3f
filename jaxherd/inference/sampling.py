"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, for each row its own.

The filters compose in this order, on p = softmax(logits / temperature):

- top-k keeps the k likeliest tokens;
- top-p keeps, of those, the smallest set of likeliest tokens whose share reaches p;
- min-p keeps tokens at least `min_p` times as likely as the likeliest.

Tokens tied with the last one kept are kept as well.  What is left is sampled by adding Gumbel
noise whose key depends on the row's key and the position alone, so that a row's tokens do not
change with the rest of the batch.

Axis letters: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from jaxherd.core.errors import JaxherdError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one row chooses its tokens.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
      min_p: 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise JaxherdError(f"temperature must be finite and not negative: {self.temperature}.")
        if self.top_k < 0:
            raise JaxherdError(f"top_k must not be negative (0 keeps all): {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise JaxherdError(f"top_p must be above 0 and at most 1: {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise JaxherdError(f"min_p must be from 0 to 1: {self.min_p}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """`Sampling` of every row as arrays, and each row's key."""

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    min_p_B: Float[Array, "B"]
    key_B: Key[Array, "B"]

    @classmethod
    def create(cls, rows: list[Sampling], keys: Key[Array, "B"]) -> "RowSampling":
        """Return the record of a batch."""
        return cls(
            jnp.asarray([row.temperature for row in rows], jnp.float32),
            jnp.asarray([row.top_k for row in rows], jnp.int32),
            jnp.asarray([row.top_p for row in rows], jnp.float32),
            jnp.asarray([row.min_p for row in rows], jnp.float32),
            keys,
        )


def sample(
    logits_BV: Num[Array, "B V"], rows: RowSampling, positions_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Return one token a row.

    Args:
      logits_BV: scores of the next token.
      rows: settings and keys.
      positions_B: of the token that is chosen; makes the noise of every step its own.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn():
        keys_B = jax.vmap(jax.random.fold_in)(rows.key_B, positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        kept_BV = filtered(logits_BV, rows)
        random_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature_B > 0, random_B, greedy_B)

    # Noise and sorting cost more than the argmax: a greedy batch skips them at run time.
    return jax.lax.cond(jnp.any(rows.temperature_B > 0), drawn, lambda: greedy_B)


def filtered(logits_BV: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    """Return logits / temperature with -inf for the tokens that the filters drop."""
    scaled_BV = logits_BV / jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]

    def by_rank():
        vocabulary = logits_BV.shape[1]
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        k_B = jnp.where(rows.top_k_B > 0, jnp.minimum(rows.top_k_B, vocabulary), vocabulary)
        in_k_BV = jnp.arange(vocabulary) < k_B[:, None]
        share_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), axis=-1)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        # At top_p = 1 rounding of the sum must not cost the tail.
        wanted_BV = in_k_BV & ((before_BV < rows.top_p_B[:, None]) | (rows.top_p_B >= 1)[:, None])
        # The likeliest token always stays, also when top_p is tiny.
        count_B = jnp.maximum(wanted_BV.sum(axis=-1), 1)
        return jnp.take_along_axis(sorted_BV, count_B[:, None] - 1, axis=-1)

    ranked = jnp.any((rows.top_k_B > 0) | (rows.top_p_B < 1))
    lowest_B1 = jax.lax.cond(ranked, by_rank, lambda: jnp.full_like(scaled_BV[:, :1], -jnp.inf))
    peak_B1 = scaled_BV.max(axis=-1, keepdims=True)
    lowest_B1 = jnp.maximum(lowest_B1, peak_B1 + jnp.log(rows.min_p_B)[:, None])
    return jnp.where(scaled_BV >= lowest_B1, scaled_BV, -jnp.inf)
