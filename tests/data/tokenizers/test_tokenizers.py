import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers import (
    ByteTokenizer,
    DecodeStream,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    decode_stream,
    load_tokenizer,
    tokenizer_from_gguf_metadata,
    train_bpe,
)

TEXTS = [
    "the cat sat on the mat, the cat ate the rat.",
    "def f(x):\n    return x + 12345\n",
    "naïve café über 日本語 🙂🙂",
] * 20


def _sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        pad_id=3,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def _ranks() -> bytes:
    import base64

    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b" c", b"at"]
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    cache = tmp_path_factory.mktemp("bpe")
    return {
        "bytes": ByteTokenizer(),
        "hf": train_bpe(TEXTS, 400, cache_dir=cache),
        "spm": SentencePieceTokenizer(_sentencepiece_model()),
        "tiktoken": TiktokenTokenizer(
            _ranks(),
            split_pattern="llama-4",
            special_tokens={"<|bos|>": 300, "<|eos|>": 301, "<|eot|>": 302},
            bos="<|bos|>",
            eos="<|eos|>",
            stop=["<|eot|>"],
        ),
    }


KINDS = ("bytes", "hf", "spm", "tiktoken")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁")))
def test_round_trip(every, kind, text):
    tokenizer = every[kind]
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert "".join(decode_stream(tokenizer, ids)) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_for_any_ids(every, kind, data):
    tokenizer = every[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = DecodeStream(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_half_characters_wait(every, kind):
    tokenizer = every[kind]
    ids = tokenizer.encode("🙃")  # in no training text, so it takes several tokens
    assert len(ids) > 1
    stream = DecodeStream(tokenizer)
    assert "".join(stream.push(i) for i in ids[:-1]).strip() == ""
    assert stream.push(ids[-1]) == "🙃"
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes(every, kind):
    tokenizer = every[kind]
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
    for text in TEXTS[:3]:
        dummy = int(tokenizer.strips_leading_space)
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) + dummy
    for i in tokenizer.special_tokens().values():
        assert sizes[i] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_text_stay_text(every, kind):
    tokenizer = every[kind]
    assert isinstance(tokenizer, Tokenizer)
    special = tokenizer.special_tokens()
    assert special
    for name, i in special.items():
        text = f"a{name}b"
        assert i not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert i in tokenizer.encode(text, parse_special=True)
    ids = tokenizer.encode("hi", add_bos=True)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) != "hi"


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(every, kind, tmp_path):
    tokenizer = every[kind]
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    for field in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "stop_ids",
        "chat_template",
        "adds_bos",
    ):
        assert getattr(again, field) == getattr(tokenizer, field), field
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_sentencepiece_agrees_with_its_library(every):
    import sentencepiece

    tokenizer = every["spm"]
    engine = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece_model())
    for text in [*TEXTS[:3], " lead", "a  b\n\nc", "🙃"]:
        assert tokenizer.encode(text) == engine.encode(text)
        assert tokenizer.decode(engine.encode(text)) == engine.decode(engine.encode(text))


def test_tiktoken_stop(every):
    assert every["tiktoken"].stop_ids == (301, 302)
    assert every["tiktoken"].vocab_size == 303


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    script = (
        "import sys\nfrom jaxherd.data.tokenizers import train_bpe\n"
        f"texts = {TEXTS!r}\n"
        "print(train_bpe(texts, 400, cache_dir=sys.argv[1]).fingerprint())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / str(n))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in range(2)
    ]
    assert runs[0] == runs[1] and runs[0].startswith("hf-")
    from jaxherd.data.tokenizers import training

    monkeypatch.setattr(training, "_train", None)  # calling it would fail
    assert train_bpe(TEXTS, 400, cache_dir=tmp_path / "0").fingerprint() == runs[0].strip()
    with pytest.raises(TypeError):
        train_bpe([*TEXTS, "more"], 400, cache_dir=tmp_path / "0")


def test_bad_input(tmp_path):
    with pytest.raises(JaxherdError, match="needs at least 259"):
        train_bpe(TEXTS, 100, cache_dir=tmp_path)
    with pytest.raises(JaxherdError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(JaxherdError, match="expected tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(_ranks())
    with pytest.raises(JaxherdError, match="pass split_pattern"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, split_pattern="llama-3").vocab_size == 261
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece_model()[:5000])
    with pytest.raises(JaxherdError, match="cannot be parsed"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(JaxherdError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_missing_named_token(every, tmp_path):
    every["hf"].save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "</none>"}))
    with pytest.raises(JaxherdError, match="</none>"):
        load_tokenizer(tmp_path)


def test_folder_of_another_library(every, tmp_path):
    """Special tokens as mappings, a named template list, stops in generation_config.json."""
    every["hf"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|bos|>", "lstrip": False},
                "eos_token": "<|eos|>",
                "chat_template": [
                    {"name": "tool", "template": "T"},
                    {"name": "default", "template": "D"},
                ],
            }
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.stop_ids == (2, 7)
    assert tokenizer.chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"


def _spm_metadata(add_space_prefix: bool) -> tuple[dict, object]:
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece_model())
    n = engine.vocab_size()
    kinds = [
        2 if engine.is_unknown(i) else 3 if engine.is_control(i) else 6 if engine.is_byte(i) else 1
        for i in range(n)
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [engine.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [engine.get_score(i) for i in range(n)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }
    return metadata, engine


def test_gguf_sentencepiece():
    metadata, engine = _spm_metadata(True)
    tokenizer = tokenizer_from_gguf_metadata(metadata)
    for text in [*TEXTS[:3], "🙃 the rat", "x  y\n", "cat"]:
        assert tokenizer.encode(text) == engine.encode(text), text
        assert tokenizer.decode(engine.encode(text)) == text
        assert "".join(decode_stream(tokenizer, engine.encode(text))) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.adds_bos
    metadata, _ = _spm_metadata(False)
    plain = tokenizer_from_gguf_metadata(metadata)
    assert plain.decode(plain.encode("cat")) == "cat"
    assert plain.encode(" cat") == tokenizer.encode("cat")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokenizer.ggml.tokens": None}, "carries no tokenizer"),
        ({"tokenizer.ggml.model": "gpt-2"}, "did you mean 'gpt2'"),
        ({"tokenizer.ggml.scores": [0.0]}, "1 scores"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "out of range"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smolm"}, "did you mean 'smollm'"),
        ({"tokenizer.ggml.model": "gpt2"}, "no tokenizer.ggml.merges"),
    ],
)
def test_gguf_bad_metadata(change, words):
    metadata, _ = _spm_metadata(True)
    with pytest.raises(JaxherdError, match=words):
        tokenizer_from_gguf_metadata({**metadata, **change})
