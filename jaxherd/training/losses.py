"""Cross-entropy over a vocabulary without ever holding all logits.

Axis letters: B batch, T tokens, D width, V vocabulary, c tokens of a chunk, n chunks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A chunk's float32 logits take at most this many bytes on one device.
CHUNK_BYTES = 1 << 28


@jax.custom_vjp
def token_nll(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return (-log p(target), logsumexp of the logits), both float32.

    The gradient softmax - onehot is formed in one pass over the logits.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - _pick(logits, targets), log_z


def _pick(logits, targets):
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _nll_forward(logits, targets):
    nll, log_z = token_nll(logits, targets)
    return (nll, log_z), (logits, targets, log_z)


def _nll_backward(saved, gradients):
    logits, targets, log_z = saved
    d_nll, d_log_z = gradients
    probability = jnp.exp(logits - log_z[..., None])
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    d_logits = (d_nll + d_log_z)[..., None] * probability - jnp.where(hit, d_nll[..., None], 0)
    return d_logits.astype(logits.dtype), None


token_nll.defvjp(_nll_forward, _nll_backward)


def chunked_cross_entropy(
    unembed: Callable[[jax.Array], jax.Array],
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    shards: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return (sum of weighted loss, sum of weighted -log p, sum of weights).

    loss = -log p(target) + z_loss * logsumexp(logits)^2.

    Logits are formed for a part of the positions at a time and formed again for the gradient, so
    that [B, T, V] never exists; where one chunk is enough they are kept.

    Args:
      unembed: maps hidden states to float32 logits.
      hidden_BTD, targets_BT, weights_BT: positions of weight 0 do not count.
      vocab_size: V, to size the chunks.
      z_loss: weight of the squared log-normaliser.
      shards: devices over which [B, T] is split.
      chunk_bytes: most bytes of logits on one device.
    """
    batch, length = targets_BT.shape
    chunks = _chunks(batch * length * vocab_size * 4 / shards, length, chunk_bytes)

    def one(hidden, targets, weights):
        nll, log_z = token_nll(unembed(hidden), targets)
        total = (weights * nll).sum()
        return jnp.stack([total + z_loss * (weights * log_z**2).sum(), total, weights.sum()])

    if chunks == 1:
        return tuple(one(hidden_BTD, targets_BT, weights_BT))

    # Chunk j takes positions j, j + n, ...: every device keeps its own part of a sharded length.
    def strided(x):
        return jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *x.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total, chunk):
        return total + one(*chunk), None

    parts = (strided(hidden_BTD), strided(targets_BT), strided(weights_BT))
    return tuple(jax.lax.scan(body, jnp.zeros(3), parts)[0])


def _chunks(total_bytes: float, length: int, chunk_bytes: int) -> int:
    """Return the smallest divisor of the length that brings a chunk below its size."""
    wanted = max(1, -(-int(total_bytes) // chunk_bytes))
    for chunks in range(wanted, length + 1):
        if length % chunks == 0:
            return chunks
    return length
