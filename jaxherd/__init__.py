"""jaxherd: ten research systems on one JAX stack.

The public names load what they need when first used, so that `import jaxherd` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "load": "jaxherd.weights.load",
    "save": "jaxherd.weights.save",
    "load_tokenizer": "jaxherd.weights.load",
    "generate": "jaxherd.inference.generate",
    "JaxherdError": "jaxherd.core.errors",
}
_SUBPACKAGES = ("core", "kernels", "data", "training", "claims", "layers", "planning", "models",
                "weights", "inference", "methods", "judge")  # fmt: skip

__all__ = [*_PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jaxherd.core.errors import JaxherdError as JaxherdError
    from jaxherd.inference.generate import generate as generate
    from jaxherd.weights.load import load as load
    from jaxherd.weights.load import load_tokenizer as load_tokenizer
    from jaxherd.weights.save import save as save


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"jaxherd.{name}")
    raise AttributeError(f"module 'jaxherd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_SUBPACKAGES])
