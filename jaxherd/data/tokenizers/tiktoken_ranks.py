"""tiktoken rank files: lines of base64 bytes and a rank, as Meta ships `tokenizer.model`."""

import base64
import binascii
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.cache import write_atomically
from jaxherd.data.tokenizers.base import (
    KIND_FILE,
    count_token_bytes,
    join_bytes,
    split_special,
)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# How text is cut before merging; a rank file does not say, so that the caller must.
SPLIT_PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-3": _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES,
    "llama-4": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
}


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Parse a rank file; raises JaxherdError naming the first bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise JaxherdError(f"Line {number} of the tiktoken rank file is malformed.") from error
    if not ranks:
        raise JaxherdError("The tiktoken rank file is empty.")
    return ranks


def pieces(text: str, longest_piece: int, longest_run: int) -> Iterator[str]:
    """Cut a text so that tiktoken can take it; the pieces joined are the text.

    First every `longest_piece` characters; then, within such a piece, a run of white space or of
    anything else is cut after every `longest_run` characters (tiktoken's time is quadratic in the
    length of a run, and at some length it gives up).
    """
    for begin in range(0, len(text), longest_piece):
        piece, cut = text[begin : begin + longest_piece], 0
        runs = re.finditer(r"\s+|\S+", piece) if len(piece) > longest_run else ()
        for run in runs:
            for at in range(run.start() + longest_run, run.end(), longest_run):
                yield piece[cut:at]
                cut = at
        yield piece[cut:]


class TiktokenTokenizer:
    """A rank file with its split pattern and special tokens.

    Args:
        ranks: the content of the rank file.
        split_pattern: a regular expression, or a key of SPLIT_PATTERNS.
        special_tokens: name -> id, beyond the ranks.
        bos, eos, pad: which of these play a part.
        stop: further names that end a generation.
        chat_format: of the model's chats, if it has one of its own (see `jaxherd.data.chat`).
        longest_piece, longest_run: of `pieces`; None encodes a text whole.
    """

    chat_template: str | None = None
    strips_leading_space = False

    def __init__(
        self,
        ranks: bytes,
        *,
        split_pattern: str,
        special_tokens: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        stop: Sequence[str] = (),
        chat_format: str | None = None,
        longest_piece: int | None = None,
        longest_run: int | None = None,
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise missing_extra("tiktoken", "text", "A tiktoken tokenizer") from error
        self._file = ranks
        self._special = dict(special_tokens or {})
        self._roles = {"bos": bos, "eos": eos, "pad": pad}
        self._stop = tuple(stop)
        self.chat_format = chat_format
        self._limits = {"longest_piece": longest_piece, "longest_run": longest_run}
        if (longest_piece is None) != (longest_run is None):
            raise JaxherdError("longest_piece and longest_run come together: give both or neither.")
        self._pattern = SPLIT_PATTERNS.get(split_pattern, split_pattern)
        for name in (bos, eos, pad, *stop):
            if name is not None and name not in self._special:
                raise JaxherdError(f"{name!r} is not among the tokenizer's special tokens.")
        table = parse_ranks(ranks)
        clash = set(table.values()) & set(self._special.values())
        if clash:
            raise JaxherdError(f"Special token id {min(clash)} is already a rank of the file.")
        self._bytes = {rank: token for token, rank in table.items()}
        self._engine = tiktoken.Encoding(
            name="jaxherd",
            pat_str=self._pattern,
            mergeable_ranks=table,
            special_tokens=self._special,
        )
        self.vocab_size = max([*self._bytes, *self._special.values()]) + 1
        ids = [self._special.get(name) if name else None for name in (bos, eos, pad)]
        self.bos_id, self.eos_id, self.pad_id = ids
        self.adds_bos = self.bos_id is not None
        stops = [self.eos_id, *(self._special[name] for name in stop)]
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i is not None))

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`."""
        if add_bos and self.bos_id is None:
            raise JaxherdError("This tokenizer has no beginning-of-text token: drop add_bos.")
        parts = split_special(text, self._special) if parse_special else [text]
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                for piece in self._pieces(part):
                    ids += self._engine.encode_ordinary(piece)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text, on the library's threads."""
        cut = [list(self._pieces(text)) for text in texts]
        threads = os.cpu_count() or 1
        coded = iter(
            self._engine.encode_ordinary_batch([p for ps in cut for p in ps], num_threads=threads)
        )
        return [[i for _ in ps for i in next(coded)] for ps in cut]

    def _pieces(self, text: str) -> Iterable[str]:
        longest, run = self._limits["longest_piece"], self._limits["longest_run"]
        return [text] if longest is None or run is None else pieces(text, longest, run)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        return join_bytes(self, ids, skip_special=skip_special)

    def id_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one rank; empty for special tokens."""
        return self._bytes.get(token_id, b"")

    def special_tokens(self) -> dict[str, int]:
        """Return the control tokens by name."""
        return dict(self._special)

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """Return the number of bytes of each token; 0 for special tokens."""
        return count_token_bytes(self)

    def _settings(self) -> dict[str, object]:
        # What is not given is left out, so that fingerprints of other tokenizers stay.
        more = {"chat_format": self.chat_format, **self._limits}
        return {
            "kind": "tiktoken",
            "split_pattern": self._pattern,
            "special_tokens": self._special,
            "stop": list(self._stop),
            **self._roles,
            **{name: value for name, value in more.items() if value is not None},
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the rank file and the settings it lacks."""
        folder = pathlib.Path(folder)
        write_atomically(folder / "tokenizer.tiktoken", self._file)
        write_atomically(folder / KIND_FILE, json.dumps(self._settings(), indent=2) + "\n")

    def fingerprint(self) -> str:
        """Return a hash of ranks and settings."""
        settings = json.dumps(self._settings(), sort_keys=True).encode()
        return "tiktoken-" + hashlib.sha256(settings + self._file).hexdigest()[:32]
