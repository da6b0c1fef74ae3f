"""Rank files for the tests: Meta's, if the user has it, and made-up ones."""

import base64
import json
import os
import pathlib

import pytest

from jaxherd.data.tokenizers.llama4 import installed_ranks

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "llama4_chat.json").read_text(encoding="utf-8")
)


def real_ranks() -> bytes:
    """Return Meta's rank file, or skip."""
    path = os.environ.get("JAXHERD_LLAMA4_TOKENIZER") or installed_ranks()
    if path is None:
        pytest.skip(
            "needs Meta's tokenizer.model, which jaxherd does not ship: pip install "
            "llama-models==0.3.0, or set JAXHERD_LLAMA4_TOKENIZER to the file"
        )
    return pathlib.Path(path).read_bytes()


def made_up(more: tuple[bytes, ...] = (b"th", b"the", b" the", b"\n\n", b"  ")) -> bytes:
    """Return a rank file of all bytes and a few longer tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), *more]
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def made_up_of_full_size() -> bytes:
    """Return a rank file with as many ranks as Llama 4's, which is made of digits."""
    return made_up(tuple(b"%06d" % n for n in range(200_000 - 256)))
