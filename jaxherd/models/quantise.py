"""Named ways to keep a decoder's weights in few bits.

A recipe turns the config of a model into the same model's with formats (`LayerConfig.formats`);
`build`, `plan`, `load` and `save` follow from the config.

| name | in few bits | source |
|---|---|---|
| int4_mixed | routed and shared experts: int4, groups of 128 inputs, max(absmax, 1e-6) / 8 | llama4.md 9, the loader |
| int4_mixed_offline | routed experts but those of the first and the last layer, likewise | llama4.md 9, the script |
| fp8_mixed | routed experts but those of the first and the last layer: e4m3, a scale an output; rows rounded to e4m3 by their own scale, its maximum bounded by 1200 | llama4.md 9 |
| int8, int8_group32 | every projection and the head: a scale an output, or for 32 inputs | jaxherd's |
| int4, int4_group32 | every projection in int4 and the head in int8: likewise | jaxherd's |

Norms, biases and routers stay as they are, and so do untied embeddings: a lookup reads few of their
rows.  The head is the output projection, or the tied table.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.layers.moe import MoeConfig
from jaxherd.layers.weight_format import Formats, WeightFormat
from jaxherd.models.decoder import Decoder, DecoderConfig, LayerConfig, rebuilt

# Read as the file has them: no recipe, but what `load` takes in the place of one.
AS_STORED = "as_stored"
_GATED = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which matrices of a decoder are kept in few bits, and how; None leaves them.

    Attributes:
      name: as `--quantise` and `load` take it.
      attention: projections of queries, keys, values and the output.
      feed_forward: of dense layers.
      experts, shared_expert: of layers that route.
      ends: whether the experts of the first and the last layer of the model are, too.
      head: the output projection, or the tied table.
    """

    name: str
    attention: WeightFormat | None = None
    feed_forward: WeightFormat | None = None
    experts: WeightFormat | None = None
    shared_expert: WeightFormat | None = None
    ends: bool = True
    head: WeightFormat | None = None

    def apply(self, config: Any) -> Any:
        """Return the config of the model with its weights in these formats.

        Raises:
          JaxherdError: no decoder, one in few bits already, one that has none of the recipe's
            matrices, or a matrix whose inputs the groups do not divide.
        """
        if not isinstance(config, DecoderConfig):
            raise JaxherdError(
                f"{self.name}: only decoders are quantised, and this is a "
                f"{type(config).__name__.removesuffix('Config')}: leave --quantise away."
            )
        if config.weight_formats():
            raise JaxherdError(
                f"{self.name}: the weights are in few bits already: start from the original ones."
            )
        last = len(config.layers) - 1
        layers = tuple(
            dataclasses.replace(layer, formats=self._of_layer(layer, self.ends or 0 < i < last))
            for i, layer in enumerate(config.layers)
        )
        path = "embedding/table" if config.tie_embeddings else "unembedding/kernel"
        outer: Formats = () if self.head is None else ((path, self.head),)
        found = dataclasses.replace(config, layers=layers, formats=outer)
        if not found.weight_formats():
            raise JaxherdError(
                f"{self.name} keeps routed experts in few bits and this model has none"
                f"{'' if self.ends else ' between its first and last layer'}: choose int8 or int4."
            )
        abstract(found.build, jax.random.key(0))  # groups that do not divide are told now
        return found

    def _of_layer(self, layer: LayerConfig, inside: bool) -> Formats:
        found = {}
        if self.attention is not None:
            found |= {f"attention/{name}_proj/kernel": self.attention for name in "qkvo"}
        if not isinstance(layer.feed_forward, MoeConfig):
            if self.feed_forward is not None:
                found |= {f"feed_forward/{name}/kernel": self.feed_forward for name in _GATED}
            return tuple(sorted(found.items()))
        if self.experts is not None and inside:
            found |= {f"feed_forward/{name}": self.experts for name in _GATED}
        if self.shared_expert is not None and layer.feed_forward.shared_dim:
            shared = {f"feed_forward/shared/{name}/kernel": self.shared_expert for name in _GATED}
            found |= shared
        return tuple(sorted(found.items()))


def _everything(name: str, projections: WeightFormat, head: WeightFormat) -> Recipe:
    return Recipe(name, projections, projections, projections, projections, head=head)


# llama4.md section 9.
_INT4 = WeightFormat("int4", group=128, convention="absmax/8")
_FP8 = WeightFormat("float8_e4m3fn", activations="float8_e4m3fn")
_INT8 = WeightFormat("int8", convention="absmax/127")
_INT8_32 = dataclasses.replace(_INT8, group=32)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int4_mixed", experts=_INT4, shared_expert=_INT4),
        Recipe("int4_mixed_offline", experts=_INT4, ends=False),
        Recipe("fp8_mixed", experts=_FP8, ends=False),
        _everything("int8", _INT8, _INT8),
        _everything("int8_group32", _INT8_32, _INT8_32),
        # Scores of all tokens suffer most from few bits, and a head is read once a token.
        _everything("int4", WeightFormat("int4"), _INT8),
        _everything("int4_group32", WeightFormat("int4", group=32), _INT8_32),
    )
}


def recipe_of(name: str | Recipe, others: Sequence[str] = ()) -> Recipe:
    """Return a recipe by its name.

    Args:
      name: a key of `RECIPES`, or a recipe of the caller's.
      others: what may stand in the place of a recipe here, for the message.
    Raises:
      JaxherdError: there is none of this name.
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise JaxherdError(
            f"no way to quantise is called {name!r}; " + nearest(name, [*RECIPES, *others])
        )
    return RECIPES[name]


def quantise(module: Decoder, recipe: str | Recipe) -> Decoder:
    """Return the model with its weights in the recipe's formats.

    Both models are held at once; `jaxherd.load(..., quantise=)` reads tensor by tensor instead.

    Raises:
      JaxherdError: an unknown recipe, or a model that it does not fit.
    """
    return rebuilt(module, recipe_of(recipe).apply(module.config))


def dequantised(module: Decoder) -> Decoder:
    """Return the model whose arrays are what the codes of this one stand for.

    It computes the same up to the order and rounding of products, except where a format rounds the
    activations.
    """
    return rebuilt(module, without_formats(module.config))


def without_formats(config: DecoderConfig) -> DecoderConfig:
    """Return the config of the same model in plain arrays."""
    layers = tuple(dataclasses.replace(layer, formats=()) for layer in config.layers)
    return dataclasses.replace(config, layers=layers, formats=())


def bytes_by_dtype(module: Any) -> dict[str, int]:
    """Return the bytes of a module's variables by the dtype that holds them; shapes are enough.

    An int4 of one value an element counts half a byte, as TPUs store it.
    """
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(split(module)[1:]):
        name = jnp.dtype(leaf.dtype).name
        size = 0.5 if name == "int4" else leaf.dtype.itemsize
        found[name] = found.get(name, 0) + int(math.prod(leaf.shape) * size)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def stored_bytes(config: Any, dtype: Any, quantise: str | Recipe | None = None) -> dict[str, int]:
    """Return `bytes_by_dtype` of the model of a config whose plain weights are in `dtype`.

    Raises:
      JaxherdError: as `Recipe.apply`.
    """
    if quantise is not None:
        config = recipe_of(quantise).apply(config)

    def build(key: jax.Array) -> Any:
        return cast_floating(config.build(key), dtype)

    return bytes_by_dtype(abstract(build, jax.random.key(0)))
