"""A stage that makes preference pairs of a policy's own answers: the best and the worst of a group.

Where the pairs of Llama 4's DPO came from is not disclosed (llama4.md section 7).  Pairs that the
policy itself gives teach it about mistakes that it makes, and about no others.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import StageContext
from jaxherd.data.cache import write_atomically
from jaxherd.data.corpus import SPLITS
from jaxherd.data.tokenizers import Tokenizer
from jaxherd.methods.online_rl import PolicyRollouts
from jaxherd.methods.rollouts import Answer, AnswerSampler, on_one_device, rewards_of
from jaxherd.weights.trained import load_trained

FILE = "pairs.jsonl"


@dataclasses.dataclass(frozen=True)
class SamplePairs:
    """Writes `pairs.jsonl`, lines of prompt, chosen and rejected (`jaxherd.data.examples`).

    The prompts are those of both splits, the held-out ones after the others: `ExampleFile` with the
    tasks' own `heldout_fraction` parts them again in the same way.

    Of a group of answers to a prompt the first one with the highest reward is chosen, and
    the first one with the lowest is rejected.  Answers that were cut, or that their own text would
    not give again, take no part; a group of equal rewards gives no pair.

    Attributes:
      name: of the stage.
      policy: the earlier stage whose last parameters answer.
      rollouts: tasks, tokenizer, group and lengths.
      temperature: of the sampling.
      dtype: in which the policy computes.
    """

    name: str
    policy: str
    rollouts: PolicyRollouts
    temperature: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        if self.temperature <= 0:
            raise JaxherdError(
                f"{self.name}: temperature={self.temperature} must be positive, or all answers of "
                "a group are one."
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """The policy's stage."""
        return (self.policy,)

    def check(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> None:
        """Raise JaxherdError on several processes."""
        if jax.process_count() > 1:
            raise JaxherdError(
                f"{self.name}: answers are sampled by one process and this run has "
                f"{jax.process_count()}: run this stage on one."
            )

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Sample, pair and write.

        Raises:
          JaxherdError: no group has two different rewards.
        """
        data, tokenizer = self.rollouts, self.rollouts.tokenizer()
        model = load_trained(context.artifacts[self.policy])
        sampler = AnswerSampler(
            tokenizer, data.prompt_format, data.max_new_tokens, self.temperature, data.rows
        )
        problems = [p for split in SPLITS for p in data.tasks.problems(split)]
        prompts = sampler.prompt_ids([problem.prompt for problem in problems])
        answers = sampler.sample(
            on_one_device(model, context.devices[0], self.dtype),
            [prompt for prompt in prompts for _ in range(data.group)],
            key=jax.random.key(context.seed),
        )
        rewards = rewards_of(data.tasks, problems, answers, data.group)
        lines = []
        for number, problem in enumerate(problems):
            group = answers[number * data.group : (number + 1) * data.group]
            pair = self._pair(problem, group, rewards[number], tokenizer)
            if pair is not None:
                lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
        if not lines:
            raise JaxherdError(
                f"{self.name}: the policy earns the same with all {data.group} answers to each of "
                f"{len(problems)} prompts, so that there is nothing to prefer: raise "
                "rollouts.group, or give harder tasks."
            )
        write_atomically(context.folder / FILE, "".join(lines))
        context.say(f"{self.name}: {len(lines)} pairs of {len(problems)} prompts.")
        return {"pairs": len(lines), "prompts": len(problems), "reward": float(rewards.mean())}

    def _pair(
        self, problem: Any, group: Sequence[Answer], rewards: np.ndarray, tokenizer: Tokenizer
    ) -> dict[str, Any] | None:
        form = self.rollouts.prompt_format
        usable = [
            place
            for place, answer in enumerate(group)
            if answer.stopped
            and tuple(form.answer_ids(tokenizer, problem.prompt, answer.text)) == answer.tokens
        ]
        if not usable:
            return None
        best = max(usable, key=lambda place: rewards[place])
        worst = min(usable, key=lambda place: rewards[place])
        if rewards[best] == rewards[worst]:
            return None
        return {
            "prompt": problem.prompt,
            "chosen": group[best].text,
            "rejected": group[worst].text,
            "capability": problem.capability,
        }
