"""Cross-entropy over a vocabulary without ever holding all logits.

Axis letters: B batch, T tokens, D width, V vocabulary, n chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxherd.core import sharding

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
    score: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return (sum of weighted loss, sum of weighted -log p, sum of weights).

    loss = -log p(target) + z_loss * logsumexp(logits)^2.

    Logits are formed for a part of the positions at a time and formed again for the gradient, so
    that [B, T, V] never exists; where one chunk is enough they are kept.  On a mesh every device
    goes through its own positions with the head gathered once, and its gradient is summed in
    float32 over the chunks before it crosses the links once.

    Args:
      score: maps (head, hidden states) to float32 logits.
      head: the arrays of the output projection, any pytree.
      hidden_BTD, targets_BT, weights_BT: positions of weight 0 do not count.
      vocab_size: V, to size the chunks.
      z_loss: weight of the squared log-normaliser.
      chunk_bytes: most bytes of logits on one device.
    """

    def local(head, hidden, targets, weights):
        return _chunked(score, z_loss, vocab_size, chunk_bytes, head, hidden, targets, weights)

    partitioner = sharding.active()
    split = partitioner is not None and partitioner.mesh.size > 1
    if not split or partitioner.mesh_axes("act_vocab"):
        # One device, or a vocabulary that is itself split, which XLA's partitioner handles.
        return tuple(local(head, hidden_BTD, targets_BT, weights_BT))
    rows = partitioner.spec(("batch", "length"))
    axes = partitioner.mesh_axes("batch") + partitioner.mesh_axes("length")

    def on_device(head, hidden, targets, weights):
        return jax.lax.psum(local(head, hidden, targets, weights), axes)

    whole = jax.sharding.PartitionSpec()
    sums = jax.shard_map(
        on_device,
        mesh=partitioner.mesh,
        in_specs=(whole, partitioner.spec(("batch", "length", None)), rows, rows),
        out_specs=whole,
        check_vma=False,
    )(head, hidden_BTD, targets_BT, weights_BT)
    return tuple(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(score, z_loss, vocab_size, chunk_bytes, head, hidden, targets, weights):
    """Return [loss, -log p, weight] summed over all positions given."""
    parts = _strided(vocab_size, chunk_bytes, hidden, targets, weights)

    def body(total, chunk):
        return total + _sums(score, z_loss, head, *chunk), None

    return jax.lax.scan(body, jnp.zeros(3), parts)[0]


def _sums(score, z_loss, head, hidden, targets, weights):
    nll, log_z = token_nll(score(head, hidden), targets)
    total = (weights * nll).sum()
    return jnp.stack([total + z_loss * (weights * log_z**2).sum(), total, weights.sum()])


def _strided(vocab_size, chunk_bytes, *arrays):
    """Cut [B, T, ...] to [n, B, T / n, ...]; chunk j holds positions j, j + n, ..."""
    batch, length = arrays[0].shape[:2]
    chunks = _chunks(batch * length * vocab_size * 4, length, chunk_bytes)
    return tuple(
        jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *x.shape[2:]), 2, 0) for x in arrays
    )


def _chunked_forward(score, z_loss, vocab_size, chunk_bytes, head, hidden, targets, weights):
    batch, length = targets.shape
    if _chunks(batch * length * vocab_size * 4, length, chunk_bytes) == 1:
        # Everything fits: keep what the gradient needs instead of forming logits again.
        sums, pull = jax.vjp(
            lambda o, h: _sums(score, z_loss, o, h, targets, weights), head, hidden
        )
        return sums, pull
    sums = _chunked(score, z_loss, vocab_size, chunk_bytes, head, hidden, targets, weights)
    return sums, (head, hidden, targets, weights)


def _chunked_backward(score, z_loss, vocab_size, chunk_bytes, saved, d_sums):
    if callable(saved):
        return (*saved(d_sums), None, None)
    head, hidden, targets, weights = saved
    parts = _strided(vocab_size, chunk_bytes, hidden, targets, weights)

    def body(total, chunk):
        part, *rest = chunk
        _, pull = jax.vjp(lambda o, h: _sums(score, z_loss, o, h, *rest), head, part)
        d_head, d_part = pull(d_sums)
        return jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, d_head), d_part

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    total, d_parts = jax.lax.scan(body, start, parts)
    d_head = jax.tree.map(lambda t, x: t.astype(x.dtype), total, head)
    return d_head, jnp.moveaxis(d_parts, 0, 2).reshape(hidden.shape), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunks(total_bytes: float, length: int, chunk_bytes: int) -> int:
    """Return the smallest divisor of the length that brings a chunk below its size."""
    wanted = max(1, -(-int(total_bytes) // chunk_bytes))
    for chunks in range(wanted, length + 1):
        if length % chunks == 0:
            return chunks
    return length
