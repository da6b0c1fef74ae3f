"""Parameters of a SEANet autoencoder from a torch state dict.

Two styles of names: audiocraft's (MelodyFlow's `best_state`, "encoder.model.3.conv.conv.bias") and
those of `transformers.EncodecModel` ("encoder.layers.3.conv.bias").  Both number the layers as our
config lists them, so every name follows from the config.  Source: melodyflow.md 3.5.

Kernels are [out, in, tap] there (of transposed convolutions [in, out, tap]) and [tap, in, out]
here.  Weight norm may come in torch's new names, in its old ones, or already multiplied out, in
which case v is the kernel and g its norms.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Tree, unflatten
from jaxherd.layers.conv import ConvConfig, TransposedConvConfig
from jaxherd.layers.lstm import LstmConfig
from jaxherd.models.seanet import (
    ActivationConfig,
    AudioAutoencoderConfig,
    LayerConfig,
    ResidualConfig,
)

Style = Literal["audiocraft", "transformers"]

# To our [tap, in, out] from theirs.
_KERNEL = (2, 1, 0)
_TRANSPOSED_KERNEL = (2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Product:
    """A kernel whose weight norm was multiplied out: v is the kernel itself and g its norms."""

    name: str
    permutation: tuple[int, ...]
    kept: int
    part: Literal["g", "v"]

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Return g or v."""
        kernel = np.transpose(tensor, self.permutation)
        if self.part == "v":
            return kernel
        return np.sqrt(np.sum(np.square(kernel), axis=tuple({0, 1, 2} - {self.kept})))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays.

    Attributes:
      ours: path in the parameters.
      names: of the tensor in a state dict, the preferred one first.
      shape: ours.
      permutation: of the tensor's axes into ours; None takes its values as a vector.
      product: where to look when none of the names is there.
    """

    ours: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    product: Product | None = None

    def find(self, state: Mapping[str, np.ndarray]) -> str | None:
        """Return the name under which the state dict has this array."""
        names = self.names if self.product is None else (*self.names, self.product.name)
        return next((name for name in names if name in state), None)

    def read(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Return the array in our layout; None when the tensor has another shape."""
        product = self.product if name not in self.names else None
        permutation = self.permutation if product is None else product.permutation
        if permutation is not None and tensor.ndim != len(permutation):
            return None
        if product is not None:
            array = product.read(tensor)
        else:
            array = tensor.reshape(-1) if permutation is None else tensor.transpose(permutation)
        return array if array.shape == self.shape else None


def name_table(config: AudioAutoencoderConfig, style: Style = "audiocraft") -> tuple[Entry, ...]:
    """Return an entry for every parameter of the encoder and decoder, in order."""
    found: list[Entry] = []
    for network, layers in (
        ("encoder", config.encoder_layers()),
        ("decoder", config.decoder_layers()),
    ):
        middle = "model" if style == "audiocraft" else "layers"
        for index, layer in enumerate(layers):
            found += _entries(
                layer, f"{network}/layers/{index}", f"{network}.{middle}.{index}", style
            )
    return tuple(found)


def _entries(layer: LayerConfig, ours: str, theirs: str, style: Style) -> Iterator[Entry]:
    if isinstance(layer, ConvConfig | TransposedConvConfig):
        yield from _conv_entries(layer, ours, theirs, style)
    elif isinstance(layer, ActivationConfig):
        if layer.name == "snake":
            yield Entry(f"{ours}/snake/alpha", (f"{theirs}.alpha",), (layer.channels,))
    elif isinstance(layer, LstmConfig):
        size = layer.dim
        for k in range(layer.layers):
            for name, label in (("input", "ih"), ("hidden", "hh")):
                at = f"{ours}/layers/{k}/{name}"
                weight, bias = (
                    f"{theirs}.lstm.weight_{label}_l{k}",
                    f"{theirs}.lstm.bias_{label}_l{k}",
                )
                yield Entry(f"{at}_kernel", (weight,), (size, 4 * size), (1, 0))
                yield Entry(f"{at}_bias", (bias,), (4 * size,))
    elif isinstance(layer, ResidualConfig):
        for k, part in enumerate(layer.block):
            yield from _entries(part, f"{ours}/block/{k}", f"{theirs}.block.{k}", style)
        if layer.shortcut is not None:
            yield from _entries(layer.shortcut, f"{ours}/shortcut", f"{theirs}.shortcut", style)


def _conv_entries(
    layer: ConvConfig | TransposedConvConfig, ours: str, theirs: str, style: Style
) -> Iterator[Entry]:
    transposed = isinstance(layer, TransposedConvConfig)
    inner = "convtr.convtr" if transposed else "conv.conv"
    at = f"{theirs}.{inner}" if style == "audiocraft" else f"{theirs}.conv"
    shape = (layer.kernel_size, layer.in_channels, layer.out_channels)
    permutation, kept = (_TRANSPOSED_KERNEL, 1) if transposed else (_KERNEL, 2)
    if layer.norm == "weight_norm":
        new = f"{at}.parametrizations.weight.original"
        g, v = (Product(f"{at}.weight", permutation, kept, part) for part in ("g", "v"))
        yield Entry(f"{ours}/g", (f"{new}0", f"{at}.weight_g"), (shape[kept],), product=g)
        yield Entry(f"{ours}/v", (f"{new}1", f"{at}.weight_v"), shape, permutation, product=v)
    else:
        yield Entry(f"{ours}/kernel", (f"{at}.weight",), shape, permutation)
    if transposed or layer.bias:
        yield Entry(f"{ours}/bias", (f"{at}.bias",), (layer.out_channels,))


def codec_params(
    state: Mapping[str, np.ndarray],
    config: AudioAutoencoderConfig,
    style: Style = "audiocraft",
    ignore: tuple[str, ...] = ("quantizer.",),
) -> Tree:
    """Return {"encoder": ..., "decoder": ...} in float32 from a torch state dict.

    Args:
      state: tensors by name.
      config: of the codec; what a checkpoint's own configuration says must have gone into it.
      style: whose names.
      ignore: prefixes of names that are not part of the two networks.
    Raises:
      JaxherdError: tensors that are missing, unknown or of another shape, all of them listed.
    """
    params, used = {}, set()
    missing, wrong = [], []
    for entry in name_table(config, style):
        name = entry.find(state)
        if name is None:
            missing.append(entry.names[0])
            continue
        used.add(name)
        tensor = np.asarray(state[name])
        array = entry.read(name, tensor)
        if array is None:
            wrong.append(f"{name} ({tensor.shape}; ours, {entry.ours}, is {entry.shape})")
            continue
        params[entry.ours] = np.ascontiguousarray(array, np.float32)
    unknown = sorted(n for n in state if n not in used and not n.startswith(ignore))
    if missing or unknown or wrong:
        raise JaxherdError(
            "the state dict does not fit the codec's config: "
            f"missing {missing or 'nothing'}; unknown {unknown or 'nothing'}; "
            f"of another shape {wrong or 'nothing'}; set the config's fields to the checkpoint's."
        )
    return unflatten(params)


def melodyflow_codec_params(
    state: Mapping[str, np.ndarray], config: AudioAutoencoderConfig
) -> Tree:
    """Return the parameters in `best_state` of MelodyFlow's `compression_state_dict.bin`."""
    return codec_params(state, config, "audiocraft")


def encodec_params(state: Mapping[str, np.ndarray], config: AudioAutoencoderConfig) -> Tree:
    """Return the encoder's and decoder's parameters of a `transformers.EncodecModel`."""
    return codec_params(state, config, "transformers")
