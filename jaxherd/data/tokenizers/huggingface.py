"""Tokenizers in the `tokenizer.json` format of the `tokenizers` library."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.data.cache import write_atomically
from jaxherd.data.tokenizers.base import count_token_bytes


def require_tokenizers() -> Any:
    """Import the optional `tokenizers` package."""
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", "text", "A tokenizer.json tokenizer") from error
    return tokenizers


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte, as character -> byte.

    Bytes that are printable in Latin-1 stand for themselves; the others take U+0100 onwards.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return alphabet


class HuggingFaceTokenizer:
    """A `tokenizer.json` with its special tokens and chat template.

    Args:
        text: the JSON text of tokenizer.json.
        bos, eos, pad: the special tokens by name, or None.
        stop: further tokens that end a generation, by name or id.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        text: str,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        stop: Sequence[str | int] = (),
        chat_template: str | None = None,
    ):
        library = require_tokenizers()
        try:
            self._plain = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise JaxherdError(f"The tokenizer.json cannot be read: {error}.") from error
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True
        self._text = text
        self._names = {"bos": bos, "eos": eos, "pad": pad}
        self.chat_template = chat_template
        self.vocab_size = self._vocab_size()
        self.bos_id, self.eos_id, self.pad_id = (self._id(name) for name in (bos, eos, pad))
        stops = [self.eos_id, *(s if isinstance(s, int) else self._id(s) for s in stop)]
        self.stop_ids = tuple(dict.fromkeys(s for s in stops if s is not None))
        data = json.loads(text)
        self._style = _decoder_style(data.get("decoder"), data.get("model"))
        self.strips_leading_space = _strips(data.get("decoder"))
        added = self._plain.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        self._special_ids = frozenset(self._special.values())

    def _vocab_size(self) -> int:
        # Ids may have gaps, so that the count of entries can be below the highest id.
        return max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _id(self, name: str | None) -> int | None:
        if name is None:
            return None
        found = self._plain.token_to_id(name)
        if found is None:
            raise JaxherdError(f"The tokenizer has no token {name!r}, which its config names.")
        return found

    @functools.cached_property
    def _parsing(self) -> Any:
        # A second object, since the switch is a property of the object and threads share it.
        parsing = require_tokenizers().Tokenizer.from_str(self._text)
        parsing.no_padding()
        parsing.no_truncation()
        return parsing

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`; the library's own templates (automatic BOS) are not applied."""
        engine = self._parsing if parse_special else self._plain
        ids = engine.encode(text, add_special_tokens=False).ids
        return [self._bos(), *ids] if add_bos else ids

    def _bos(self) -> int:
        if self.bos_id is None:
            raise JaxherdError("This tokenizer has no beginning-of-text token: drop add_bos.")
        return self.bos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text, on the library's threads."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        ids = [int(i) for i in ids]
        if self._style == "byte_level":
            data = b"".join(
                self._added[i].encode()
                if i in self._special_ids and not skip_special
                else self.id_bytes(i)
                for i in ids
            )
            return data.decode("utf-8", errors="replace")
        return self._plain.decode(ids, skip_special_tokens=skip_special)

    def id_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token.

        Exact for byte-level and SentencePiece-style vocabularies; for others (WordPiece) it is the
        text of the token decoded alone.
        """
        if token_id in self._special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._plain.id_to_token(token_id)
        if piece is None:
            return b""
        if self._style == "byte_level":
            alphabet = byte_level_alphabet()
            return bytes(alphabet[char] for char in piece if char in alphabet)
        if self._style == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        return self._plain.decode([token_id]).encode()

    def special_tokens(self) -> dict[str, int]:
        """Return the control tokens by name."""
        return dict(self._special)

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """Return the number of UTF-8 bytes of each token; 0 for special tokens."""
        return count_token_bytes(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, as other libraries read them."""
        folder = pathlib.Path(folder)
        write_atomically(folder / "tokenizer.json", self._text)
        config: dict[str, Any] = {
            f"{role}_token": name for role, name in self._names.items() if name is not None
        }
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["jaxherd_stop_ids"] = list(self.stop_ids)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_atomically(
            folder / "tokenizer_config.json",
            json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        )

    def fingerprint(self) -> str:
        """Return a hash of tokenizer.json and the special tokens."""
        names = json.dumps(self._names, sort_keys=True)
        return "hf-" + hashlib.sha256((names + self._text).encode()).hexdigest()[:32]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HuggingFaceTokenizer":
        """Read a tokenizer.json and, beside it, config, chat template and stop tokens."""
        path = pathlib.Path(path)
        folder = path.parent
        config = {**_read_json(folder / "special_tokens_map.json")}
        config.update(_read_json(folder / "tokenizer_config.json"))
        template = config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default") or next(iter(named.values()), None)
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        stop = _read_json(folder / "generation_config.json").get("eos_token_id") or []
        stop = [*config.get("jaxherd_stop_ids", []), *(stop if isinstance(stop, list) else [stop])]
        return cls(
            _read_text(path),
            bos=_token_name(config.get("bos_token")),
            eos=_token_name(config.get("eos_token")),
            pad=_token_name(config.get("pad_token")),
            stop=stop,
            chat_template=template,
        )


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JaxherdError(f"Cannot read {str(path)!r}: {error}.") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise JaxherdError(f"{str(path)!r} is not valid JSON: {error}.") from error
    return data if isinstance(data, dict) else {}


def _token_name(value: str | Mapping[str, Any] | None) -> str | None:
    return value.get("content") if isinstance(value, Mapping) else value


def _decoders(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder.get("decoders", [])) if decoder["type"] == "Sequence" else [decoder]


def _decoder_style(decoder: Mapping[str, Any] | None, model: Mapping[str, Any] | None) -> str:
    kinds = {one["type"] for one in _decoders(decoder)}
    if "ByteLevel" in kinds:
        return "byte_level"
    if kinds & {"ByteFallback", "Metaspace"} or (model or {}).get("byte_fallback"):
        return "sentencepiece"
    return "text"


def _strips(decoder: Mapping[str, Any] | None) -> bool:
    for one in _decoders(decoder):
        if one["type"] == "Metaspace" and one.get("prepend_scheme", "always") != "never":
            return True
        if one["type"] == "Strip" and one.get("content") == " " and one.get("start", 0) > 0:
            return True
    return False
