"""The form of a model that decodes fastest on this platform; the function is the same.

On CPU a decoding step is bound by reading the weights once, and XLA reads them at full speed only

- when each layer's arrays lie apart (a layer of a stack is copied out first),
- when a matrix is [in, out] (scoring by the transposed embedding table runs at half the speed),
- in float32 (16-bit products run element by element there, many times slower).

So there the layers are unstacked, tied scores get a transposed copy of the table, and 16-bit
weights are widened; weights in few bits stay so.  Elsewhere the model stays as it is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.coded import is_coded
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.core.platform import platform
from jaxherd.models.decoder import Decoder, restack


def serving_form(module: Decoder, *, dtype: Any = None) -> Decoder:
    """Return the module as it decodes fastest here.

    Args:
      module: any decoder; it is not changed, and shares what need not differ.
      dtype: of the weights; None keeps it, except for 16-bit weights on CPU.
    """
    if platform() != "cpu":
        return module if dtype is None else cast_floating(module, dtype)
    module = cast_floating(module, jnp.float32 if dtype is None else dtype)
    if module.config.scan_layers:
        module = restack(module, scan_layers=False)
    # In few bits a table lies [in, out] already.
    tied = module.config.tie_embeddings and not is_coded(module.embedding.table[...])
    return _untied(module) if tied else module


def _untied(module: Decoder) -> Decoder:
    config = dataclasses.replace(module.config, tie_embeddings=False)
    definition, _, _ = split(abstract(config.build, jax.random.key(0)))
    _, params, buffers = split(module)
    kernel_DV = params["embedding"]["table"].T
    return definition.merge({**params, "unembedding": {"kernel": kernel_DV}}, buffers)
