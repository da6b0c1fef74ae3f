"""Prompts with a needle: of the length that was asked for, and where it was asked for."""

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.haystack import Haystack, HaystackPrompts, magic_number
from jaxherd.data.tokenizers import ByteTokenizer

WORDS = ByteTokenizer()
TEXT = "".join(f"This is sentence {n:03d}. " for n in range(50))
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}<|bos|>"
)


class Chatting(ByteTokenizer):
    chat_template = TEMPLATE


@pytest.fixture
def haystack(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return Haystack(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("tokenizer, chat", [(WORDS, False), (Chatting(), True)])
@pytest.mark.parametrize("length", [200, 500, 3000])
def test_length_and_place(haystack, tokenizer, chat, length):
    prompts, needle = HaystackPrompts(haystack, tokenizer, chat=chat), magic_number(7)
    places = []
    for depth in (0.0, 0.3, 0.5, 1.0):
        tokens = prompts.prompt(length, depth, needle)
        assert len(tokens) == length
        text = tokenizer.decode(tokens)
        assert text.count(needle.sentence) == 1 and text.count(needle.question) == 1
        at = text.index(needle.sentence)
        before = text[:at].rstrip()
        # Between two sentences, or at an end of the text.
        assert depth in (0.0, 1.0) or before.endswith(".")
        places.append(at / text.index(needle.question))
    assert places == sorted(places)
    assert places[0] < 0.1 and places[-1] > 0.6 and abs(places[2] - 0.5) < 0.25
    if chat:
        assert text.startswith("user: ") and tokens[-1] == tokenizer.bos_id


def test_needles_cannot_be_known():
    found = {magic_number(n) for n in range(200)}
    assert len({one.answer for one in found}) > 190
    assert all(one.answer in one.sentence and one.answer not in one.question for one in found)
    assert magic_number(3) == magic_number(3)


def test_what_is_no_haystack(tmp_path, haystack):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for name, told in [
        ("empty.txt", "is empty"),
        ("bytes.txt", "cannot be read"),
        ("none", "no file"),
    ]:
        with pytest.raises(JaxherdError, match=told):
            Haystack(str(tmp_path / name)).text()
    prompts = HaystackPrompts(haystack, WORDS, chat=False)
    with pytest.raises(JaxherdError, match="no room for a haystack"):
        prompts.prompt(60, 0.5, magic_number(0))
    with pytest.raises(JaxherdError, match="from 0 to 1"):
        prompts.prompt(300, 1.5, magic_number(0))


def test_the_text_that_everybody_has():
    text = Haystack().text()
    assert len(text) > 100_000 and "Assignment statements" in text
    assert Haystack().fingerprint() == Haystack().fingerprint()
