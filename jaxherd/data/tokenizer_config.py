"""Which tokenizer an experiment's data has: trained on its corpus, read from a file, or bytes."""

import dataclasses
import os

from jaxherd.core.errors import JaxherdError
from jaxherd.data.sources import resolve
from jaxherd.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class TrainedBpe:
    """A byte-level BPE trained on the training split (all corpora of a mixture) and cached.

    Attributes:
        vocab_size: at most this many tokens, bytes and special tokens included.
        max_bytes: train on a sample of each corpus of this size at most.
    """

    vocab_size: int = 2048
    max_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer from a file or folder (any source that `resolve` takes); see `load_tokenizer`.

    Attributes:
        path: may be absent until the data is built, so that plans need no tokenizer.
        vocab_size: what the file is expected to hold, if something is to be planned with it.
        split_pattern, special_tokens, bos, eos, pad: for a bare tiktoken rank file.
    """

    path: str
    vocab_size: int | None = None
    split_pattern: str | None = None
    special_tokens: tuple[tuple[str, int], ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token per UTF-8 byte."""

    vocab_size: int = dataclasses.field(default=ByteTokenizer.vocab_size, init=False)


def given_tokenizer(
    config: TokenizerFile | Bytes, *, cache_dir: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Return the tokenizer of a file, or that of bytes.

    Raises JaxherdError if its file is missing or has another vocabulary than declared.
    """
    if isinstance(config, Bytes):
        return ByteTokenizer()
    try:
        path = resolve(config.path, cache_dir=cache_dir)
    except JaxherdError as error:
        raise JaxherdError(f"The tokenizer is missing: {error}") from error
    tokenizer = load_tokenizer(
        path,
        split_pattern=config.split_pattern,
        special_tokens=dict(config.special_tokens),
        bos=config.bos,
        eos=config.eos,
        pad=config.pad,
    )
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise JaxherdError(
            f"The tokenizer {config.path!r} has {tokenizer.vocab_size} tokens, more than the "
            f"declared vocab_size={config.vocab_size}."
        )
    return tokenizer


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id that fills rows: the tokenizer's padding, else its end of text, else 0."""
    return next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
