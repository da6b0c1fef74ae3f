"""The configuration inside a published music model: hydra's YAML text as settings of ours.

Of `xp.cfg` three sections say what the networks are: `transformer_lm`, `encodec` and `seanet`.  A
key in them that changes what is computed and that we do not know is refused, as is a value that we
do not build; keys of training and of torch's kernels are left out.

Source: melodyflow.md 2.1, 3.3 and 3.5.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from jaxherd.core.errors import JaxherdError
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.velocity_transformer import TextStates, VelocityTransformerConfig

MAX_TEXT = 2**20
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_MAX_HOPS = 16

# Of `transformer_lm`: settings, what may only have the value that we build (which also counts when
# the key is absent), and what does not change an evaluation.
_FLOW_NEEDED = ("dim", "num_heads", "num_layers", "norm_first", "positional_embedding")
_FLOW_OPTIONAL = (
    *("hidden_scale", "bias_ff", "bias_attn", "bias_proj", "layer_scale", "positional_scale"),
    *("add_zero_attn", "skip_connections", "qk_layer_norm", "qk_layer_norm_cross"),
    *("cross_attention", "latent_dim"),
)
_FLOW_FIXED = {
    "activation": "gelu",
    "causal": False,
    "kv_repeat": 1,
    "max_period": 10000,
    "norm": "layer_norm",
    "past_context": None,
    "xpos": False,
}
_FLOW_IGNORED = (
    *("attention_as_float32", "attention_dropout", "card", "cfg_coef", "checkpointing", "custom"),
    *(
        "depthwise_init",
        "dropout",
        "emb_lr",
        "lr",
        "memory_efficient",
        "n_q",
        "q_modeling",
        "two_step_cfg",
    ),
    *("weight_decay", "weight_init", "zero_bias_init"),
)
_CODEC_NEEDED = (
    *("activation", "causal", "channels", "compress", "dilation_base", "dimension", "kernel_size"),
    *("last_kernel_size", "lstm", "n_filters", "n_residual_layers", "norm", "pad_mode", "ratios"),
    *("residual_kernel_size", "true_skip"),
)
_CODEC_OPTIONAL = ("activation_params", "decoder", "disable_norm_outer_blocks", "encoder")
_CODEC_IGNORED = ("norm_params",)
_ACTIVATIONS = {"snake": "snake", "snake1d": "snake", "elu": "elu"}
_FINAL = {"none": None, "tanh": "tanh"}

# Where the text encoders that audiocraft knows by name are published.
_TEXT_ENCODERS = {
    **{f"t5-{size}": f"hf://google-t5/t5-{size}" for size in ("small", "base", "large")},
    **{
        f"google/flan-t5-{size}": f"hf://google/flan-t5-{size}"
        for size in ("small", "base", "large", "xl", "xxl")
    },
}


class XpConfig:
    """An `xp.cfg`: values by section and key, with references such as `${channels}` followed."""

    def __init__(self, text: str, where: str):
        """Read the text.

        Args:
          text: YAML; plain values alone, so that nothing in it can run.
          where: what to call it in messages.
        Raises:
          JaxherdError: no YAML, no mapping, too long, or tags of other objects.
        """
        self.where = where
        if len(text) > MAX_TEXT:
            raise JaxherdError(f"{where}: its xp.cfg is longer than {MAX_TEXT} characters.")
        try:
            found = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise JaxherdError(
                f"{where}: its xp.cfg is no YAML of plain values ({reason}): it is not read."
            ) from error
        if not isinstance(found, dict):
            raise JaxherdError(f"{where}: its xp.cfg is no mapping.")
        self._root: dict[Any, Any] = found

    def section(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        """Return a section, which has a dot in its name where it lies in another.

        Raises:
          JaxherdError: it is absent or no mapping.
        """
        found = self.get(name)
        if found is None and optional:
            return {}
        if not isinstance(found, dict):
            raise JaxherdError(f"{self.where}: its xp.cfg has no section {name!r}.")
        return {str(key): self._followed(value) for key, value in found.items()}

    def get(self, path: str) -> Any:
        """Return the value at a dotted path, None where there is none."""
        return self._followed(self._at(path))

    def _at(self, path: str) -> Any:
        found: Any = self._root
        for part in path.split("."):
            found = self._followed(found)
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
        return found

    def _followed(self, value: Any) -> Any:
        for _ in range(_MAX_HOPS):
            if not isinstance(value, str) or "${" not in value:
                return value
            match = _REFERENCE.fullmatch(value)
            if match is None:
                return value  # a resolver's: told as a wrong value where it is needed
            found: Any = self._root
            for part in match[1].split("."):
                found = found.get(part) if isinstance(found, dict) else None
            value = found
        raise JaxherdError(f"{self.where}: the reference {value!r} in its xp.cfg leads nowhere.")


class _Section:
    """A section's values, with all that is wrong with them collected."""

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name, self.values = name, values
        self.wrong: list[str] = []

    def check(self, needed, optional, fixed: Mapping[str, Any], ignored) -> None:
        missing = [key for key in needed if key not in self.values]
        known = {*needed, *optional, *fixed, *ignored}
        unknown = sorted(key for key in self.values if key not in known)
        if missing:
            self.wrong.append(f"missing {self._named(missing)}")
        if unknown:
            self.wrong.append(f"unknown {self._named(unknown)}")
        for key, value in fixed.items():
            found = self.values.get(key, value)
            if found != value:
                self.wrong.append(f"{self.name}.{key}={found!r}, where {value!r} alone is built")

    def _named(self, keys) -> str:
        return ", ".join(f"{self.name}.{key}" for key in keys)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of this kind, else note what it is and return the default."""
        value = self.values.get(key, default)
        if key not in self.values:
            return default
        good = type(value) is kind or (kind is float and type(value) is int)
        if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-4 for text
            try:
                return float(value)
            except ValueError:
                good = False
        if not good:
            self.wrong.append(f"{self.name}.{key}={value!r} is no {kind.__name__}")
            return default
        return float(value) if kind is float else value

    def choice(self, key: str, choices: Mapping[str, Any], default: Any = None) -> Any:
        """Return what one of these words stands for, whatever its case."""
        if key not in self.values:
            return default
        word = str(self.values[key]).lower()
        if word not in choices:
            self.wrong.append(f"{self.name}.{key}={self.values[key]!r} is none of {list(choices)}")
        return choices.get(word, default)


@dataclasses.dataclass(frozen=True)
class FlowSettings:
    """What a flow model's `xp.cfg` says.

    Attributes:
      hidden: what no tensor tells, as `read_flow_state` takes it.
      sizes: fields of `VelocityTransformerConfig` that the tensors tell too.
      cross: whether text conditions are attended to.
      text_encoder: source of the T5 encoder; None without text.
      clip_seconds: of the clips that it was trained on.
    """

    hidden: dict[str, Any]
    sizes: dict[str, Any]
    cross: bool
    text_encoder: str | None
    clip_seconds: float

    def check(self, found: VelocityTransformerConfig, where: str) -> None:
        """Compare with what the tensors tell.

        Raises:
          JaxherdError: they contradict each other; all contradictions are listed.
        """
        told = {name: getattr(found, name) for name in self.sizes}
        told["layer_scale"] = found.layer_scale is not None
        mine = {**self.sizes, "layer_scale": self.sizes["layer_scale"] is not None}
        mine["conditioner"], told["conditioner"] = (
            self.cross,
            isinstance(found.conditioner, TextStates),
        )
        wrong = [
            f"{name} is {mine[name]!r} by its xp.cfg and {told[name]!r} by its tensors"
            for name in mine
            if mine[name] != told[name]
        ]
        if wrong:
            raise JaxherdError(f"{where} contradicts itself: {'; '.join(wrong)}.")


def flow_settings(config: XpConfig) -> FlowSettings:
    """Return the settings of a flow model.

    Keys that are absent have the defaults of the published code's constructors.

    Raises:
      JaxherdError: missing and unknown keys, and values that we do not build, all of them listed.
    """
    lm = _Section("transformer_lm", config.section("transformer_lm"))
    lm.check(_FLOW_NEEDED, _FLOW_OPTIONAL, _FLOW_FIXED, _FLOW_IGNORED)
    positions = {kind: kind for kind in ("sin", "rope", "sin_rope")}
    hidden = {
        "num_heads": lm.take("num_heads", int),
        "positional": lm.choice("positional_embedding", positions),
        "positional_scale": lm.take("positional_scale", float, 1.0),
        "add_zero_attn": lm.take("add_zero_attn", bool, False),
        "norm_first": lm.take("norm_first", bool),
    }
    scale = lm.values.get("layer_scale")
    sizes = {
        "embed_dim": lm.take("dim", int),
        "num_layers": lm.take("num_layers", int),
        "ff_multiple": lm.take("hidden_scale", int, 4),
        "bias_ff": lm.take("bias_ff", bool, True),
        "bias_attn": lm.take("bias_attn", bool, True),
        "bias_proj": lm.take("bias_proj", bool, True),
        "layer_scale": None if scale is None else lm.take("layer_scale", float),
        "qk_norm": lm.take("qk_layer_norm", bool, False),
        "qk_norm_cross": lm.take("qk_layer_norm_cross", bool, False),
        "skip_connections": ("u_shaped" if lm.take("skip_connections", bool, False) else "none"),
    }
    if "latent_dim" in lm.values:
        sizes["latent_dim"] = lm.take("latent_dim", int)
    cross, encoder = _text(config, lm)
    seconds = _Section("dataset", config.section("dataset", optional=True))
    length = seconds.take("segment_duration", float)
    if length is None or not length > 0:
        lm.wrong.append("dataset.segment_duration is missing or no length in seconds")
    if hidden["num_heads"] is not None and hidden["num_heads"] < 1:
        lm.wrong.append(f"transformer_lm.num_heads={hidden['num_heads']} is not positive")
    _raise(config.where, lm.wrong + seconds.wrong)
    return FlowSettings(hidden, sizes, cross, encoder, length or 0.0)


def _text(config: XpConfig, lm: _Section) -> tuple[bool, str | None]:
    """Return whether there is a text condition and the source of its encoder."""
    fuser = config.section("fuser", optional=True)
    crossed = list(fuser.get("cross") or [])
    others = {key: fuser[key] for key in ("sum", "prepend", "input_interpolate") if fuser.get(key)}
    if others or crossed not in ([], ["description"]):
        lm.wrong.append(f"fuser={fuser!r}, where cross=['description'] alone is built")
    cross = bool(crossed) or lm.take("cross_attention", bool, False)
    if not cross:
        return False, None
    given = config.get("conditioners.description.model")
    name = config.get("conditioners.description.t5.name")
    if given != "t5" or name not in _TEXT_ENCODERS:
        lm.wrong.append(
            f"conditioners.description is {given!r} with the name {name!r}, none of "
            f"{list(_TEXT_ENCODERS)}"
        )
    return True, _TEXT_ENCODERS.get(name) if isinstance(name, str) else None


def codec_config(config: XpConfig) -> AudioAutoencoderConfig:
    """Return the config of a codec without a quantiser.

    Raises:
      JaxherdError: missing and unknown keys, and values that we do not build, all of them listed.
    """
    outer = _Section("encodec", config.section("encodec"))
    fixed = {"autoencoder": "seanet", "quantizer": "no_quant", "renormalize": False}
    outer.check(("sample_rate", "channels"), ("causal",), fixed, ("renorm",))
    inner = _Section("seanet", config.section("seanet"))
    inner.check(_CODEC_NEEDED, _CODEC_OPTIONAL, {"disable_norm_outer_blocks": 0}, _CODEC_IGNORED)
    names = ("channels", "dimension", "n_filters", "n_residual_layers", "kernel_size",
             "last_kernel_size", "residual_kernel_size", "dilation_base", "compress", "lstm")  # fmt: skip
    fields: dict[str, Any] = {name: inner.take(name, int) for name in names}
    fields |= {name: inner.take(name, bool) for name in ("causal", "true_skip")}
    ratios = inner.values.get("ratios")
    if not isinstance(ratios, list) or not ratios or any(type(r) is not int for r in ratios):
        inner.wrong.append(f"seanet.ratios={ratios!r} is no list of whole numbers")
    else:
        fields["ratios"] = tuple(ratios)
    fields["activation"] = inner.choice("activation", _ACTIVATIONS)
    fields["norm"] = inner.choice("norm", {"weight_norm": "weight_norm", "none": "none"})
    modes = {"constant": "constant", "reflect": "reflect"}
    fields["pad_mode"] = inner.choice("pad_mode", modes)
    steep = inner.values.get("activation_params") or {}
    if not isinstance(steep, dict) or not set(steep) <= {"alpha"} or steep.get("alpha", 1) != 1:
        inner.wrong.append(f"seanet.activation_params={steep!r}, where alpha=1 alone is built")
    fields |= _ends(config, inner, fields["dimension"])
    rate = outer.take("sample_rate", int)
    for key in ("channels", "causal"):
        if key in outer.values and outer.values[key] != inner.values.get(key):
            outer.wrong.append(f"encodec.{key} is not seanet.{key}")
    _raise(config.where, outer.wrong + inner.wrong)
    try:
        return AudioAutoencoderConfig(SeanetConfig(**fields), rate)
    except ValueError as error:
        raise JaxherdError(f"{config.where}: its xp.cfg describes no codec: {error}.") from error


def _ends(config: XpConfig, inner: _Section, dimension: int | None) -> dict[str, Any]:
    """Return what `seanet.encoder` and `seanet.decoder` change, each for its half alone."""
    encoder = _Section("seanet.encoder", config.section("seanet.encoder", optional=True))
    # Mean and scale of every latent come out of an encoder without a quantiser.
    twice = {} if dimension is None else {"dimension": 2 * dimension}
    encoder.check((), (), twice, ())
    decoder = _Section("seanet.decoder", config.section("seanet.decoder", optional=True))
    more = {"final_activation_params": None}
    decoder.check((), ("trim_right_ratio", "final_activation"), more, ())
    inner.wrong += encoder.wrong
    found = {
        "trim_right_ratio": decoder.take("trim_right_ratio", float, 1.0),
        "final_activation": decoder.choice("final_activation", _FINAL),
    }
    inner.wrong += decoder.wrong
    return found


def _raise(where: str, wrong: list[str]) -> None:
    if wrong:
        raise JaxherdError(
            f"{where}: its xp.cfg does not fit: {'; '.join(wrong)}; take the files as they were "
            "published, and name a key that changes no result in jaxherd.weights.melodyflow_config."
        )
