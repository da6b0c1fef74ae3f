"""Weights that a file holds in few bits: as codes, or as the numbers that they stand for.

| where | which | kept as |
|---|---|---|
| GGUF | Q4_0, Q4_1, Q8_0 | int4 with or without zero points, int8; groups of 32 |
| Hugging Face, compressed-tensors "float-quantized" | `X.weight` and `X.weight_scale` [out, 1] | e4m3, a scale an output |
| Hugging Face, fbgemm_fp8 | `gate_up_proj` and `gate_up_proj_scale` [E, 1, 2F], `down_proj` and `down_proj_scale` [E, D, 1]; `X.weight` and `X.weight_scale` | e4m3, a scale an output |

Other formats of GGUF become numbers.  The fp8 checkpoints round activations by rows while they run,
so their matrices say so (the bound of 1200 is Meta's; compressed-tensors states none).

Source: llama4.md sections 6 and 9.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split
from jaxherd.data.gguf_file import GgufStore
from jaxherd.kernels.quantized_matmul import QuantizedMatrix
from jaxherd.kernels.quantized_matmul.formats import GGUF_BLOCK, GGUF_BYTES, from_gguf
from jaxherd.layers.rope import interleaved_to_half
from jaxherd.layers.weight_format import WeightFormat, inner_first
from jaxherd.models.decoder import DecoderConfig
from jaxherd.models.periods import stacked_layers
from jaxherd.weights.mapping import Placement, place
from jaxherd.weights.stores import TensorStore

_GGUF = {
    "Q4_0": WeightFormat("int4", GGUF_BLOCK, "q4_0", "float16"),
    "Q4_1": WeightFormat("int4", GGUF_BLOCK, None, "float16", zeros="float32"),
    "Q8_0": WeightFormat("int8", GGUF_BLOCK, "q8_0", "float16"),
}
assert _GGUF.keys() == GGUF_BYTES.keys()
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_KERNELS = ("/kernel", "embedding/table", "/gate", "/up", "/down")


class GgufCodes:
    """The codes of a GGUF file."""

    def __init__(self, store: GgufStore):
        self._store = store

    def format_of(self, name: str) -> WeightFormat | None:
        """Return how a tensor is kept, or None for one that becomes numbers."""
        return _GGUF.get(self._store.kind(name))

    def __call__(self, p: Placement) -> QuantizedMatrix:
        """Return the code that fills a slot of ours."""
        kind, blocks = self._store.blocks(p.name)
        # Rows are outputs, which is what the order of heads concerns.
        blocks = interleaved_to_half(blocks, p.head_dim) if p.rule.rotary else blocks
        return from_gguf(blocks, kind)


class Fp8Store:
    """A store whose fp8 tensors have scales beside them, under the suffix `_scale`.

    Its tensors are those that a plain checkpoint would have: `read` multiplies the scales in.
    """

    def __init__(self, store: TensorStore):
        self._store, self.where = store, store.where
        scales = {f"{name}_scale" for name in store.shapes} & store.shapes.keys()
        self.shapes = {n: s for n, s in store.shapes.items() if n not in scales}
        self.dtypes = {n: store.dtypes[n] for n in self.shapes}
        for name, dtype in self.dtypes.items():
            if dtype != _E4M3:
                continue
            if f"{name}_scale" not in scales:
                raise JaxherdError(
                    f"{store.where}: {name} is fp8 and has no {name}_scale beside it."
                )
            self._check(name)
            self.dtypes[name] = np.dtype(ml_dtypes.bfloat16)
        self._coded = {n for n in self.shapes if store.dtypes[n] == _E4M3}

    def _check(self, name: str) -> None:
        shape, scale = self.shapes[name], self._store.shapes[f"{name}_scale"]
        along = {(*shape[:-2], shape[-2], 1), (*shape[:-2], 1, shape[-1])}
        if len(shape) < 2 or tuple(scale) not in along:
            raise JaxherdError(
                f"{self.where}: {name}_scale is {scale} for a tensor of {shape}; only one scale an "
                "output is read."
            )

    def format_of(self, name: str) -> WeightFormat | None:
        """Return how a tensor is kept, or None for a plain one."""
        if name not in self._coded:
            return None
        scale = jnp.dtype(self._store.dtypes[f"{name}_scale"]).name
        return WeightFormat("float8_e4m3fn", None, None, scale, activations="float8_e4m3fn")  # pyright: ignore[reportArgumentType]

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as numbers, those of fp8 in bfloat16."""
        tensor = self._store.read(name)
        if name not in self._coded:
            return tensor
        scale = self._store.read(f"{name}_scale").astype(np.float32)
        if tensor.ndim == 2:
            return (tensor.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        found = np.empty(tensor.shape, ml_dtypes.bfloat16)
        for e in range(len(tensor)):  # one expert in float32 at a time
            found[e] = tensor[e].astype(np.float32) * _along(tensor, scale)[e]
        return found

    def __call__(self, p: Placement) -> QuantizedMatrix:
        """Return the code that fills a slot of ours."""
        scale = self._store.read(f"{p.name}_scale")
        return QuantizedMatrix(
            inner_first(p.path, p.rule.to_ours(self._store.read(p.name), p.head_dim)),
            p.rule.scales_to_ours(scale, p.head_dim),
            activations="float8_e4m3fn",
        )


def _along(tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the scales [E, 1, out] of fused experts [E, in, out]."""
    swapped = scale.shape[-1] == 1 and tensor.shape[-1] != 1
    return scale.swapaxes(-1, -2) if swapped else scale


def stored_formats(
    config: DecoderConfig,
    architecture: str,
    names: Mapping[str, Any],
    format_of: Callable[[str], WeightFormat | None],
    where: str,
) -> DecoderConfig:
    """Return the config of a model with the formats in which its tensors are stored.

    Args:
      config: of the model in plain arrays.
      architecture, names: a key of `mapping.TABLES`, and the tensors that exist.
      format_of: how a tensor is kept; None for numbers.
      where: the file, for messages.
    Raises:
      JaxherdError: nothing of it is in few bits.
    """
    _, params, _ = split(abstract(config.build, jax.random.key(0)))
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    found: dict[tuple[int, str], list[WeightFormat | None]] = {}
    for p in place(config, shapes, architecture, names):
        if not p.path.endswith(_KERNELS):
            continue
        slot = (-1, p.path)
        if p.path.startswith("segments/"):
            _, s, r, inside = p.path.split("/", 3)
            slot = (stacked_layers(config.segments(), int(s), int(r))[p.index[0]], inside)
        found.setdefault(slot, []).append(format_of(p.name))
    formats = {slot: kinds[0] for slot, kinds in found.items() if _alike(kinds)}

    def of(layer: int) -> Any:
        here = {path: f for (i, path), f in formats.items() if i == layer and f is not None}
        return tuple(sorted(here.items()))

    layers = tuple(
        dataclasses.replace(layer, formats=of(i)) for i, layer in enumerate(config.layers)
    )
    result = dataclasses.replace(config, layers=layers, formats=of(-1))
    if not result.weight_formats():
        raise JaxherdError(
            f"{where}: no weights are stored in codes that can be kept (Q4_0, Q4_1 and Q8_0 of "
            "GGUF, fp8 of Hugging Face): leave 'as_stored' away or choose another recipe."
        )
    return result


def _alike(kinds: Sequence[WeightFormat | None]) -> bool:
    """Whether all tensors of a variable (experts that are stored one by one) are kept alike."""
    return kinds[0] is not None and all(kind == kinds[0] for kind in kinds)
