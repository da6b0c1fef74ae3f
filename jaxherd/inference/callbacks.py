"""Callbacks of training stages that sample from the model."""

import dataclasses
import json
from typing import Any

import jax

from jaxherd.core.modules import cast_floating
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class SampleText:
    """Continue prompts before and after training (and at evaluations, if asked for).

    The text is printed and kept in `samples.jsonl`, from where the report takes it.

    Attributes:
      data: the stage's data; its tokenizer is used.
      prompts: one continuation each.
      max_new_tokens, temperature, top_p, seed: of the sampling.
      moments: among "start", "eval" and "end".
    """

    data: Any
    prompts: tuple[str, ...]
    max_new_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    moments: tuple[str, ...] = ("start", "end")

    def __call__(self, run: Any, moment: str) -> None:
        """Sample if this is one of the moments (on runs of one process)."""
        if moment not in self.moments or jax.process_count() > 1:
            return
        tokenizer = self.data.tokenizer()
        module = cast_floating(run.model(), run.stage.step.compute_dtype)
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p)
        requests = [
            Request(
                tuple(tokenizer.encode(p, add_bos=True)), self.max_new_tokens, sampling, self.seed
            )
            for p in self.prompts
        ]
        with run.program.partitioner.activate():
            results = Generator(module, tokenizer).run(requests)
        path = run.context.folder / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for prompt, result in zip(self.prompts, results):
                text = prompt + (result.text or "")
                file.write(json.dumps({"step": run.step, "text": text}) + "\n")
                if not run.context.quiet:
                    run.context.say(f"--- sampled at step {run.step} ---\n{text}\n---")
