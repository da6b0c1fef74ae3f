"""Rollouts: answers sampled from a policy, their rewards, advantages and log-probabilities.

Rows are those that `jaxherd.methods.policy_optimization` takes: [R, T] with R = N G, the G answers
to a prompt one after the other.  Generation and scoring always have the same number of rows, so
that their programs are compiled once and serve every policy of a run.

Axis letters: N prompts, G answers to one prompt, R rows, T tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxherd.core.batch import BatchField, BatchSpec
from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import cast_floating
from jaxherd.data.packing import ROW_DTYPES, Row, answer_stretch, join_stretches
from jaxherd.data.pipeline import stack_rows
from jaxherd.data.prompt_format import Prompt, PromptFormat
from jaxherd.data.tokenizer_config import padding_id
from jaxherd.data.tokenizers import Tokenizer
from jaxherd.inference.generate import Generator
from jaxherd.inference.requests import Request
from jaxherd.inference.sampling import Sampling
from jaxherd.methods.policy_optimization import group_advantages
from jaxherd.methods.token_scores import token_log_probs

# What a row of tokens has, without the bytes that no objective of RL counts.
_FIELDS = ("tokens", "targets", "positions", "segment_ids", "loss_weights")


def rollout_spec(rows: int, sequence_length: int) -> BatchSpec:
    """Return the batch fields of rollouts."""
    axes = ("batch", "length")
    fields = {name: BatchField((rows, sequence_length), ROW_DTYPES[name], axes) for name in _FIELDS}
    fields["sampled_log_probs"] = BatchField((rows, sequence_length), "float32", axes)
    for name in ("advantages", "rewards"):
        fields[name] = BatchField((rows,), "float32", ("batch",))
    return fields


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      tokens: chosen, the one that stopped it included.
      text: of them, without it.
      stopped: whether it came to its end by itself.
    """

    tokens: tuple[int, ...]
    text: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class AnswerSampler:
    """How a policy is asked.

    Attributes:
      tokenizer: the policy's.
      prompt_format: of prompts.
      max_new_tokens: of one answer; longer ones are cut.
      temperature: 0 takes the likeliest token.
      rows: answers that are sampled at once.
    """

    tokenizer: Tokenizer
    prompt_format: PromptFormat
    max_new_tokens: int
    temperature: float
    rows: int

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the tokens of every prompt."""
        return [tuple(self.prompt_format.prompt_ids(self.tokenizer, p)) for p in prompts]

    def sample(
        self,
        model: Any,
        prompts: Sequence[tuple[int, ...]],
        *,
        key: jax.Array | None = None,
        first_seed: int = 0,
    ) -> list[Answer]:
        """Return an answer to each prompt.

        Args:
          model: a decoder.
          prompts: their tokens.
          key: of the sampling; prompt i uses it folded with `first_seed` + i, whatever else is
            asked at the same time.
          first_seed: see `key`.
        Raises:
          JaxherdError: a prompt and its answer are more than the model's longest sequence.
        """
        generator = Generator(model, stop_ids=self.tokenizer.stop_ids, prepare=False)
        sampling = Sampling(temperature=self.temperature)
        answers: list[Answer] = []
        for begin in range(0, len(prompts), self.rows):
            some = list(prompts[begin : begin + self.rows])
            # Rows that only fill the batch repeat the last prompt; what they give is dropped.
            filled = some + some[-1:] * (self.rows - len(some))
            requests = [
                Request(prompt, self.max_new_tokens, sampling, seed=first_seed + begin + row)
                for row, prompt in enumerate(filled)
            ]
            results = generator.run(requests, key=key)[: len(some)]
            answers += [self._answer(result.tokens) for result in results]
        return answers

    def _answer(self, tokens: Sequence[int]) -> Answer:
        stopped = tokens[-1] in self.tokenizer.stop_ids
        text = self.tokenizer.decode(tokens[:-1] if stopped else tokens)
        return Answer(tuple(tokens), text, stopped)


def answer_rows(
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[Answer],
    sequence_length: int,
    tokenizer: Tokenizer,
) -> Row:
    """Return the rows of prompts and sampled answers, [R, T] each field; answers alone count.

    Raises:
      JaxherdError: a prompt and its answer are longer than a row.
    """
    pad_id, sizes = padding_id(tokenizer), _no_bytes(tokenizer.vocab_size)
    rows = []
    for prompt, answer in zip(prompts, answers):
        if len(prompt) + len(answer.tokens) > sequence_length:
            raise JaxherdError(
                f"a prompt of {len(prompt)} tokens and its answer of {len(answer.tokens)} are more "
                f"than sequence_length={sequence_length}: raise it, or shorten either."
            )
        one = answer_stretch(prompt, answer.tokens, sizes, pad_id)
        rows.append(join_stretches([one], sequence_length, pad_id))
    stacked = stack_rows(rows)
    return {name: stacked[name] for name in _FIELDS}


@functools.lru_cache(maxsize=4)
def _no_bytes(vocabulary: int) -> np.ndarray:
    return np.zeros(vocabulary, np.int32)


def score_rows(
    model: Any, rows: Row, *, temperature: float, batch: int
) -> Float[np.ndarray, "R T"]:
    """Return log p of every counted target under a policy at a temperature; 0 elsewhere.

    Args:
      model: a decoder.
      rows: see `answer_rows`.
      temperature: of the sampling.
      batch: rows that are scored at once.
    """
    count = len(rows["tokens"])
    found = []
    for begin in range(0, count, batch):
        some = {name: value[begin : begin + batch] for name, value in rows.items()}
        missing = batch - len(some["tokens"])
        some = {n: np.concatenate([v, np.repeat(v[-1:], missing, 0)]) for n, v in some.items()}
        scores = np.asarray(_scores(model, some, temperature))
        found.append(np.where(some["loss_weights"] > 0, scores, 0.0)[: batch - missing])
    return np.concatenate(found).astype(np.float32)


@functools.partial(jax.jit, static_argnames="temperature")
def _scores(model: Any, rows: Any, temperature: float) -> jax.Array:
    return token_log_probs(model, rows, temperature=temperature)


def roll_out(
    model: Any,
    sampler: AnswerSampler,
    tasks: Any,
    problems: Sequence[Any],
    *,
    group: int,
    sequence_length: int,
    key: jax.Array,
    normalize: bool = True,
) -> tuple[Row, list[Answer]]:
    """Return G answers to each problem as rows with their rewards, and the answers.

    Fields: those of `rollout_spec`, for N G rows.  sampled_log_probs is under this very model at
    the sampler's temperature; a group of equal rewards has advantages of exactly zero.

    Args:
      model: the policy.
      sampler: how it is asked.
      tasks: has `reward(problem, text)`.
      problems: N of them.
      group: G.
      sequence_length: T.
      key: of the sampling.
      normalize: see `group_advantages`.
    Raises:
      JaxherdError: something is too long, or a reward is outside of [0, 1].
    """
    asked = sampler.prompt_ids([problem.prompt for problem in problems])
    prompts = [prompt for prompt in asked for _ in range(group)]
    answers = sampler.sample(model, prompts, key=key)
    rows = answer_rows(prompts, answers, sequence_length, sampler.tokenizer)
    rewards_NG = rewards_of(tasks, problems, answers, group)
    scored = score_rows(model, rows, temperature=sampler.temperature, batch=sampler.rows)
    made = {
        **rows,
        "sampled_log_probs": scored,
        "advantages": group_advantages(rewards_NG, normalize=normalize).reshape(-1),
        "rewards": rewards_NG.reshape(-1).astype(np.float32),
    }
    return made, answers


def rewards_of(
    tasks: Any, problems: Sequence[Any], answers: Sequence[Answer], group: int
) -> Float[np.ndarray, "N G"]:
    """Return the reward of every answer; G successive ones belong to a problem.

    Raises:
      JaxherdError: one is outside of [0, 1].
    """
    found = np.zeros((len(problems), group))
    for number, answer in enumerate(answers):
        problem = problems[number // group]
        reward = float(tasks.reward(problem, answer.text))
        if not 0 <= reward <= 1:
            raise JaxherdError(
                f"{type(tasks).__name__} gave the reward {reward} for {answer.text[:40]!r}: rewards "
                "lie from 0 to 1."
            )
        found[number // group, number % group] = reward
    return found


def on_one_device(model: Any, device: Any, dtype: str) -> Any:
    """Return the model as a policy is asked: whole on one device, in the dtype of its steps."""
    return jax.device_put(cast_floating(model, jnp.dtype(dtype)), device)
