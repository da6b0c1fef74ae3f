import hypothesis
import hypothesis.strategies as st
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.stop_strings import StopStrings


def feed(stops, pieces):
    shown = [stops.push(piece) for piece in pieces]
    if stops.found is None:
        shown.append(stops.finish())
    return shown


def test_a_stop_string_over_several_pieces_is_never_shown():
    stops = StopStrings(["END"])
    assert feed(stops, ["a", "bE", "N", "Dc"]) == ["a", "b", "", ""]
    assert stops.found == "END"


def test_what_only_looked_like_a_stop_is_shown_late():
    assert feed(StopStrings(["END"]), ["aE", "N", "x", "E"]) == ["a", "", "ENx", "", "E"]


def test_overlapping_beginnings():
    assert "".join(feed(StopStrings(["aab"]), list("aaab!"))) == "a"


def test_the_first_match_wins():
    stops = StopStrings(["xyz", "y"])
    assert "".join(feed(stops, ["axyz"])) == "a"
    assert stops.found == "xyz"


@hypothesis.given(
    st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4)), st.data()
)
def test_pieces_do_not_matter(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    shown = "".join(feed(StopStrings(strings), pieces))
    # One character at a time defines what "first" means for a stream: the match that ends first.
    assert shown == "".join(feed(StopStrings(strings), list(text))) or any(
        s in text for s in strings
    )
    found = [text.find(s) for s in strings if s in text]
    if not found:
        assert shown == text
    else:
        assert text.startswith(shown) and not any(s in shown for s in strings)


def test_empty_stop_strings_are_refused():
    with pytest.raises(JaxherdError, match="not empty"):
        StopStrings([""])
