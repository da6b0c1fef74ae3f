"""The tokenizer that a GGUF file carries in its metadata, as a tokenizer.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.tokenizers.huggingface import HuggingFaceTokenizer, require_tokenizers
from jaxherd.data.tokenizers.tiktoken_ranks import SPLIT_PATTERNS

# GGUF token types (the `gguf` package's TokenType).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# `tokenizer.ggml.pre` -> the cuts made one after the other before merging.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (SPLIT_PATTERNS["gpt-2"],),
    "smollm": (r"\p{N}", SPLIT_PATTERNS["gpt-2"]),
    "llama-bpe": (SPLIT_PATTERNS["llama-3"],),
    "llama4": (SPLIT_PATTERNS["llama-4"],),
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
}
# These models take a whole piece that is in the vocabulary without going through the merges.
_IGNORES_MERGES = {"llama-bpe", "llama4"}


def tokenizer_from_gguf_metadata(metadata: Mapping[str, object]) -> HuggingFaceTokenizer:
    """Build the tokenizer that `tokenizer.ggml.*` describes.

    `tokenizer.ggml.model` is "gpt2" (byte-level BPE, with `pre` naming the cuts) or "llama"
    (SentencePiece BPE with scores).  Anything else raises JaxherdError.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise JaxherdError("The GGUF file carries no tokenizer: tokenizer.ggml.tokens is absent.")
    tokens = [str(token) for token in tokens]
    types = [int(t) for t in _list(metadata, "tokenizer.ggml.token_type", [1] * len(tokens))]
    if len(types) != len(tokens):
        raise JaxherdError(
            f"The GGUF tokenizer has {len(tokens)} tokens but {len(types)} token types."
        )
    if kind == "gpt2":
        engine = _byte_level(metadata, tokens)
    elif kind == "llama":
        engine = _sentencepiece(metadata, tokens, types)
    else:
        raise JaxherdError(
            f"GGUF tokenizer model {kind!r} is not supported: "
            + nearest(str(kind), ("gpt2", "llama"))
        )
    library = require_tokenizers()
    special = [t for t, k in zip(tokens, types) if k in (_CONTROL, _UNKNOWN)]
    engine.add_special_tokens(
        [library.AddedToken(t, special=True, normalized=False) for t in special]
    )
    defined = [t for t, k in zip(tokens, types) if k == _USER_DEFINED]
    engine.add_tokens([library.AddedToken(t, special=False, normalized=False) for t in defined])

    def name(role: str) -> str | None:
        i = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if i is None:
            return None
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise JaxherdError(f"The GGUF tokenizer's {role}_token_id {i!r} is out of range.")
        return tokens[i]

    template = metadata.get("tokenizer.chat_template")
    stop = [name(role) for role in ("eot", "eom")]
    return HuggingFaceTokenizer(
        engine.to_str(),
        bos=name("bos"),
        eos=name("eos"),
        pad=name("padding"),
        stop=[s for s in stop if s is not None],
        chat_template=template if isinstance(template, str) else None,
    )


def _list(metadata: Mapping[str, object], key: str, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise JaxherdError(f"The GGUF tokenizer has no {key}.")
    return value


def _byte_level(metadata: Mapping[str, object], tokens: list[str]) -> Any:
    library = require_tokenizers()
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        raise JaxherdError(
            f"GGUF pre-tokenizer {pre!r} is not supported: {nearest(pre, _PRE_TOKENIZERS)}"
        )
    merges = [tuple(str(m).split(" ", 1)) for m in _list(metadata, "tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise JaxherdError("The GGUF tokenizer has a malformed merge.")
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = library.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORES_MERGES)
    except Exception as error:  # the library raises bare Exception
        raise JaxherdError(
            f"The GGUF tokenizer's merges do not fit its tokens: {error}."
        ) from error
    engine = library.Tokenizer(model)
    cuts = [
        library.pre_tokenizers.Split(library.Regex(pattern), behavior="isolated")
        for pattern in _PRE_TOKENIZERS[pre]
    ]
    cuts.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    engine.pre_tokenizer = library.pre_tokenizers.Sequence(cuts)
    engine.decoder = library.decoders.ByteLevel()
    return engine


def _sentencepiece(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Any:
    """SentencePiece BPE merges the adjacent pair whose union has the highest score."""
    library = require_tokenizers()
    scores = [float(s) for s in _list(metadata, "tokenizer.ggml.scores")]
    if len(scores) != len(tokens):
        raise JaxherdError(f"The GGUF tokenizer has {len(tokens)} tokens but {len(scores)} scores.")
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, kind in zip(tokens, scores, types):
        if kind != 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], (left, right)))
    ranked.sort()
    unknown = next((t for t, k in zip(tokens, types) if k == _UNKNOWN), None)
    model = library.models.BPE(
        vocab=vocab,
        merges=[pair for *_, pair in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    engine = library.Tokenizer(model)
    steps = [library.normalizers.Replace(" ", "▁")]
    decoding = [
        library.decoders.Replace("▁", " "),
        library.decoders.ByteFallback(),
        library.decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, library.normalizers.Prepend("▁"))
        decoding.append(library.decoders.Strip(" ", 1, 0))
    engine.normalizer = library.normalizers.Sequence(steps)
    engine.decoder = library.decoders.Sequence(decoding)
    return engine
