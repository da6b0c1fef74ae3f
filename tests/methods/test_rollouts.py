"""Sampled answers as rows: what they hold, whose log-probabilities, and how often one compiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference import steps
from jaxherd.methods.rollouts import AnswerSampler, answer_rows, roll_out, rollout_spec
from tests.methods.tiny_policy import Letters, policy

N, G, T, NEW, TEMPERATURE = 3, 4, 24, 6, 0.7
SAMPLER = AnswerSampler(ByteTokenizer(), PromptFormat(), NEW, TEMPERATURE, rows=8)


@pytest.fixture(scope="module")
def made():
    problems = Letters().problems("train")[:N]
    return problems, *roll_out(
        policy(), SAMPLER, Letters(), problems, group=G, sequence_length=T, key=jax.random.key(1)
    )


def test_rows_hold_what_was_asked_and_answered(made):
    problems, rows, answers = made
    batch_lib.check(rows, rollout_spec(N * G, T))
    for r, answer in enumerate(answers):
        prompt = SAMPLER.prompt_ids([problems[r // G].prompt])[0]
        length = len(prompt) + len(answer.tokens)
        assert rows["tokens"][r][:length].tolist() == [*prompt, *answer.tokens]
        assert rows["segment_ids"][r].tolist() == [1] * length + [0] * (T - length)
        chosen = rows["targets"][r][rows["loss_weights"][r] > 0]
        assert chosen.tolist() == list(answer.tokens)
        assert answer.stopped == (answer.tokens[-1] == 258)
        assert rows["rewards"][r] == np.float32(Letters().reward(None, answer.text))
        assert rows["sampled_log_probs"][r][rows["loss_weights"][r] == 0].tolist() == [0.0] * (
            T - len(answer.tokens)
        )
    assert len({answer.tokens for answer in answers}) > N * G // 2


def test_log_probs_are_those_of_the_policy_that_chose(made):
    """Recomputed from whole logits of single answers without padding, over the temperature."""
    _, rows, _ = made
    for r in (0, 5, 11):
        length = int(rows["segment_ids"][r].sum())
        targets, counted = rows["targets"][r, :length], rows["loss_weights"][r, :length] > 0
        logits = policy()(jnp.asarray(rows["tokens"][r : r + 1, :length]))[0]
        for temperature, agree in ((TEMPERATURE, True), (1.0, False)):
            scores = np.asarray(jax.nn.log_softmax(logits / temperature, axis=-1))
            wanted = scores[np.arange(length), targets]
            difference = np.abs(rows["sampled_log_probs"][r, :length] - wanted)[counted].max()
            assert difference < 1e-4 if agree else difference > 0.01


def test_groups_of_equal_rewards_have_no_advantage(made):
    _, rows, _ = made
    rewards, advantages = (rows[name].reshape(N, G) for name in ("rewards", "advantages"))
    for reward, advantage in zip(rewards, advantages):
        if len(set(reward)) == 1:
            assert not advantage.any()
        else:
            assert abs(advantage.sum()) < 1e-5 and advantage[reward.argmax()] > 0


def test_an_answer_depends_on_its_prompt_and_number_alone():
    prompts = SAMPLER.prompt_ids([p.prompt for p in Letters().problems("train")])[:5]
    key = jax.random.key(3)
    whole = SAMPLER.sample(policy(), prompts, key=key)
    assert SAMPLER.sample(policy(), prompts[:2], key=key) == whole[:2]
    assert SAMPLER.sample(policy(), prompts[2:], key=key, first_seed=2) == whole[2:]
    assert SAMPLER.sample(policy(), prompts, key=jax.random.key(4)) != whole
    greedy = dataclasses.replace(SAMPLER, temperature=0.0)
    assert greedy.sample(policy(), prompts) == greedy.sample(policy(), prompts, key=key)


def test_one_compilation_serves_every_policy(made):
    before = dict(steps.traces)
    for seed, count in ((5, 2), (6, 3)):
        problems = Letters().problems("train")[:count]
        roll_out(
            policy(seed), SAMPLER, Letters(), problems, group=G, sequence_length=T,
            key=jax.random.key(seed),
        )  # fmt: skip
    assert steps.traces == before


def test_what_cannot_be_is_told():
    class Wrong(Letters):
        def reward(self, problem, completion):
            return 2.0

    problems = Letters().problems("train")[:1]
    options: dict[str, Any] = dict(group=2, key=jax.random.key(0))
    with pytest.raises(JaxherdError, match="Wrong gave the reward 2.0"):
        roll_out(policy(), SAMPLER, Wrong(), problems, sequence_length=T, **options)
    answers = SAMPLER.sample(policy(), [(1, 2, 3)])
    with pytest.raises(JaxherdError, match="more than sequence_length=4"):
        answer_rows([(1, 2, 3)], answers, 4, ByteTokenizer())
