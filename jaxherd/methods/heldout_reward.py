"""A training callback: the reward of answers to held-out problems, greedy by default."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxherd.data.cache import write_atomically
from jaxherd.methods.rollouts import Answer, AnswerSampler, on_one_device, rewards_of


@dataclasses.dataclass(frozen=True)
class HeldoutReward:
    """Answers every held-out problem at evaluations, the last step's among them.

    Logged are `heldout/reward`, the mean; `heldout/pass`, the share of full rewards;
    `heldout/pass/<capability>`, where there are several.  The answers of the last evaluation are in
    `heldout_answers.jsonl`.  On runs of several processes nothing is measured.

    Attributes:
      tasks: has `problems(split)` and `reward(problem, text)`.
      data: whose tokenizer and prompt format to use; the stage's own when None.
      max_new_tokens: of an answer.
      rows: answers at once.
      temperature: 0 takes the likeliest tokens; above, each answer is drawn with a fixed key.
      name: prefix of the metrics, and of the file of answers.
    """

    tasks: Any
    data: Any = None
    max_new_tokens: int = 32
    rows: int = 128
    temperature: float = 0.0
    name: str = "heldout"

    def __call__(self, run: Any, moment: str) -> Mapping[str, float] | None:
        """Measure if this is an evaluation."""
        if moment != "eval":
            return None
        if jax.process_count() > 1:
            if jax.process_index() == 0:
                run.context.say("no reward is measured on runs of several processes.")
            return None
        data = self.data or run.stage.data
        sampler = AnswerSampler(
            data.tokenizer(),
            data.prompt_format,
            self.max_new_tokens,
            self.temperature,
            self.rows,
        )
        model = on_one_device(run.model(), run.context.devices[0], run.stage.step.compute_dtype)
        problems = list(self.tasks.problems("heldout"))
        answers = sampler.sample(model, sampler.prompt_ids([p.prompt for p in problems]))
        rewards = rewards_of(self.tasks, problems, answers, 1)[:, 0]
        lines = _lines(problems, answers, rewards, run.step)
        write_atomically(run.context.folder / f"{self.name}_answers.jsonl", "".join(lines))
        return self._numbers(problems, rewards)

    def _numbers(self, problems: Sequence[Any], rewards: np.ndarray) -> dict[str, float]:
        passed, names = rewards >= 1, np.asarray([p.capability for p in problems])
        found = {
            f"{self.name}/reward": float(rewards.mean()),
            f"{self.name}/pass": float(passed.mean()),
        }
        each = sorted(set(names.tolist()))
        for name in each if len(each) > 1 else ():
            found[f"{self.name}/pass/{name}"] = float(passed[names == name].mean())
        return found


def _lines(
    problems: Sequence[Any], answers: Sequence[Answer], rewards: np.ndarray, step: int
) -> list[str]:
    return [
        json.dumps(
            {"step": step, "prompt": p.prompt, "text": a.text, "reward": float(r)},
            ensure_ascii=False,
        )
        + "\n"
        for p, a, r in zip(problems, answers, rewards)
    ]
