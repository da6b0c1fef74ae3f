"""One spelling for what people may spell in many ways."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.data.folded_text import fold, fold_with_places, join_spaced, letters_for_figures

TAGGED = "".join(chr(0xE0000 + ord(c)) for c in "secret")
SPELLINGS = {
    "case": "SeCrEt",
    "full width": "ｓｅｃｒｅｔ",
    "mathematical": "𝓼𝓮𝓬𝓻𝓮𝓽",
    "circled": "ⓢⓔⓒⓡⓔⓣ",
    "negative squared": "🆂🅴🅲🆁🅴🆃",
    "regional": "🇸🇪🇨🇷🇪🇹",
    "cyrillic": "ѕесrеt",
    "greek": "sεcrετ",
    "accents": "sécrèt̶",
    "zero width": "se\u200bcr\u200det\ufeff",
    "bidirectional": "\u202esecret\u202c",
    "soft hyphen": "se\u00adcret",
    "filler": "sec\u3164ret",
    "variation selector": "sec\ufe0fret",
    "small capitals": "ꜱᴇᴄʀᴇᴛ",
    "tags": TAGGED,
}


@pytest.mark.parametrize("what", sorted(SPELLINGS))
def test_spellings_of_one_word(what):
    assert fold(SPELLINGS[what]) == "secret"


def test_white_space_apostrophes_and_dashes_are_one():
    assert fold("a\u00a0\t\n  b\u2003c") == "a b c"
    assert fold("don’t\u2014stop") == "don't-stop"
    assert fold("Straße") == "strasse"


def test_words_of_other_scripts_stay_words():
    """They fold to the same wherever they stand, and different ones stay different."""
    assert fold("Привет") == fold("ПРИВЕТ") != fold("привал")
    assert fold("日本語") == "日本語"


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_beginning_folds_to_a_beginning(first, second):
    """Which a guard of streamed text relies on."""
    short, whole = fold_with_places(first), fold_with_places(first + second)
    assert whole.text.startswith(short.text)
    assert whole.places[: len(short.places)] == short.places
    assert list(whole.places) == sorted(whole.places)
    assert len(whole.text) == len(whole.places)
    assert fold(whole.text) == whole.text, "folding what is folded changes nothing"


def test_words_spelled_letter_by_letter():
    assert join_spaced("say s-e-c-r-e-t now") == "say secret now"
    assert join_spaced("s e c r e t") == "secret"
    assert join_spaced("a b c") == "a b c", "three are no run"
    assert join_spaced("i am a b.c.d.e f") == "i am a bcde f"
    assert join_spaced("plan a or plan b") == "plan a or plan b"
    assert join_spaced("") == ""


def test_figures_that_stand_for_letters():
    assert letters_for_figures(fold("$3CR37")) == letters_for_figures("secret")
    assert letters_for_figures("he11o") == letters_for_figures("hello")
