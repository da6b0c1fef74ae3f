"""The host's books of pages, driven without a device."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.pages import PageBooks, Pages, page_names
from jaxherd.layers.paged_cache import CacheRule

FULL, CHUNKED, WINDOW = CacheRule("causal"), CacheRule("chunked", 8), CacheRule("sliding_window", 6)
PAGE, CALL = 4, 5


def books(full=20, local=20, **options) -> PageBooks:
    return PageBooks(
        {FULL: full, CHUNKED: local, WINDOW: local}, PAGE, longest_call=CALL, **options
    )


def admit(pages: PageBooks, prompt, new: int):
    return pages.admit(page_names(prompt, PAGE), len(prompt), len(prompt) + new)


def prefill(sequence, prompt, begin=None):
    begin = sequence.reused_tokens if begin is None else begin
    while begin < len(prompt):
        end = min(begin + CALL, len(prompt))
        sequence.cover(begin, end)
        sequence.written(end)
        begin = end


def in_sight(position: int) -> dict[CacheRule, int]:
    """Count by hand the first position that a query sees."""
    return {FULL: 0, CHUNKED: position // 8 * 8, WINDOW: max(position - 5, 0)}


def test_names_know_all_tokens_before():
    a, b = page_names([1, 2, 3, 4, 5, 6, 7, 8], 4), page_names([9, 2, 3, 4, 5, 6, 7, 8, 1], 4)
    assert len(a) == len(b) == 2 and not set(a) & set(b)
    assert page_names([1, 2, 3, 4, 0, 0, 0, 0], 4)[0] == a[0]
    assert page_names([1, 23], 2) != page_names([12, 3], 2)


def test_local_layers_give_back_what_is_out_of_sight():
    pages = books()
    sequence = admit(pages, range(100, 140), 30)
    prefill(sequence, range(100, 140))
    for position in range(40, 69):
        sequence.cover(position, position + 1)
        for of, first in in_sight(position).items():
            assert sorted(sequence.held[of]) == list(range(first // PAGE, position // PAGE + 1))
        pages.check()
    assert pages.pages[WINDOW].cached > 0, "full pages of the prompt wait for others"
    sequence.close()
    pages.check()
    assert pages.pages[FULL].cached == 10 and pages.pages[FULL].held == 0


def test_a_prompt_takes_over_what_is_in_sight():
    pages = books()
    prompt = list(range(26))
    first = admit(pages, prompt, 4)
    assert first.reused_tokens == 0
    prefill(first, prompt)
    # 24 tokens are in full pages, a border of chunks: of the chunked layers nothing is needed.
    second = admit(pages, [*prompt[:24], 99, 98], 4)
    assert second.reused_tokens == 24
    assert [len(second.held[of]) for of in (FULL, CHUNKED, WINDOW)] == [6, 0, 2]
    assert second.held[FULL] == {i: first.held[FULL][i] for i in range(6)}
    third = admit(pages, prompt[:24], 4)
    assert third.reused_tokens == 20, "one token at least is computed"
    assert admit(pages, [99, *prompt], 4).reused_tokens == 0
    pages.check()
    for sequence in list(pages.open):
        sequence.close()
        pages.check()


def test_a_beginning_whose_window_is_gone_is_not_taken_over():
    pages = books(local=10)
    prompt = list(range(26))
    first = admit(pages, prompt, 4)
    prefill(first, prompt)
    first.close()
    # Other prompts push the windows' pages out; the full layers have room for all.
    for begin in (200, 300):
        other = admit(pages, range(begin, begin + 19), 2)
        prefill(other, list(range(begin, begin + 19)))
        other.close()
    assert pages.pages[FULL].find(page_names(prompt, PAGE)[5]) is not None
    assert admit(pages, prompt, 4).reused_tokens < 24
    pages.check()


def test_the_oldest_cached_page_goes_first():
    pages = Pages(3, gives_back=False)
    taken = [pages.take() for _ in range(3)]
    for page, name in zip(taken, (b"a", b"b", b"c")):
        pages.name(page, name)
    for page in (taken[1], taken[0], taken[2]):
        pages.release(page)
    pages.share(taken[1])
    pages.release(taken[1])
    assert [pages.take(), pages.take()] == [taken[0], taken[2]]
    assert pages.find(b"b") == taken[1] and pages.find(b"a") is None


def test_waiting_and_never():
    pages = books(full=10)
    first = admit(pages, range(20), 8)  # 7 pages
    assert admit(pages, range(50, 60), 4) is None, "4 pages, 3 left"
    assert admit(pages, range(50, 60), 2) is not None
    first.close()
    assert admit(pages, range(70, 80), 4) is not None
    with pytest.raises(JaxherdError, match="41 tokens needs 11 pages of 4 and the cache has 10"):
        pages.check_size(41)
    pages.check_size(40)


def test_shared_pages_are_set_aside_once():
    pages = books(full=10, local=30)
    prompt = list(range(25))
    prefill(admit(pages, prompt, 3), prompt)  # 7 of 10 pages
    # 7 pages each, 6 of them shared: three fit, and no fourth.
    for _ in range(3):
        prefill(admit(pages, prompt, 3), prompt)
        pages.check()
    assert admit(pages, prompt, 3) is None


class Traffic(RuleBasedStateMachine):
    """Any order of admissions, calls and ends; prompts from a small stock of beginnings."""

    @initialize(full=st.integers(8, 24), local=st.integers(5, 24))
    def start(self, full, local):
        self.pages = books(full=full, local=local)
        self.running = []

    @rule(
        stem=st.integers(0, 2), common=st.integers(0, 20), own=st.integers(1, 6),
        new=st.integers(1, 12), tail=st.integers(0, 3),
    )  # fmt: skip
    def admit(self, stem, common, own, new, tail):
        prompt = [*range(stem * 100, stem * 100 + common), *[1000 + tail] * own]
        most = self.pages.most(len(prompt) + new)
        if any(most[of] > self.pages.pages[of].total for of in most):
            with pytest.raises(JaxherdError):
                self.pages.check_size(len(prompt) + new)
            return
        sequence = admit(self.pages, prompt, new)
        if sequence is None:
            assert self.pages.open, "alone, whatever fits is admitted"
            return
        assert sequence.reused_tokens < len(prompt)
        self.running.append([sequence, prompt, sequence.reused_tokens, len(prompt) + new])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), span=st.integers(1, CALL))
    def advance(self, which, span):
        entry = self.running[which % len(self.running)]
        sequence, prompt, begin, length = entry
        if begin == length:
            return
        end = min(begin + span, length if begin >= len(prompt) else len(prompt))
        sequence.cover(begin, end)
        for of, first in in_sight(begin).items():
            wanted = range(first // PAGE, -(-end // PAGE))
            assert sorted(sequence.held[of]) == list(wanted), "what a call touches is held"
        sequence.written(min(end, len(prompt)))
        entry[2] = end

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which):
        self.running.pop(which % len(self.running))[0].close()

    @invariant()
    def the_books_are_right(self):
        if hasattr(self, "pages"):
            self.pages.check()

    def teardown(self):
        if not hasattr(self, "pages"):
            return
        for sequence in list(self.pages.open):
            sequence.close()
        self.pages.check()
        assert all(pages.held == pages.promised == 0 for pages in self.pages.pages.values())


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
