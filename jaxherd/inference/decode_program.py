"""One decoding step over a mesh, as a program that can be compiled for devices that are not here.

Every row takes one token, attends to a cache that may be full, and chooses the likeliest next one.

Axis letters: B rows, T tokens (one), D width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.core.sharding import Partitioner
from jaxherd.models.decoder import DecoderConfig


def decode_program(
    config: Any, partitioner: Partitioner, *, rows: int, length: int, dtype: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Return (step, its arguments as shapes with shardings).

    `step(params, buffers, cache, tokens_B, positions_B)` gives the cache, which is donated, and the
    next tokens; the cache is a list of its arrays (`jax.tree.leaves` of `Decoder.init_cache`).

    Args:
      config: of a decoder, with weights in few bits or not.
      partitioner: mesh and rules.
      rows: sequences that decode together.
      length: tokens that the cache of a row has room for.
      dtype: of plain weights and of the cache.
    Raises:
      JaxherdError: no decoder; rows, or a weight, that the layout does not divide.
    """
    if not isinstance(config, DecoderConfig):
        raise JaxherdError(f"a {type(config).__name__} does not decode: choose a decoder's stage.")
    if rows < 1 or length < 1:
        raise JaxherdError(f"decoding needs rows and a context of at least 1: {rows}, {length}.")

    def build(key: jax.Array) -> Any:
        return cast_floating(config.build(key), dtype)

    definition, *parts = split(abstract(build, jax.random.key(0)))
    weights = [
        _placed(tree, partitioner.tree_shardings(axes, tree))
        for tree, axes in zip(parts, definition.axes())
    ]
    structure = []

    def empty_cache(*trees):
        leaves, tree = jax.tree.flatten(definition.merge(*trees).init_cache(rows, length))
        structure.append(tree)
        return leaves

    # Of arrays alone: the classes of caches hold no shapes or shardings.
    cache = jax.eval_shape(empty_cache, *weights)
    # Keys and values; positions have the first three dimensions.
    names = ("layers", "batch", "kv_length", "act_kv_heads", "head_dim")
    held = [partitioner.sharding(names[: c.ndim], c.shape, "the cache") for c in cache]
    row = partitioner.sharding(("batch",), (rows,), "rows that decode together")

    def step(params, buffers, cache, tokens_B, positions_B):
        with partitioner.activate():
            model = definition.merge(params, buffers)
            output = model.forward(
                tokens_B[:, None],
                positions=positions_B[:, None],
                cache=structure[0].unflatten(cache),
            )
            logits_BV = model.unembed(output.hidden_BTD[:, 0])
        return jax.tree.leaves(output.cache), jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=row)
    compiled = jax.jit(step, donate_argnums=(2,), out_shardings=(held, row))
    return compiled, (*weights, _placed(cache, held), tokens, tokens)


def decode_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Return the useful FLOPs of one step whose rows see full caches of `length` tokens.

    Two per multiply-add of the weights that a token meets, and of q k^T and its use for every key
    that a layer keeps.
    """
    d = config.embed_dim
    weights = sum(layer.active_params(d) - 2 * d for layer in config.layers)
    attentions = [layer.attention for layer in config.layers]
    keys = sum(a.cache_capacity(length) * a.num_heads * a.head_dim for a in attentions)
    per_row = 2.0 * (weights * config.repeats + d * config.vocab_size) + 4.0 * keys * config.repeats
    return rows * per_row


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
