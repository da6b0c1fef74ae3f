"""Tokenizers: bytes, tokenizer.json, SentencePiece, tiktoken ranks, GGUF; and training a BPE."""

import json
import os
import pathlib
from collections.abc import Mapping

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.gguf_file import GgufStore
from jaxherd.data.tokenizers.base import KIND_FILE, DecodeStream, Tokenizer, decode_stream
from jaxherd.data.tokenizers.byte_level import ByteTokenizer
from jaxherd.data.tokenizers.from_gguf import tokenizer_from_gguf_metadata
from jaxherd.data.tokenizers.huggingface import HuggingFaceTokenizer
from jaxherd.data.tokenizers.llama4 import INSTALLED, is_llama4, llama4_tokenizer, load_installed
from jaxherd.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from jaxherd.data.tokenizers.tiktoken_ranks import SPLIT_PATTERNS, TiktokenTokenizer, parse_ranks
from jaxherd.data.tokenizers.training import train_bpe

__all__ = [
    "SPLIT_PATTERNS",
    "ByteTokenizer",
    "DecodeStream",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "decode_stream",
    "llama4_tokenizer",
    "load_tokenizer",
    "tokenizer_from_gguf_metadata",
    "train_bpe",
]


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    split_pattern: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
) -> Tokenizer:
    """Load the tokenizer in a file or folder, recognised by what is there.

    Args:
        path: a folder, or one of tokenizer.json, a SentencePiece model, a tiktoken rank file, a
            GGUF model (whose tokenizer is inside); or `llama-4` or `llama-4-base`, for the
            rank file of an installed llama-models package.
        split_pattern, special_tokens, bos, eos, pad: what a bare tiktoken rank file does not say.
            Llama 4's is known without: it gives the instruct models' tokenizer (the base models',
            which has another stop token and no chat format, is `llama4_tokenizer(...,
            instruct=False)`).

    Raises JaxherdError if there is no tokenizer, or a rank file comes without its split pattern.
    """
    if (name := os.fspath(path)) in INSTALLED and not os.path.exists(name):
        return load_installed(name)
    path = pathlib.Path(path)
    if not path.exists():
        raise JaxherdError(f"There is no tokenizer at {str(path)!r}: check the path.")
    if path.is_dir():
        names = (KIND_FILE, "tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
        found = [path / name for name in names if (path / name).is_file()]
        found += sorted(path.glob("*.tiktoken")) + sorted(path.glob("*.spm"))
        if not found:
            raise JaxherdError(
                f"There is no tokenizer in {str(path)!r}: expected tokenizer.json, "
                "tokenizer.model (SentencePiece or tiktoken ranks), *.tiktoken or *.spm."
            )
        path = found[0]
    if path.name == KIND_FILE:
        return _load_own(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer.load(path)
    if path.suffix.lower() == ".gguf":
        return tokenizer_from_gguf_metadata(GgufStore(path).metadata)
    data = path.read_bytes()
    if not _is_rank_file(data):
        return SentencePieceTokenizer(data)
    if split_pattern is None and is_llama4(data):
        return llama4_tokenizer(data)
    if split_pattern is None:
        raise JaxherdError(
            f"{str(path)!r} is a tiktoken rank file, which does not say how to split text: pass "
            f"split_pattern, a regular expression or one of {sorted(SPLIT_PATTERNS)}."
        )
    return TiktokenTokenizer(
        data,
        split_pattern=split_pattern,
        special_tokens=special_tokens,
        bos=bos,
        eos=eos,
        pad=pad,
    )


def _is_rank_file(data: bytes) -> bool:
    first = data.split(b"\n", 1)[0]
    try:
        return bool(parse_ranks(first))
    except JaxherdError:
        return False


def _load_own(path: pathlib.Path) -> Tokenizer:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.pop("kind")
    except (ValueError, KeyError, AttributeError) as error:
        raise JaxherdError(f"{str(path)!r} is damaged: write the tokenizer again.") from error
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tiktoken":
        return TiktokenTokenizer((path.parent / "tokenizer.tiktoken").read_bytes(), **settings)
    raise JaxherdError(f"{str(path)!r} has an unknown kind: {nearest(kind, ('bytes', 'tiktoken'))}")
