"""Which prompts stay, and how a round draws from them."""

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.methods.prompt_filter import PromptFilter, draw_prompts


def test_the_band_with_both_ends():
    rule = PromptFilter(lowest=0.25, highest=0.75, least=1)
    rates = np.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
    assert rule.kept(rates, ["a"] * 5).tolist() == [1, 2, 3]
    assert PromptFilter(least=1).kept(rates, ["a"] * 5).tolist() == [0, 1, 2, 3]  # hard ones too


def test_no_capability_is_ever_without_prompts():
    rule = PromptFilter(lowest=0.25, highest=0.75, least=2)
    rates = np.asarray([1.0, 0.8, 1.0, 1.0, 0.0, 0.5, 0.0, 0.2])
    kept = rule.kept(rates, list("aaaabbbb"))
    # The nearest to the band make up; of equally near ones the first.
    assert kept.tolist() == [0, 1, 5, 7]
    assert PromptFilter(least=9, highest=0.0).kept(rates, list("aaaabbbb")).tolist() == [*range(8)]


def test_pass_rates():
    rewards = np.asarray([[1.0, 0.1, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    assert PromptFilter().pass_rates(rewards).tolist() == [0.5, 0.0]
    assert PromptFilter(pass_reward=0.1).pass_rates(rewards).tolist() == [0.75, 1.0]


def test_when_estimates_are_due():
    rule = PromptFilter(every=3)
    assert [n for n in range(8) if rule.begins(n)] == [0, 3, 6]
    assert [rule.period(n) for n in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    never = PromptFilter(every=0)
    assert not any(never.begins(n) for n in range(8))


def test_capabilities_by_turns():
    names = list("aaaaabbbc")
    drawn = draw_prompts(np.arange(9), names, 8, np.random.default_rng(0))
    assert [names[p] for p in drawn] == list("abcabcab")
    assert len({p for p in drawn if names[p] == "a"}) == 3
    assert [p for p in drawn if names[p] == "c"] == [8, 8]  # there is no other
    later = draw_prompts(np.arange(9), names, 8, np.random.default_rng(0), first=1)
    assert [names[p] for p in later] == list("bcabcabc")
    few = draw_prompts(np.asarray([1, 6]), names, 4, np.random.default_rng(0))
    assert few.tolist() == [1, 6, 1, 6]


@pytest.mark.parametrize(
    "settings",
    [{"every": -1}, {"samples": 0}, {"least": 0}, {"lowest": 0.8, "highest": 0.2},
     {"highest": 1.5}, {"pass_reward": 0.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(JaxherdError, match="filter|pass_reward"):
        PromptFilter(**settings)
