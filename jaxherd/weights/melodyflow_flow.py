"""The published flow model's state dict to our velocity network and back.

Names and layouts: q, k and v are the rows of one matrix [3d, d]; skip projections are used in a
modulo order, in which ours are stored; RoPE turns neighbouring pairs there and halves here, so the
rows of queries and keys of self-attention change places head by head.

Source: melodyflow.md 3.2, 3.3 and 3.5.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split, unflatten
from jaxherd.layers.rope import RopeConfig, frequencies, half_to_interleaved, interleaved_to_half
from jaxherd.models.velocity_transformer import TextStates, VelocityTransformerConfig

_TEXT = "condition_provider.conditioners.description.output_proj"
_ROPE = re.compile(r"transformer\.(layers\.\d+\.self_attn\.)?rope\.frequencies")

# Sizes of a head in the audiocraft family; a state dict does not tell.
ASSUMED_HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class FlowCheckpoint:
    """A flow model as published.

    Attributes:
      module: the velocity network.
      latent_mean_C, latent_std_C: x <- (x - mean) / (std + 1e-5) standardises the codec's latents.
    """

    module: Any
    latent_mean_C: np.ndarray
    latent_std_C: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor (or a third of it) and its place.

    Attributes:
      theirs, ours: the names.
      index: place in our stack, None outside of the layers.
      third: which of q, k and v, None for a whole tensor.
      rotary: heads are in the interleaved order there.
    """

    theirs: str
    ours: str
    index: int | None = None
    third: int | None = None
    rotary: bool = False


def flow_config(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    positional: Literal["sin", "rope", "sin_rope"] | None = None,
    positional_scale: float = 1.0,
    add_zero_attn: bool = True,
    norm_first: bool = True,
) -> VelocityTransformerConfig:
    """Return the config that a state dict's shapes tell, with what they do not tell as given.

    Raises:
      JaxherdError: this is no flow model, or its table of rotations is another one.
    """
    state = {name.replace(".mha.", "."): value for name, value in state.items()}
    config = _config(state, num_heads, positional, positional_scale, add_zero_attn, norm_first)
    return _with_rounding(config, state)


def read_flow_state(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    positional: Literal["sin", "rope", "sin_rope"] | None = None,
    positional_scale: float = 1.0,
    add_zero_attn: bool = True,
    norm_first: bool = True,
) -> FlowCheckpoint:
    """Return the model in a state dict; sizes are read from the tensors.

    Args:
      state: name -> array, with or without the `mha.` that torch's own attention adds.
      num_heads: width / 64 when None, an assumption.
      positional: "rope" where the state holds its frequencies and "sin" elsewhere when None.
      positional_scale, add_zero_attn, norm_first: of the hidden configuration, see
        `VelocityTransformerConfig`.
    Raises:
      JaxherdError: no flow model; missing, unknown and wrongly shaped tensors, all in one message.
    """
    state = {name.replace(".mha.", "."): value for name, value in state.items()}
    config = flow_config(
        state,
        num_heads=num_heads,
        positional=positional,
        positional_scale=positional_scale,
        add_zero_attn=add_zero_attn,
        norm_first=norm_first,
    )
    rotary = {name for name in state if _ROPE.fullmatch(name)}
    definition, params, _ = split(abstract(config.build, jax.random.key(0)))
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    entries = list(_entries(config, shapes))
    expected = {e.theirs: _their_shape(e, shapes[e.ours]) for e in entries}
    expected |= {name: (1, config.latent_dim, 1) for name in ("latent_mean", "latent_std")}
    _check(state, expected, rotary)
    arrays = {path: np.empty(shape, _kind(state, entries, path)) for path, shape in shapes.items()}
    for entry in entries:
        value = _to_ours(state[entry.theirs], entry, config)
        arrays[entry.ours][() if entry.index is None else entry.index] = value
    module = definition.merge(unflatten({path: jnp.asarray(a) for path, a in arrays.items()}))
    mean, std = (np.array(state[n]).reshape(-1) for n in ("latent_mean", "latent_std"))
    return FlowCheckpoint(module, mean, std)


def write_flow_state(checkpoint: FlowCheckpoint) -> dict[str, np.ndarray]:
    """Return the state dict of a model, the exact inverse of `read_flow_state`.

    Raises:
      JaxherdError: the model's conditions are not text.
    """
    config = checkpoint.module.config
    if config.conditioner is not None and not isinstance(config.conditioner, TextStates):
        raise JaxherdError("the published form has text conditions only: use format='jaxherd'.")
    _, params, _ = split(checkpoint.module)
    values = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    shapes = {path: value.shape for path, value in values.items()}
    state: dict[str, np.ndarray] = {
        "latent_mean": checkpoint.latent_mean_C.reshape(1, -1, 1),
        "latent_std": checkpoint.latent_std_C.reshape(1, -1, 1),
    }
    thirds: dict[str, list[Any]] = {}
    for entry in _entries(config, shapes):
        value = values[entry.ours]
        value = value if entry.index is None else value[entry.index]
        value = _to_theirs(value, entry, config)
        if entry.third is None:
            state[entry.theirs] = value
        else:
            thirds.setdefault(entry.theirs, [None] * 3)[entry.third] = value
    state |= {name: np.concatenate(parts) for name, parts in thirds.items()}
    if config.positional != "sin":
        table = frequencies(RopeConfig(), config.head_dim)[0]
        if config.rope_rounding == "bfloat16":
            table = table.astype(ml_dtypes.bfloat16).astype(np.float32)
        state["transformer.rope.frequencies"] = table
    return state


def _config(state, num_heads, positional, scale, zero, norm_first) -> VelocityTransformerConfig:
    layers = {int(m[1]) for n in state if (m := re.match(r"transformer\.layers\.(\d+)\.", n))}
    needed = ("in_proj.weight", "transformer.layers.0.linear1.weight")
    absent = [name for name in needed if name not in state or state[name].ndim != 2]
    if absent or layers != set(range(len(layers))):
        raise JaxherdError(
            f"this is no flow model's state dict: {', '.join(absent) or 'a layer'} is missing or "
            "no matrix; name the dictionary under 'best_state' of the published file."
        )
    width, latent = state["in_proj.weight"].shape
    if num_heads is None:
        if width % ASSUMED_HEAD_DIM:
            raise JaxherdError(
                f"the width {width} is no multiple of the assumed head size {ASSUMED_HEAD_DIM}: "
                "give num_heads."
            )
        num_heads = width // ASSUMED_HEAD_DIM
    rotates = any(_ROPE.fullmatch(name) for name in state)
    if positional is None:
        positional = "rope" if rotates else "sin"
    if rotates != (positional != "sin"):
        raise JaxherdError(
            f"positional={positional!r} does not fit a state dict "
            f"{'with' if rotates else 'without'} rope.frequencies."
        )
    first = "transformer.layers.0."
    text = state.get(_TEXT + ".weight")
    cross = any(name.startswith(first + "cross_attention.") for name in state)
    try:
        return VelocityTransformerConfig(
            width,
            len(layers),
            num_heads,
            latent_dim=latent,
            ff_multiple=state[first + "linear1.weight"].shape[0] // width,
            conditioner=TextStates(text.shape[-1] if text is not None else 1) if cross else None,
            positional=positional,
            positional_scale=scale,
            bias_ff=first + "linear1.bias" in state,
            bias_attn=first + "self_attn.out_proj.bias" in state,
            bias_proj="in_proj.bias" in state or "out_proj.bias" in state,
            layer_scale=1.0 if first + "layer_scale_1.scale" in state else None,
            add_zero_attn=zero,
            qk_norm=first + "self_attn.q_layer_norm.weight" in state,
            qk_norm_cross=first + "cross_attention.q_layer_norm.weight" in state,
            norm_first=norm_first,
            skip_connections=(
                "u_shaped" if any(".skip_projections." in name for name in state) else "none"
            ),
        )
    except ValueError as error:
        raise JaxherdError(f"the state dict describes no flow model: {error}.") from error


def _entries(config: VelocityTransformerConfig, shapes: Mapping[str, Any]) -> Iterator[_Entry]:
    """Yield the place of every tensor; variables that the model lacks are left out."""
    n, depth = config.num_skips, config.num_layers
    found = [
        *_pair("in_proj", "in_proj"),
        *_pair("out_proj", "out_proj"),
        *_pair("timestep_embedder.mlp.0", "time_in"),
        *_pair("timestep_embedder.mlp.2", "time_out"),
        *_pair(_TEXT, "text_proj"),
        *_norm("out_norm", "out_norm"),
    ]
    for layer in range(depth):
        if layer < n:
            stack, index = "lower/", layer
        elif layer < depth - n:
            stack, index = "middle/", layer - n
        else:
            stack, index = "upper/layer/", layer - (depth - n)
        found += _layer(f"transformer.layers.{layer}.", stack, index, config)
    for index, number in enumerate(config.skip_order()):
        found += _pair(f"transformer.skip_projections.{number}", "upper/skip", index)
    yield from (entry for entry in found if entry.ours in shapes)


def _layer(theirs: str, ours: str, index: int, config: VelocityTransformerConfig):
    rotates = config.positional != "sin"
    for name, part, rotary in (
        ("self_attn", "attention", rotates),
        ("cross_attention", "cross", False),
    ):
        for third, letter in enumerate("qkv"):
            turned = rotary and letter != "v"
            place = f"{ours}{part}/{letter}_proj/"
            fused = f"{theirs}{name}.in_proj_"
            yield _Entry(fused + "weight", place + "kernel", index, third, turned)
            yield _Entry(fused + "bias", place + "bias", index, third, turned)
        yield from _pair(f"{theirs}{name}.out_proj", f"{ours}{part}/o_proj", index)
        for letter in "qk":
            norm = f"{theirs}{name}.{letter}_layer_norm"
            yield from _norm(norm, f"{ours}{part}/{letter}_norm", index, rotary)
    yield from _pair(theirs + "linear1", ours + "up", index)
    yield from _pair(theirs + "linear2", ours + "down", index)
    for norm, scale, part in (
        ("norm1", "layer_scale_1", "attention"),
        ("norm2", "layer_scale_2", "feed_forward"),
        ("norm_cross", "layer_scale_cross", "cross"),
    ):
        yield from _norm(theirs + norm, f"{ours}{part}_norm", index)
        yield _Entry(f"{theirs}{scale}.scale", f"{ours}{part}_scale", index)


def _pair(theirs: str, ours: str, index: int | None = None) -> list[_Entry]:
    return [
        _Entry(f"{theirs}.weight", f"{ours}/kernel", index),
        _Entry(f"{theirs}.bias", f"{ours}/bias", index),
    ]


def _norm(theirs: str, ours: str, index: int | None = None, rotary: bool = False) -> list[_Entry]:
    return [
        _Entry(f"{theirs}.weight", f"{ours}/scale", index, rotary=rotary),
        _Entry(f"{theirs}.bias", f"{ours}/bias", index, rotary=rotary),
    ]


def _their_shape(entry: _Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    shape = (ours if entry.index is None else ours[1:])[::-1]
    return shape if entry.third is None else (3 * shape[0], *shape[1:])


def _to_ours(value: np.ndarray, entry: _Entry, config: VelocityTransformerConfig) -> np.ndarray:
    if entry.third is not None:
        rows = value.shape[0] // 3
        value = value[entry.third * rows : (entry.third + 1) * rows]
    return (interleaved_to_half(value, config.head_dim) if entry.rotary else value).T


def _to_theirs(value: np.ndarray, entry: _Entry, config: VelocityTransformerConfig) -> np.ndarray:
    value = np.ascontiguousarray(value.T)
    return half_to_interleaved(value, config.head_dim) if entry.rotary else value


def _kind(state: Mapping[str, np.ndarray], entries: list[_Entry], path: str) -> np.dtype:
    kinds = {state[e.theirs].dtype for e in entries if e.ours == path}
    return np.dtype(jnp.result_type(*kinds))


def _check(state, expected: Mapping[str, tuple[int, ...]], ignored: set[str]) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected and name not in ignored]
    wrong = [
        f"{name} is {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    parts = []
    for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong)):
        if names:
            parts.append(f"{title}: {', '.join(names)}")
    if parts:
        raise JaxherdError("the flow state dict does not fit; " + "; ".join(parts) + ".")


def _with_rounding(config: VelocityTransformerConfig, state: Mapping) -> VelocityTransformerConfig:
    """Return the config with the rounding of the stored frequencies, by which torch turns."""
    wanted = frequencies(RopeConfig(), config.head_dim)[0]
    rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = set()
    for name in sorted(name for name in state if _ROPE.fullmatch(name)):
        table = np.asarray(state[name], np.float32)
        # Between 1e-5, float32's error of a power, and 4e-3, bfloat16's, lies nothing that is known.
        if table.shape == wanted.shape and np.allclose(table, wanted, rtol=1e-5, atol=0):
            found.add("none")
        elif table.shape == wanted.shape and np.allclose(table, rounded, rtol=4e-3, atol=0):
            # Another library's power may fall to the other side when it is rounded.
            if np.mean(table == rounded) < 0.9:
                raise _other_table(name, config)
            found.add("bfloat16")
        else:
            raise _other_table(name, config)
    if len(found) > 1:
        raise JaxherdError("the layers of this flow model turn by different tables of frequencies.")
    return dataclasses.replace(config, rope_rounding=found.pop() if found else "none")


def _other_table(name: str, config: VelocityTransformerConfig) -> JaxherdError:
    return JaxherdError(
        f"{name} is not that of heads of {config.head_dim} with base 10000: give num_heads, "
        "if the base is not another."
    )
