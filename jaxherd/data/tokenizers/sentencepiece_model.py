"""SentencePiece models (`tokenizer.model`, `*.spm`)."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.cache import write_atomically
from jaxherd.data.tokenizers.base import count_token_bytes, join_bytes, split_special


class SentencePieceTokenizer:
    """A SentencePiece model from its serialised bytes."""

    chat_template: str | None = None

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError as error:
            raise missing_extra("sentencepiece", "text", "A SentencePiece tokenizer") from error
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises RuntimeError or SystemError
            raise JaxherdError("The SentencePiece model cannot be parsed: is it whole?") from error
        self._model = model
        self.vocab_size = self._engine.vocab_size()

        def known(i: int) -> int | None:
            return i if i >= 0 else None

        self.bos_id = known(self._engine.bos_id())
        self.eos_id = known(self._engine.eos_id())
        self.pad_id = known(self._engine.pad_id())
        self.stop_ids = () if self.eos_id is None else (self.eos_id,)
        self.strips_leading_space = self._engine.encode("a", out_type=str)[0].startswith("▁")

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, normalised as the model says."""
        if add_bos and self.bos_id is None:
            raise JaxherdError("This tokenizer has no beginning-of-text token: drop add_bos.")
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        for part in split_special(text, self.special_tokens()) if parse_special else [text]:
            ids.extend([part] if isinstance(part, int) else self._engine.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text, on the library's threads."""
        return self._engine.encode(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        return join_bytes(self, ids, skip_special=skip_special)

    def id_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one piece, with U+2581 as a space."""
        engine = self._engine
        if engine.is_control(token_id) or engine.is_unused(token_id):
            return b""
        if engine.is_unknown(token_id):
            return " ⁇ ".encode()  # SentencePiece's own surface for the unknown piece
        piece = engine.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if engine.is_byte(token_id) else _surface(piece)

    def special_tokens(self) -> dict[str, int]:
        """Return the control pieces by name."""
        ids = (i for i in range(self.vocab_size) if self._engine.is_control(i))
        return {self._engine.id_to_piece(i): i for i in ids}

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """Return the number of UTF-8 bytes of each piece; 0 for control and unknown pieces."""
        counts = count_token_bytes(self)
        unknown = self._engine.unk_id()
        if unknown >= 0:
            counts[unknown] = 0  # it stands for text of unknown length
        return counts

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.model."""
        write_atomically(pathlib.Path(folder) / "tokenizer.model", self._model)

    def fingerprint(self) -> str:
        """Return a hash of the model."""
        return "spm-" + hashlib.sha256(self._model).hexdigest()[:32]


def _surface(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()
