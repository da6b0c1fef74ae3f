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
from jaxherd.training.positions import CHUNK_BYTES, WHOLE, Parts, chunk_count, strided

# Finite, so that nothing becomes NaN; its exponential is zero.
_NEVER = -1e30


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
    head_axes: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return (sum of weighted loss, sum of weighted -log p, sum of weights).

    loss = -log p(target) + z_loss * logsumexp(logits)^2.

    Logits are formed for a part of the positions at a time and formed again for the gradient, so
    that [B, T, V] never exists; where one chunk is enough they are kept.  On a mesh every device
    goes through its own positions with the head gathered once; its gradient is summed in float32
    over the chunks and then scattered once in the head's dtype, each device receiving its own part.

    Args:
      score: maps (head, hidden states) to float32 logits.
      head: the arrays of the output projection, any pytree.
      hidden_BTD, targets_BT, weights_BT: positions of weight 0 do not count.
      vocab_size: V, to size the chunks.
      z_loss: weight of the squared log-normaliser.
      chunk_bytes: most bytes of logits on one device.
      head_axes: logical axes of the head's arrays, a tree of tuples; None takes them as whole on
        every device.
    """

    def local(head, hidden, targets, weights, parts=WHOLE):
        return _chunked(
            score, z_loss, vocab_size, chunk_bytes, parts, head, hidden, targets, weights
        )

    partitioner = sharding.active()
    alone = partitioner is None or partitioner.mesh.size == 1
    if partitioner is None or alone or partitioner.mesh_axes("act_vocab"):
        # One device, or a vocabulary that is itself split, which XLA's partitioner handles: there
        # the arrays are global and each device holds its share of a chunk.
        if partitioner is not None:
            axes = ("batch", "length", "act_vocab")
            chunk_bytes *= partitioner.axis_size(
                *(m for a in axes for m in partitioner.mesh_axes(a))
            )
        return tuple(local(head, hidden_BTD, targets_BT, weights_BT))
    rows = partitioner.spec(("batch", "length"))
    axes = partitioner.mesh_axes("batch") + partitioner.mesh_axes("length")

    whole = jax.sharding.PartitionSpec()
    leaves, tree = jax.tree.flatten(head)
    specs = [whole] * len(leaves)
    if head_axes is not None:
        specs = [partitioner.spec(names) for names in tree.flatten_up_to(head_axes)]
    parts = Parts.of(head, specs)

    def on_device(head, hidden, targets, weights):
        return jax.lax.psum(local(head, hidden, targets, weights, parts), axes)

    sums = jax.shard_map(
        on_device,
        mesh=partitioner.mesh,
        in_specs=(tree.unflatten(specs), partitioner.spec(("batch", "length", None)), rows, rows),
        out_specs=whole,
        check_vma=False,
    )(head, hidden_BTD, targets_BT, weights_BT)
    return tuple(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _chunked(score, z_loss, vocab_size, chunk_bytes, parts, head, hidden, targets, weights):
    """Return [loss, -log p, weight] summed over all positions given."""
    chunks = strided(vocab_size * 4, chunk_bytes, hidden, targets, weights)
    head = parts.gather(head)

    def body(total, chunk):
        return total + _sums(score, z_loss, vocab_size, head, *chunk), None

    return jax.lax.scan(body, jnp.zeros(3), chunks)[0]


def _sums(score, z_loss, vocab_size, head, hidden, targets, weights):
    logits = score(head, hidden)
    if logits.shape[-1] > vocab_size:  # columns that only fill up lanes
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(column < vocab_size, logits, _NEVER)
    nll, log_z = token_nll(logits, targets)
    total = (weights * nll).sum()
    return jnp.stack([total + z_loss * (weights * log_z**2).sum(), total, weights.sum()])


def _chunked_forward(score, z_loss, vocab_size, chunk_bytes, parts, head, hidden, targets, weights):
    batch, length = targets.shape
    head = parts.gather(head)
    if chunk_count(batch * length * vocab_size * 4, length, chunk_bytes) == 1:
        # Everything fits: keep what the gradient needs instead of forming logits again.
        sums, pull = jax.vjp(
            lambda o, h: _sums(score, z_loss, vocab_size, o, h, targets, weights), head, hidden
        )
        return sums, pull
    sums = _chunked(score, z_loss, vocab_size, chunk_bytes, WHOLE, head, hidden, targets, weights)
    return sums, (head, hidden, targets, weights)


def _chunked_backward(score, z_loss, vocab_size, chunk_bytes, parts, saved, d_sums):
    if callable(saved):
        d_head, d_hidden = saved(d_sums)
        return parts.scatter(d_head), d_hidden, None, None
    head, hidden, targets, weights = saved
    chunks = strided(vocab_size * 4, chunk_bytes, hidden, targets, weights)

    def body(total, chunk):
        part, *rest = chunk
        _, pull = jax.vjp(lambda o, h: _sums(score, z_loss, vocab_size, o, h, *rest), head, part)
        d_head, d_part = pull(d_sums)
        return jax.tree.map(lambda t, d: t + d.astype(jnp.float32), total, d_head), d_part

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    total, d_parts = jax.lax.scan(body, start, chunks)
    # As all other gradients it travels in the dtype that the step computes in.
    d_head = parts.scatter(jax.tree.map(lambda t, x: t.astype(x.dtype), total, head))
    d_hidden = jnp.moveaxis(d_parts, 0, 2).reshape(hidden.shape)
    return d_head, _after(d_head, d_hidden), None, None


def _after(d_head, d_hidden):
    """Return the gradient of the hidden states, which goes on when that of the head is shared out.

    Else the compiler may leave the latter for the end of the step, and the whole head in float32 lies
    in memory beside all that layers keep.  It orders what depends on each other, and so this does:
    where the head's gradient is no number, neither is this.
    """
    one = jax.tree.leaves(d_head)[0].reshape(-1)[0].astype(d_hidden.dtype)
    return jnp.where(one == one, d_hidden, one)


_chunked.defvjp(_chunked_forward, _chunked_backward)
