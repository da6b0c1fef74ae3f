"""Callbacks of training stages that sample from the model."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SampleText:
    """Continue a prompt before and after training (and at evaluations, if asked for).

    The text is printed and kept in `samples.jsonl`, from where the report takes it.
    """

    data: Any
    prompt: str
    max_new_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.95
    moments: tuple[str, ...] = ("start", "end")

    def __call__(self, run: Any, moment: str) -> None:
        """Sample if this is one of the moments."""
