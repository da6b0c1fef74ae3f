"""Train a byte-level BPE."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from jaxherd.core.errors import JaxherdError
from jaxherd.data.cache import atomic_folder, cache_root, locked
from jaxherd.data.tokenizers.huggingface import HuggingFaceTokenizer, require_tokenizers

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (PAD, BOS, EOS),
    min_frequency: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
) -> HuggingFaceTokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens, trained on `texts`.

    Single digits are split off first, then GPT-2's pattern cuts the text; every byte is in the
    vocabulary, so that any text round-trips.  The first three special tokens are padding,
    beginning and end of text.  The result depends on the texts and the arguments alone and is
    cached by their hash.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise JaxherdError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: it needs at least "
            f"{smallest} (256 bytes and {len(special_tokens)} special tokens)."
        )
    if len(special_tokens) < 3:
        raise JaxherdError("A trained BPE needs special tokens for padding, beginning and end.")
    texts = list(texts)
    library = require_tokenizers()
    digest = hashlib.sha256(repr((1, vocab_size, tuple(special_tokens), min_frequency)).encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    folder = cache_root(cache_dir) / "tokenizers" / f"bpe-{vocab_size}-{digest.hexdigest()[:24]}"
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():
                trained = _train(library, texts, vocab_size, special_tokens, min_frequency)
                with atomic_folder(folder) as scratch:
                    trained.save(scratch)
    return HuggingFaceTokenizer.load(pathlib.Path(folder) / "tokenizer.json")


def _train(library, texts, vocab_size, special_tokens, min_frequency) -> HuggingFaceTokenizer:
    engine = library.Tokenizer(library.models.BPE())
    engine.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    engine.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    engine.train_from_iterator(texts, trainer=trainer, length=len(texts))
    pad, bos, eos = special_tokens[:3]
    return HuggingFaceTokenizer(engine.to_str(), bos=bos, eos=eos, pad=pad)
