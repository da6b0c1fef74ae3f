"""RoPE settings in the words of a `config.json`, old style and new, and back.

Old: `rope_theta` and `rope_scaling` at the top level, with `type` or `rope_type`.
New: one `rope_parameters` object that holds `rope_theta` and `rope_type`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.layers.rope import RopeConfig, RopeScaling

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

# Which fields of `RopeScaling` each kind reads; the others are kept at their defaults.
_RELEVANT = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_length", "context_length"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
    "longrope": (
        "factor",
        "original_length",
        "short_factor",
        "long_factor",
        "attention_factor",
        "context_length",
    ),
}


def read_rope(config: Mapping[str, Any], *, max_length: int, default_theta: float) -> RopeConfig:
    """Return the RoPE settings of a `config.json`.

    Raises:
      JaxherdError: an unknown scaling, a missing number, or settings that differ by layer type.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise JaxherdError(
            "config.json: RoPE settings that differ by layer type are not supported."
        )
    theta = float(given.get("rope_theta") or config.get("rope_theta") or default_theta)
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise JaxherdError(
            f"config.json: partial_rotary_factor {partial} is not part of this architecture."
        )
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "su":  # longrope's first name
        kind = "longrope"
    if kind not in KINDS:
        raise JaxherdError(
            f"config.json: RoPE scaling {kind!r} is unknown; " + nearest(kind, KINDS)
        )
    if kind == "default":
        return RopeConfig(theta)
    original = config.get("original_max_position_embeddings") or given.get(
        "original_max_position_embeddings", max_length
    )
    if kind == "dynamic":
        # Published dynamic scaling grows from the model's own maximum.
        original = max_length
    factor = given.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_length / original
    values: dict[str, Any] = {"factor": factor, "original_length": int(original)}
    names = ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim")
    values |= {name: given.get(name) for name in names}
    values |= {
        "beta_fast": given.get("beta_fast") or 32.0,
        "beta_slow": given.get("beta_slow") or 1.0,
    }
    values["truncate"] = bool(given.get("truncate", True))
    for name in ("short_factor", "long_factor"):
        values[name] = tuple(float(x) for x in given.get(name) or ())
    present = {name: values[name] for name in _RELEVANT[kind] if name != "context_length"}
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    absent = [
        name for name, value in present.items() if value in (None, ()) and name not in optional
    ]
    if absent:
        raise JaxherdError(f"config.json: RoPE scaling {kind!r} lacks {', '.join(absent)}.")
    numbers = ("original_length", "truncate", "short_factor", "long_factor")
    used: dict[str, Any] = {
        k: v if k in numbers or v is None else float(v) for k, v in present.items()
    }
    return RopeConfig(theta, RopeScaling(kind, **used))


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Return the entries of a `config.json`: the old style, which old and new readers know."""
    entries: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.scaling is not None:
        scaling = rope.scaling
        written: dict[str, Any] = {"rope_type": scaling.kind}
        for name in _RELEVANT[scaling.kind]:
            value = getattr(scaling, name)
            if name == "context_length" or value is None:
                continue
            if name == "original_length":
                if scaling.kind == "dynamic":
                    continue
                name = "original_max_position_embeddings"
            written[name] = list(value) if isinstance(value, tuple) else value
        entries["rope_scaling"] = written
    return entries


def plain_rope(rope: RopeConfig | None) -> RopeConfig | None:
    """Return the settings without what a `config.json` has no word for (unused fields)."""
    if rope is None or rope.scaling is None:
        return rope
    kept = {name: getattr(rope.scaling, name) for name in _RELEVANT[rope.scaling.kind]}
    kept.pop("context_length", None)
    return dataclasses.replace(rope, scaling=RopeScaling(rope.scaling.kind, **kept))
