"""Callbacks of training stages that sample from the model."""

import dataclasses
import json
import os
from pathlib import Path
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
      prompts: one continuation each.
      data: whose tokenizer to use; the stage's own when None.
      max_new_tokens, temperature, top_p, seed: of the sampling.
      moments: among "start", "eval" and "end".
    """

    prompts: tuple[str, ...]
    data: Any = None
    max_new_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    moments: tuple[str, ...] = ("start", "end")

    def __call__(self, run: Any, moment: str) -> None:
        """Sample if this is one of the moments (on runs of one process)."""
        if moment not in self.moments:
            return
        if jax.process_count() > 1:
            if jax.process_index() == 0:
                run.context.say("no text is sampled on runs of several processes.")
            return
        path = run.context.folder / "samples.jsonl"
        # A run that was killed after this moment has sampled the same text already.
        kept = [s for s in _samples(path) if s["step"] < run.step or s["moment"] != moment]
        tokenizer = (self.data or run.stage.data).tokenizer()
        module = cast_floating(run.model(), run.stage.step.compute_dtype)
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p)
        requests = [
            Request(
                tuple(tokenizer.encode(p, add_bos=True)), self.max_new_tokens, sampling, self.seed
            )
            for p in self.prompts
        ]
        # A few rows do not divide over a mesh: they are sampled on one device.
        module = jax.device_put(module, run.context.devices[0])
        results = Generator(module, tokenizer).run(requests)
        new = [
            {"step": run.step, "moment": moment, "text": prompt + (result.text or "")}
            for prompt, result in zip(self.prompts, results)
        ]
        partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(
            "".join(json.dumps(sample) + "\n" for sample in [*kept, *new]), encoding="utf-8"
        )
        os.replace(partial, path)
        if not run.context.quiet:
            for sample in new:
                run.context.say(f"--- sampled at step {run.step} ---\n{sample['text']}\n---")


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
