"""Which tensor of a checkpoint goes where in our tree: one table an architecture.

The tables serve import, export and tests alike.  A rule ties one of our variables to one tensor
(or a part of it) and says how their layouts differ; layers and experts are filled in from the
model's config.

Layouts: a Linear of the other side is [out, in] and ours [in, out]; Llama 4's fused experts are
[expert, in, out] on both sides, gate before up on the last axis; `rotary` rows are in the
interleaved order there and in halves here (`jaxherd.layers.rope`).  The interleaved order is
undone in every layer, also in those without RoPE, where permuting queries and keys alike leaves
the scores as they are: export is then the exact inverse whatever the layer.

Source: llama4.md section 6.
"""

import dataclasses
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.rope import half_to_interleaved, interleaved_to_half
from jaxherd.models.periods import stacked_layers


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our variables and the tensor that holds it.

    Attributes:
      ours: path inside a block, or of the whole model for what is outside the layers.
      theirs: name of the tensor; `{i}` is the layer and `{e}` the expert.
      transpose: the last two axes are swapped.
      rotary: rows (axis 0 of theirs) are heads in the interleaved order.
      part: (which, of how many) equal parts of the tensor's last axis.
    """

    ours: str
    theirs: str
    transpose: bool = False
    rotary: bool = False
    part: tuple[int, int] | None = None

    def to_ours(self, tensor: np.ndarray, head_dim: int) -> np.ndarray:
        """Return (a view of) the tensor in our layout."""
        if self.part is not None:
            which, count = self.part
            width = tensor.shape[-1] // count
            tensor = tensor[..., which * width : (which + 1) * width]
        if self.rotary:
            tensor = interleaved_to_half(tensor, head_dim)
        return tensor.swapaxes(-1, -2) if self.transpose else tensor

    def to_theirs(self, value: np.ndarray, head_dim: int) -> np.ndarray:
        """Invert `to_ours`, except that parts are not joined."""
        value = value.swapaxes(-1, -2) if self.transpose else value
        return half_to_interleaved(value, head_dim) if self.rotary else value

    def scales_to_ours(self, scales: np.ndarray, head_dim: int) -> np.ndarray:
        """Return the scales [..., B, N] of a matrix [..., K, N] in our layout.

        Those of a Linear stand beside its outputs, [out, B]; those of fused experts come as
        [expert, 1, out], and of their way down also as [expert, out, 1].
        """
        if not self.transpose and scales.shape[-1] == 1:
            scales = scales.swapaxes(-1, -2)
        return self.to_ours(scales, head_dim)

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor whose value has our shape."""
        if self.transpose:
            ours = (*ours[:-2], ours[-1], ours[-2])
        if self.part is not None:
            ours = (*ours[:-1], ours[-1] * self.part[1])
        return ours


def _linear(ours: str, theirs: str, rotary: bool = False) -> tuple[Rule, Rule]:
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", transpose=True, rotary=rotary),
        Rule(f"{ours}/bias", f"{theirs}.bias", rotary=rotary),
    )


def _layer_norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _hf_attention(rotary: bool) -> tuple[Rule, ...]:
    prefix = "model.layers.{i}."
    return (
        Rule("embedding/table", "model.embed_tokens.weight"),
        Rule("final_norm/scale", "model.norm.weight"),
        Rule("unembedding/kernel", "lm_head.weight", transpose=True),
        Rule("attention_norm/scale", prefix + "input_layernorm.weight"),
        Rule("feed_forward_norm/scale", prefix + "post_attention_layernorm.weight"),
        *_linear("attention/q_proj", prefix + "self_attn.q_proj", rotary),
        *_linear("attention/k_proj", prefix + "self_attn.k_proj", rotary),
        *_linear("attention/v_proj", prefix + "self_attn.v_proj"),
        *_linear("attention/o_proj", prefix + "self_attn.o_proj"),
    )


def _gated(ours: str, theirs: str) -> tuple[Rule, ...]:
    pairs = ("gate", "up", "down")
    return tuple(r for n in pairs for r in _linear(f"{ours}/{n}", f"{theirs}.{n}_proj"))


_LLAMA4_FFN = "model.layers.{i}.feed_forward"
_LLAMA4_EXPERT = _LLAMA4_FFN + ".experts.{e}."

# Of several rules for one variable the first whose tensors exist is read; export uses the first.
TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": (*_hf_attention(rotary=False), *_gated("feed_forward", "model.layers.{i}.mlp")),
    "llama4_text": (
        *_hf_attention(rotary=True),
        *_gated("feed_forward", _LLAMA4_FFN),
        *_gated("feed_forward/shared", _LLAMA4_FFN + ".shared_expert"),
        Rule("feed_forward/router", _LLAMA4_FFN + ".router.weight", transpose=True),
        Rule("feed_forward/gate", _LLAMA4_FFN + ".experts.gate_up_proj", part=(0, 2)),
        Rule("feed_forward/up", _LLAMA4_FFN + ".experts.gate_up_proj", part=(1, 2)),
        Rule("feed_forward/down", _LLAMA4_FFN + ".experts.down_proj"),
        Rule("feed_forward/gate", _LLAMA4_EXPERT + "gate_proj.weight", transpose=True),
        Rule("feed_forward/up", _LLAMA4_EXPERT + "up_proj.weight", transpose=True),
        Rule("feed_forward/down", _LLAMA4_EXPERT + "down_proj.weight", transpose=True),
    ),
    # llama.cpp stores the q and k rows of this architecture interleaved.
    "gguf_llama": (
        Rule("embedding/table", "token_embd.weight"),
        Rule("final_norm/scale", "output_norm.weight"),
        Rule("unembedding/kernel", "output.weight", transpose=True),
        Rule("attention_norm/scale", "blk.{i}.attn_norm.weight"),
        Rule("feed_forward_norm/scale", "blk.{i}.ffn_norm.weight"),
        *_linear("attention/q_proj", "blk.{i}.attn_q", rotary=True),
        *_linear("attention/k_proj", "blk.{i}.attn_k", rotary=True),
        *_linear("attention/v_proj", "blk.{i}.attn_v"),
        *_linear("attention/o_proj", "blk.{i}.attn_output"),
        *_linear("feed_forward/gate", "blk.{i}.ffn_gate"),
        *_linear("feed_forward/up", "blk.{i}.ffn_up"),
        *_linear("feed_forward/down", "blk.{i}.ffn_down"),
    ),
}
_T5 = "encoder.block.{i}.layer."
TABLES["t5"] = (
    Rule("embedding/table", "shared.weight"),
    Rule("relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    Rule("final_norm/scale", "encoder.final_layer_norm.weight"),
    Rule("attention_norm/scale", _T5 + "0.layer_norm.weight"),
    Rule("feed_forward_norm/scale", _T5 + "1.layer_norm.weight"),
    *(r for n in "qkvo" for r in _linear(f"{n}_proj", f"{_T5}0.SelfAttention.{n}")),
    *_linear("gate", _T5 + "1.DenseReluDense.wi_0"),
    # Version 1.1 names its gate and its other half, version 1.0 has one matrix.
    *_linear("up", _T5 + "1.DenseReluDense.wi_1"),
    *_linear("down", _T5 + "1.DenseReluDense.wo"),
)
TABLES["t5_relu"] = tuple(
    dataclasses.replace(r, theirs=r.theirs.replace("wi_1", "wi")) for r in TABLES["t5"]
)
_VISION = "vision_model."
_VISION_LAYER = _VISION + "model.layers.{i}."
# Ours has the tower and its projection beside the text part; theirs, each under its own prefix.
TABLES["llama4"] = (
    *(dataclasses.replace(r, theirs="language_model." + r.theirs) for r in TABLES["llama4_text"]),
    *_linear("vision/patches", _VISION + "patch_embedding.linear"),
    Rule("vision/class_token", _VISION + "class_embedding"),
    Rule("vision/positions", _VISION + "positional_embedding_vlm"),
    *_layer_norm("vision/norm_pre", _VISION + "layernorm_pre"),
    *_layer_norm("vision/norm_post", _VISION + "layernorm_post"),
    *_layer_norm("vision/attention_norm", _VISION_LAYER + "input_layernorm"),
    *_layer_norm("vision/feed_forward_norm", _VISION_LAYER + "post_attention_layernorm"),
    *_linear("vision/attention/q_proj", _VISION_LAYER + "self_attn.q_proj", rotary=True),
    *_linear("vision/attention/k_proj", _VISION_LAYER + "self_attn.k_proj", rotary=True),
    *_linear("vision/attention/v_proj", _VISION_LAYER + "self_attn.v_proj"),
    *_linear("vision/attention/o_proj", _VISION_LAYER + "self_attn.o_proj"),
    *_linear("vision/up", _VISION_LAYER + "mlp.fc1"),
    *_linear("vision/down", _VISION_LAYER + "mlp.fc2"),
    *_linear("vision/adapter/up", _VISION + "vision_adapter.mlp.fc1"),
    *_linear("vision/adapter/down", _VISION + "vision_adapter.mlp.fc2"),
    *_linear("projection", "multi_modal_projector.linear_1"),
)
# The blocks of MobileLLM are stored once and named as in Llama; sharing is in the config.
TABLES["mobilellm"] = TABLES["llama"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """One tensor (or a part) and the slot of one of our variables that it fills.

    Attributes:
      name, shape: the tensor of the checkpoint.
      path: our variable; `index` its leading indices (repetition, and expert if split).
      rule: the layouts.
      head_dim: of the layer, for `rotary` rules.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    rule: Rule
    head_dim: int = 0


def place(
    config: Any,
    shapes: dict[str, tuple[int, ...]],
    architecture: str,
    present: Container[str] | None = None,
) -> list[Placement]:
    """Return where everything is, for every variable in `shapes` (path -> shape).

    Args:
      config: the model.
      shapes: of our variables, `segments/<s>/<block>/...` with the repetition as first axis, or
        `layers/...` (also inside of a part, `vision/layers/...`) with the layer, for stacks whose
        layers are all of one kind.
      architecture: a key of `TABLES`.
      present: the tensors that exist; decides between alternative names on import.
    Raises:
      JaxherdError: the table has no place for a variable.
    """
    rules: dict[str, list[Rule]] = {}
    for rule in TABLES[architecture]:
        rules.setdefault(rule.ours, []).append(rule)
    found = []
    for path, shape in shapes.items():
        if path.startswith("segments/"):
            inside = path.split("/", 3)[3]
        else:
            inside = _in_stack(path)[1]
        if inside not in rules:
            raise JaxherdError(
                f"{architecture} checkpoints have no place for {inside!r}: use format='jaxherd'."
            )
        for options in _slots(config, path, shape, rules[inside]):
            chosen = options[0]
            if present is not None:
                chosen = next((o for o in options if o[0].name in present), chosen)
            found.extend(chosen)
    return found


def _in_stack(path: str) -> tuple[bool, str]:
    """Return whether a variable is stacked over the layers of one kind, and its path without them."""
    part, found, rest = path.rpartition("layers/")
    return bool(found), part + rest


def _slots(
    config: Any, path: str, shape: tuple[int, ...], rules: list[Rule]
) -> Iterator[list[list[Placement]]]:
    """Yield, for every layer of a variable, the alternative lists of placements."""
    if _in_stack(path)[0]:
        head_dim = config.vision.attention.head_dim if path.startswith("vision/") else 0
        for i in range(shape[0]):
            names = [(r.theirs.format(i=i), r.their_shape(shape[1:]), r) for r in rules]
            yield [[Placement(name, theirs, path, (i,), r, head_dim)] for name, theirs, r in names]
        return
    if not path.startswith("segments/"):
        yield [[Placement(r.theirs, r.their_shape(shape), path, (), r)] for r in rules]
        return
    _, number, run, _ = path.split("/", 3)
    segments = config.segments()
    head_dim = segments[int(number)].runs[int(run)].layer.attention.head_dim
    for place, layer in enumerate(stacked_layers(segments, int(number), int(run))):
        options = []
        for rule in rules:
            if "{e}" not in rule.theirs:
                name, theirs = rule.theirs.format(i=layer), rule.their_shape(shape[1:])
                options.append([Placement(name, theirs, path, (place,), rule, head_dim)])
                continue
            theirs = rule.their_shape(shape[2:])
            options.append(
                [
                    Placement(rule.theirs.format(i=layer, e=e), theirs, path, (place, e), rule)
                    for e in range(shape[1])
                ]
            )
        yield options
