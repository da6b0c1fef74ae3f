"""Tell a model how long its sequences are going to be.

The "dynamic" and "longrope" scalings choose their frequencies by the length of the sequence.
Published code looks at every batch and changes its mind in the middle of a generation, when
cached keys already carry the old rotation; here the length is said once.
"""

import dataclasses
from typing import TypeVar

import jax

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, split
from jaxherd.models.decoder import Decoder

D = TypeVar("D", bound=Decoder)


def with_context_length(module: D, length: int) -> D:
    """Return the same parameters with RoPE set for sequences of `length` tokens.

    Only layers with "dynamic" or "longrope" scaling change.

    Raises:
      JaxherdError: a length below 1.
    """
    if length < 1:
        raise JaxherdError(f"a context length must be at least 1, got {length}.")
    config = module.config

    def changed(layer):
        rope = layer.attention.rope
        if rope is None or rope.scaling is None or rope.scaling.kind not in ("dynamic", "longrope"):
            return layer
        scaling = dataclasses.replace(rope.scaling, context_length=length)
        rope = dataclasses.replace(rope, scaling=scaling)
        return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=rope))

    config = dataclasses.replace(config, layers=tuple(changed(layer) for layer in config.layers))
    definition, _, _ = split(abstract(config.build, jax.random.key(0)))
    _, params, buffers = split(module)
    return definition.merge(params, buffers)
