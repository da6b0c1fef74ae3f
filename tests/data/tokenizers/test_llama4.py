"""Llama 4's tokenizer: on made-up ranks always, on Meta's where the user has the file."""

import hashlib
import importlib.util
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.data.chat import can_chat
from jaxherd.data.tokenizers import TiktokenTokenizer, Tokenizer, llama4_tokenizer, load_tokenizer
from jaxherd.data.tokenizers.llama4 import special_tokens
from jaxherd.data.tokenizers.tiktoken_ranks import pieces

_spec = importlib.util.spec_from_file_location(
    "llama4_files", pathlib.Path(__file__).parents[1] / "llama4_files.py"
)
assert _spec is not None and _spec.loader is not None
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
GOLDEN = files.GOLDEN


def test_control_tokens_have_metas_names_and_ids():
    table = special_tokens()
    assert len(table) == 2048 and list(table.values()) == list(range(200_000, 202_048))
    for name, token_id in GOLDEN["control"].items():
        assert table[name] == token_id, name
    assert {name for name in table if "reserved" not in name} == set(GOLDEN["control"])
    digest = hashlib.sha256("\n".join(table).encode()).hexdigest()
    assert digest == GOLDEN["names_sha256"]
    # The ids that the spec lists (llama4.md 5).
    assert (table["<|image|>"], table["<|patch|>"]) == (200090, 200092)
    assert table["<|reserved_special_token_0|>"] == 201144


def test_base_and_instruct_stop_at_their_own_tokens():
    ranks = files.made_up_of_full_size()
    instruct, base = (llama4_tokenizer(ranks, instruct=i) for i in (True, False))
    assert isinstance(instruct, Tokenizer) and instruct.vocab_size == base.vocab_size == 202_048
    assert sorted(instruct.stop_ids) == GOLDEN["stop"] == [200001, 200007, 200008]
    assert base.stop_ids == (200001,)
    for tokenizer in (instruct, base):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (200000, 200001, 200018)
        assert tokenizer.adds_bos and tokenizer.token_bytes()[200000:].sum() == 0
    assert instruct.chat_format == "llama-4" and base.chat_format is None
    assert instruct.fingerprint() != base.fingerprint()


def test_the_file_is_recognised(tmp_path, monkeypatch):
    """By its size: in a folder, by its path, and in an installed package that is not imported."""
    (tmp_path / "tokenizer.model").write_bytes(files.made_up_of_full_size())
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(path).stop_ids == (200001, 200007, 200008)
    other = tmp_path / "other.model"
    other.write_bytes(files.made_up())
    with pytest.raises(JaxherdError, match="does not say how to split text"):
        load_tokenizer(other)
    monkeypatch.setitem(sys.modules, "llama_models", None)
    monkeypatch.delitem(sys.modules, "llama_models")
    package = tmp_path / "site" / "llama_models"
    (package / "llama4").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "llama4" / "tokenizer.model").write_bytes(files.made_up())
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    for load in (load_tokenizer, jaxherd.load_tokenizer):
        assert can_chat(load("llama-4"))
        assert load("llama-4-base").stop_ids == (261 + 1,)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JaxherdError, match="pip install llama-models"):
        load_tokenizer("llama-4")


def test_saved_and_loaded_again(tmp_path):
    tokenizer = llama4_tokenizer(files.made_up())
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, TiktokenTokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.chat_format, again.stop_ids) == (tokenizer.chat_format, tokenizer.stop_ids)
    text = "x" * 25_001 + "the"
    assert again.encode(text) == tokenizer.encode(text)


def test_gaps_leave_no_place_for_control_tokens():
    with pytest.raises(JaxherdError, match="has gaps"):
        llama4_tokenizer(files.made_up().replace(b" 260\n", b" 261\n"))
    with pytest.raises(JaxherdError, match="come together"):
        TiktokenTokenizer(files.made_up(), split_pattern="llama-4", longest_run=5)


@given(
    st.text(st.sampled_from("ab \n\t\u3000é"), max_size=60), st.integers(1, 20), st.integers(1, 7)
)
def test_pieces(text, longest, run):
    """The rule by one character after the other (llama4.md 5)."""
    found = list(pieces(text, longest, run))
    assert "".join(found) == text
    wanted: list[str] = []
    for begin in range(0, len(text), longest):
        piece, count, last = "", 0, None
        for character in text[begin : begin + longest]:
            count = count + 1 if character.isspace() == last else 1
            last = character.isspace()
            if count > run:
                wanted.append(piece)
                piece, count = "", 1
            piece += character
        wanted.append(piece)
    assert found == wanted


def test_long_runs_are_cut_and_control_tokens_are_not():
    tokenizer = llama4_tokenizer(files.made_up((b"aa", b"aaaa")))
    longest = "a" * 25_000
    assert tokenizer.encode(longest + "aaa") == tokenizer.encode(longest) + tokenizer.encode("aaa")
    texts = [longest + "aaa", "", " x", "b" * 400_010]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    # Where a text is cut, the name of a control token may stand.
    text = "a" * 24_998 + "<|eot|>"
    eot = tokenizer.special_tokens()["<|eot|>"]
    assert tokenizer.encode(text, parse_special=True)[-1] == eot
    assert eot not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def real():
    return llama4_tokenizer(files.real_ranks())


def test_ids_are_metas(real):
    assert real.vocab_size == GOLDEN["vocabulary"]
    for text, ids in GOLDEN["texts"].items():
        assert real.encode(text) == ids, text
        assert real.decode(ids) == text
    assert real.encode("Hi", add_bos=True)[0] == 200000


@pytest.mark.parametrize("case", GOLDEN["long_texts"], ids=lambda case: str(case["recipe"])[:40])
def test_ids_of_long_texts_are_metas(real, case):
    text = "".join(piece * times for piece, times in case["recipe"])
    assert real.encode(text) == [i for i, count in case["runs"] for _ in range(count)]
