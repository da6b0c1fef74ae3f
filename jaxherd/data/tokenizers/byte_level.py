"""The tokenizer that needs no training and no package: one token per UTF-8 byte."""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from jaxherd.data.cache import write_atomically
from jaxherd.data.tokenizers.base import KIND_FILE, count_token_bytes, join_bytes, split_special


class ByteTokenizer:
    """Ids 0..255 are bytes; 256, 257 and 258 are padding, beginning and end of text."""

    vocab_size = 259
    pad_id: int | None = 256
    bos_id: int | None = 257
    eos_id: int | None = 258
    stop_ids: tuple[int, ...] = (258,)
    chat_template: str | None = None
    strips_leading_space = False

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Return the bytes of `text` in UTF-8."""
        ids = [257] if add_bos else []
        for part in split_special(text, self.special_tokens()) if parse_special else [text]:
            ids.extend([part] if isinstance(part, int) else part.encode("utf-8"))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        return join_bytes(self, ids, skip_special=skip_special)

    def id_bytes(self, token_id: int) -> bytes:
        """Return the byte, or nothing for a special token."""
        return bytes([token_id]) if token_id < 256 else b""

    def special_tokens(self) -> dict[str, int]:
        """Return the three control tokens."""
        return {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258}

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """Return 1 for each byte and 0 for special tokens."""
        return count_token_bytes(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the one file that names the kind."""
        write_atomically(pathlib.Path(folder) / KIND_FILE, json.dumps({"kind": "bytes"}) + "\n")

    def fingerprint(self) -> str:
        """Return a constant: there is nothing to vary."""
        return "bytes-1"
