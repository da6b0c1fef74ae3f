"""What a tokenizer is to jaxherd, and text from a stream of tokens."""

import codecs
import os
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

# The file that names the kind of a tokenizer folder written by jaxherd.
KIND_FILE = "jaxherd_tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Strings that look like special tokens stay text unless `parse_special` is set, so that a
    document or a user's message cannot forge a control token.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None
    # SentencePiece's dummy prefix: the first token's leading space is no part of the text.
    strips_leading_space: bool

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text, in parallel where the library can."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ...

    def id_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for; empty for special tokens."""
        ...

    def special_tokens(self) -> dict[str, int]:
        """Return the control tokens by their text."""
        ...

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """Return the number of UTF-8 bytes of each token; 0 for special tokens."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `load_tokenizer(folder)` makes the same tokenizer."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the ids."""
        ...


def count_token_bytes(tokenizer: Tokenizer) -> Int32[np.ndarray, " V"]:
    """Return the length of `id_bytes` for the whole vocabulary."""
    lengths = (len(tokenizer.id_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    return np.fromiter(lengths, np.int32, tokenizer.vocab_size)


def join_bytes(tokenizer: Tokenizer, ids: Iterable[int], *, skip_special: bool) -> str:
    """Decode by joining `id_bytes`; special tokens appear by name unless skipped."""
    names = {} if skip_special else {i: name for name, i in tokenizer.special_tokens().items()}
    data = b"".join(
        names[i].encode() if i in names else tokenizer.id_bytes(i) for i in map(int, ids)
    )
    text = data.decode("utf-8", errors="replace")
    return text.removeprefix(" ") if tokenizer.strips_leading_space else text


def split_special(text: str, special: dict[str, int]) -> list[str | int]:
    """Split `text` at control tokens, longest name first: pieces of text and ids in order."""
    import re

    if not special:
        return [text]
    names = sorted(special, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [special.get(part, part) for part in parts if part]


class DecodeStream:
    """Incremental decoding that never emits half a UTF-8 character.

    `push(id)` returns the text that became certain, perhaps empty; `finish()` the rest.  The
    pieces joined equal `tokenizer.decode(all ids)`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """Add one token and return the text that is now complete."""
        return self._emit(self._decoder.decode(self._tokenizer.id_bytes(int(token_id))))

    def finish(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterable[str]:
    """Yield non-empty pieces of text as tokens arrive."""
    stream = DecodeStream(tokenizer)
    for token_id in ids:
        if piece := stream.push(token_id):
            yield piece
    if piece := stream.finish():
        yield piece
