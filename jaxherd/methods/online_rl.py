"""Online RL as data: batches are what the model in training answers to prompts just then.

A round samples G answers to each of N prompts from the current parameters and is then trained on
for a few optimiser steps.  Every few rounds the pass rate of all prompts is estimated anew, and
those of medium and high difficulty stay (`jaxherd.methods.prompt_filter`).  That Llama 4 alternates
so is disclosed; the algorithm, its settings and its rewards are not (llama4.md section 7).

What a round holds, and what a filter decided, is in the stage's folder before it is used.  A run
killed at any moment goes on with the same batches: the iterator's state names the round and the
place in it, rounds that are there are read, and others are sampled from the parameters that the
checkpoint holds.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import write_json
from jaxherd.data.packing import Row
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizer_config import Bytes, TokenizerFile, given_tokenizer
from jaxherd.data.tokenizers import Tokenizer
from jaxherd.methods.prompt_filter import PromptFilter, draw_prompts
from jaxherd.methods.rollout_files import read_filter, read_round, write_round
from jaxherd.methods.rollouts import (
    AnswerSampler,
    on_one_device,
    rewards_of,
    roll_out,
    rollout_spec,
)

STATE_FORMAT = 1
FOLDER = "rollouts"


@dataclasses.dataclass(frozen=True)
class PolicyRollouts:
    """Batches for `GroupPolicyOptimization`, whose temperature is that of the sampling.

    Batch fields: see `jaxherd.methods.rollouts.rollout_spec`.  A minibatch holds whole groups, the
    capabilities by turns.  Prompts whose answers all earn the same have advantages of exactly zero,
    and with the objective's `skip_equal_groups` no weight.

    The policy is copied to the first device to sample, so that its weights must fit there, and one
    process does it all.

    Attributes:
      tasks: has `problems(split)` and `reward(problem, text)`
        (`jaxherd.methods.verifiable_tasks.RewardedProblems`).
      tokenizer_config: TokenizerFile or Bytes: what the model was trained with.
      prompt_format: plain text or the tokenizer's chat template.
      prompts, group: N and G of a round.
      batch_size: answers of an optimiser step, a multiple of `group`.
      epochs: passes over a round: prompts * group * epochs / batch_size steps a round.
      max_new_tokens: of an answer.
      sequence_length: T, of a prompt and its answer.
      rows: answers that are sampled at once.
      normalize: divide advantages by the spread of their group.
      filter: which prompts stay.
    """

    tasks: Any
    tokenizer_config: TokenizerFile | Bytes = Bytes()
    prompt_format: PromptFormat = PromptFormat()
    prompts: int = 16
    group: int = 8
    batch_size: int = 64
    epochs: int = 1
    max_new_tokens: int = 32
    sequence_length: int = 64
    rows: int = 128
    normalize: bool = True
    filter: PromptFilter = PromptFilter()

    def __post_init__(self):
        for name in ("prompts", "batch_size", "epochs", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise JaxherdError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.group < 2:
            raise JaxherdError(f"group={self.group}: an answer is judged against others, take 2.")
        if self.batch_size % self.group or self.prompts * self.group % self.batch_size:
            raise JaxherdError(
                f"batch_size={self.batch_size} must hold whole groups of {self.group} and divide "
                f"the {self.prompts * self.group} answers of a round."
            )
        if self.max_new_tokens >= self.sequence_length:
            raise JaxherdError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"sequence_length={self.sequence_length}."
            )

    @property
    def vocab_size(self) -> int | None:
        """Return the vocabulary size as configured; None for an undeclared file."""
        return self.tokenizer_config.vocab_size

    @property
    def steps_per_round(self) -> int:
        """Return the optimiser steps of a round."""
        return self.prompts * self.group * self.epochs // self.batch_size

    def batch_spec(self) -> BatchSpec:
        """Return the global shapes of a batch; does no input or output."""
        return rollout_spec(self.batch_size, self.sequence_length)

    def tokenizer(self, *, cache_dir: str | os.PathLike[str] | None = None) -> Tokenizer:
        """Return the tokenizer.

        Raises JaxherdError if its file is missing or has another vocabulary than declared.
        """
        return given_tokenizer(self.tokenizer_config, cache_dir=cache_dir)

    def export(
        self, folder: os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        """Write the tokenizer to a folder, from where a model of this data is used."""
        self.tokenizer(cache_dir=cache_dir).save(folder)

    def build(
        self,
        *,
        split: str,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> "PolicyBatches":
        """Open the data, endless, of the split "train" alone; a training stage attaches itself.

        Raises:
          JaxherdError: another split, several processes, no problems, or prompts that leave no room
            for an answer.
        """
        if split != "train":
            raise JaxherdError(
                f"Rollouts have no {split!r} split: measure with the callback HeldoutReward."
            )
        if process_count > 1:
            raise JaxherdError(
                f"Rollouts are sampled by one process and this run has {process_count}: run the "
                "stage on one."
            )
        return PolicyBatches(self, self.tokenizer(cache_dir=cache_dir), seed)


class PolicyBatches:
    """The iterator; see the head of the file.

    Args:
      config: what to sample.
      tokenizer: the policy's.
      seed: of prompts and answers.
    """

    def __init__(self, config: PolicyRollouts, tokenizer: Tokenizer, seed: int):
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._problems = list(config.tasks.problems("train"))
        if not self._problems:
            raise JaxherdError("The 'train' split of the tasks has no problems.")
        self._capabilities = [problem.capability for problem in self._problems]
        lengths = [
            len(config.prompt_format.prompt_ids(tokenizer, p.prompt)) for p in self._problems
        ]
        if max(lengths) + config.max_new_tokens > config.sequence_length:
            raise JaxherdError(
                f"the longest prompt has {max(lengths)} tokens, which with max_new_tokens="
                f"{config.max_new_tokens} is more than sequence_length={config.sequence_length}."
            )
        asked = [
            (p.prompt if isinstance(p.prompt, str) else [dict(m) for m in p.prompt], p.capability)
            for p in self._problems
        ]
        parts = (json.dumps(asked), tokenizer.fingerprint(), repr(config), str(seed))
        self._fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]
        self._running: Any = None
        self._round, self._place = 0, 0
        self._pool: _Pool | None = None

    def attach(self, running: Any) -> None:
        """Take the stage at work, whose model answers.

        Raises:
          JaxherdError: the stage's objective has no temperature to sample at.
        """
        objective = running.stage.objective
        if not hasattr(objective, "temperature"):
            raise JaxherdError(
                f"{running.stage.name}: rollouts need an objective with a temperature, such as "
                f"GroupPolicyOptimization, not {type(objective).__name__}."
            )
        self._running = running

    def __iter__(self) -> "PolicyBatches":
        return self

    def __next__(self) -> Row:
        config = self._config
        if self._pool is None or self._pool.number != self._round:
            self._pool = self._open_round()
        batch = rollout_take(self._pool, self._place, config.batch_size)
        self._place += 1
        if self._place == config.steps_per_round:
            self._round, self._place = self._round + 1, 0
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the round and the place in it that come next."""
        return {
            "format": STATE_FORMAT,
            "data": self._fingerprint,
            "round": self._round,
            "place": self._place,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position; raises JaxherdError if it belongs to other data."""
        if state.get("format") != STATE_FORMAT or state.get("data") != self._fingerprint:
            raise JaxherdError(
                "The saved position belongs to other rollouts: tasks, tokenizer, seed or settings "
                "changed since; start anew or restore the old settings."
            )
        self._round, self._place = int(state["round"]), int(state["place"])
        self._pool = None

    def describe(self) -> dict[str, Any]:
        """Return what a log should say about this data."""
        names = dict.fromkeys(self._capabilities)
        return {
            "problems": {name or "all": self._capabilities.count(name) for name in names},
            "steps_per_round": self._config.steps_per_round,
        }

    def _open_round(self) -> "_Pool":
        """Return the current round: from its file, or sampled now and written."""
        if self._running is None:
            raise JaxherdError(
                "Rollouts come from the model in training: they are there within a training stage."
            )
        path = self._folder / f"round-{self._round:06d}.npz"
        if path.exists():
            rows = read_round(path, self._fingerprint)
        elif self._place:
            raise JaxherdError(
                f"{path} is gone, in the middle of which the checkpoint stands: bring it back, or "
                "start anew in another --workdir."
            )
        else:
            rows = self._sample_round()
            write_round(path, self._fingerprint, rows)
        drawn = [self._capabilities[place] for place in rows.pop("problems")]
        config, seed = self._config, (self._seed, self._round)
        return _Pool(self._round, rows, row_order(drawn, config.group, config.epochs, seed))

    def _sample_round(self) -> Row:
        config, number = self._config, self._round
        kept = self._kept(number)
        chance = np.random.default_rng((self._seed, number))
        drawn = draw_prompts(kept, self._capabilities, config.prompts, chance, first=number)
        rows, _ = roll_out(
            self._policy(),
            self._sampler(),
            config.tasks,
            [self._problems[place] for place in drawn],
            group=config.group,
            sequence_length=config.sequence_length,
            key=self._key(0, number),
            normalize=config.normalize,
        )
        return {**rows, "problems": drawn}

    def _kept(self, number: int) -> np.ndarray:
        """Return the places of the prompts that the filter of this round's period keeps."""
        rule = self._config.filter
        if not rule.every:
            return np.arange(len(self._problems))
        path = self._folder / f"filter-{rule.period(number):06d}.json"
        if not path.exists():
            if not rule.begins(number):
                raise JaxherdError(
                    f"{path} is gone, which says the prompts of round {number}: bring it back, or "
                    "start anew in another --workdir."
                )
            rates = self._estimate(rule.period(number))
            kept = rule.kept(rates, self._capabilities)
            record = {
                "data": self._fingerprint,
                "round": number,
                "pass_rates": rates.tolist(),
                "kept": kept.tolist(),
            }
            write_json(path, record)
            self._running.context.say(self._told(number, rates, kept))
        return read_filter(path, self._fingerprint)

    def _estimate(self, period: int) -> np.ndarray:
        """Return the pass rate of every prompt with the current policy."""
        rule, sampler = self._config.filter, self._sampler()
        prompts = sampler.prompt_ids([p.prompt for p in self._problems])
        asked = [prompt for prompt in prompts for _ in range(rule.samples)]
        answers = sampler.sample(self._policy(), asked, key=self._key(1, period))
        rewards_Nk = rewards_of(self._config.tasks, self._problems, answers, rule.samples)
        return rule.pass_rates(rewards_Nk)

    def _told(self, number: int, rates: np.ndarray, kept: np.ndarray) -> str:
        names = list(dict.fromkeys(self._capabilities))
        chosen = [self._capabilities[place] for place in kept]
        shares = ", ".join(
            f"{name or 'all'} {chosen.count(name)}/{self._capabilities.count(name)}"
            for name in names
        )
        return (
            f"{self._running.stage.name}, round {number}: pass rate {rates.mean():.3f}; "
            f"{len(kept)} of {len(rates)} prompts stay ({shares})."
        )

    def _policy(self) -> Any:
        run = self._running
        return on_one_device(
            run.trained_model(), run.context.devices[0], run.stage.step.compute_dtype
        )

    def _sampler(self) -> AnswerSampler:
        return AnswerSampler(
            self._tokenizer,
            self._config.prompt_format,
            self._config.max_new_tokens,
            self._running.stage.objective.temperature,
            self._config.rows,
        )

    def _key(self, *path: int) -> jax.Array:
        key = jax.random.key(self._seed)
        for number in path:
            key = jax.random.fold_in(key, number)
        return key

    @property
    def _folder(self) -> Path:
        return self._running.context.folder / FOLDER


@dataclasses.dataclass(frozen=True)
class _Pool:
    """A round: its number, its rows, and the order in which they are trained on."""

    number: int
    rows: Row
    order: np.ndarray


def rollout_take(pool: _Pool, place: int, size: int) -> Row:
    """Return the minibatch at a place of a round."""
    rows = pool.order[place * size : (place + 1) * size]
    return {name: value[rows] for name, value in pool.rows.items()}


def row_order(
    capabilities: Sequence[str], group: int, epochs: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Return the rows of a round in the order in which they are trained on.

    Groups stay whole.  The first pass takes them as they were drawn, capabilities by turns; later
    ones move them about among the places of their own capability.

    Args:
      capabilities: of the round's prompts, in the order of their groups.
      group: rows of a prompt.
      epochs: passes.
      seed: of later passes.
    """
    names, passes = np.asarray(capabilities), []
    for epoch in range(epochs):
        chance = np.random.default_rng((*seed, epoch))
        order = np.arange(len(names))
        for name in sorted(set(capabilities)) if epoch else ():
            places = np.flatnonzero(names == name)
            order[places] = chance.permutation(places)
        passes.append(order)
    return (np.concatenate(passes)[:, None] * group + np.arange(group)).reshape(-1)
