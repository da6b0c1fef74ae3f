"""In which format the operands of a model's matrix products are rounded, for code traced inside."""

import contextlib
import contextvars
from collections.abc import Iterator

from jaxherd.core.errors import JaxherdError, nearest

FORMATS = ("plain", "fp8")
_format: contextvars.ContextVar[str] = contextvars.ContextVar("matmul_format", default="plain")


@contextlib.contextmanager
def matmul_format(name: str) -> Iterator[None]:
    """Let products of layers that are traced inside use a format.

    Args:
      name: "plain", the operands' own dtype; "fp8", see `jaxherd.layers.fp8`.
    Raises:
      JaxherdError: there is no such format.
    """
    if name not in FORMATS:
        raise JaxherdError(f"no matmul format {name!r}; {nearest(name, FORMATS)}")
    token = _format.set(name)
    try:
        yield
    finally:
        _format.reset(token)


def active_format() -> str:
    """Return the format for products that are traced here."""
    return _format.get()
