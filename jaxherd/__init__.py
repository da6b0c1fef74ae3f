"""jaxherd: research systems on one JAX stack.

`load`, `save` and `generate` are found on first use, so that importing the package stays quick.
"""

import importlib
from typing import Any

__all__ = ["generate", "load", "load_tokenizer", "save"]

_LAZY = {
    "load": "jaxherd.weights.load",
    "load_tokenizer": "jaxherd.weights.load",
    "save": "jaxherd.weights.save",
    "generate": "jaxherd.inference.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxherd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
