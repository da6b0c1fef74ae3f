"""Examples of prompts with answers: from a JSON Lines file, and the filter for hard ones.

A line is an object in one of three forms, and may also have "difficulty" (a number, higher is
harder) and "capability" (a word):

    {"prompt": P, "completion": text}
    {"messages": [..., {"role": "assistant", "content": text}]}     earlier turns are the prompt
    {"prompt": P, "chosen": text, "rejected": text}

where P is a text or a list of messages with role and content.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxherd.core.errors import JaxherdError
from jaxherd.data.prompt_format import Prompt
from jaxherd.data.sources import beside, resolve


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with what to answer.

    Attributes:
      prompt: a text or messages.
      answer: the one to learn, or the better one of a pair.
      rejected: the worse one of a pair; None in fine-tuning.
      difficulty: higher is harder; None where nobody has judged it.
      capability: what it takes, such as "addition".
      where: what messages call it.
    """

    prompt: Prompt
    answer: str
    rejected: str | None = None
    difficulty: float | None = None
    capability: str = ""
    where: str = ""


@runtime_checkable
class ExampleSource(Protocol):
    """Where examples come from: a frozen dataclass.

    One that reads an artifact of an earlier stage names it in an attribute `stage`; its folder is
    then given.
    """

    def examples(self, split: str, folder: pathlib.Path | None = None) -> Sequence[Example]:
        """Return the examples of "train" or "heldout", the same at every call."""
        ...


@dataclasses.dataclass(frozen=True)
class ExampleFile:
    """A JSON Lines file in the forms above.

    Attributes:
      path: any source that `resolve` takes; may be absent until the data is built.
      stage: the earlier stage in whose folder `path` lies; None for a path of its own.
      heldout_fraction: the expected share of prompts held out, decided by each prompt's own text
        and by nothing else, so that all sources with one fraction agree; 0 holds none out.
      prompt_field, answer_field, chosen_field, rejected_field, messages_field: names in the lines.
    """

    path: str
    stage: str | None = None
    heldout_fraction: float = 0.04
    prompt_field: str = "prompt"
    answer_field: str = "completion"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    messages_field: str = "messages"

    def __post_init__(self):
        if not 0 <= self.heldout_fraction < 1:
            raise JaxherdError(
                f"heldout_fraction={self.heldout_fraction} must lie from 0 to below 1."
            )

    def provenance_folders(self) -> list[pathlib.Path]:
        """Return the folder of a file of the user's: answers of a model have that model's origin."""
        return [] if self.stage is not None else beside(self.path)

    def examples(self, split: str, folder: pathlib.Path | None = None) -> list[Example]:
        """Read the lines of one split.

        Raises JaxherdError naming the file and the first line that is no example.
        """
        if self.stage is None:
            path = resolve(self.path)
        elif folder is None:
            raise JaxherdError(
                f"{self.path!r} lies in the folder of stage {self.stage!r}: read it."
            )
        else:
            path = resolve(str(folder / self.path))
        found = []
        for number, entry in json_lines(path):
            example = self._example(entry, f"Line {number} of {str(path)!r}")
            if is_heldout_prompt(example.prompt, self.heldout_fraction) == (split == "heldout"):
                found.append(example)
        return found

    def _example(self, entry: dict[str, Any], where: str) -> Example:
        f = self
        if f.messages_field in entry:
            messages = check_messages(entry[f.messages_field], f"{where}: {f.messages_field!r}")
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise JaxherdError(
                    f"{where}: {f.messages_field!r} must be a prompt and, last, the assistant's "
                    "answer."
                )
            prompt, answer, rejected = messages[:-1], messages[-1]["content"], None
        else:
            prompt = entry.get(f.prompt_field)
            if not isinstance(prompt, str):
                prompt = check_messages(prompt, f"{where}: {f.prompt_field!r}")
            pair = f.chosen_field in entry or f.rejected_field in entry
            names = (f.chosen_field, f.rejected_field) if pair else (f.answer_field,)
            for name in names:
                if not isinstance(entry.get(name), str):
                    raise JaxherdError(f"{where} has no text in the field {name!r}.")
            answer, rejected = entry[names[0]], entry[names[1]] if pair else None
        return Example(
            prompt,
            answer,
            rejected,
            _difficulty(entry.get("difficulty"), where),
            _word(entry.get("capability", ""), where),
            where,
        )


def json_lines(path: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    """Return (number, object) of every line of a file that is not blank.

    Raises JaxherdError naming the file and the first line that holds no object.
    """
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise JaxherdError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise JaxherdError(f"Line {number} of {str(path)!r} is no JSON ({error}).") from error
        if not isinstance(entry, dict):
            raise JaxherdError(f"Line {number} of {str(path)!r} is no JSON object.")
        found.append((number, entry))
    return found


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a value that is a list of messages with role and content, one at least.

    Raises JaxherdError, beginning with `where`, if it is not.
    """
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(
        isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise JaxherdError(f"{where} is neither a text nor messages with role and content.")
    return value


def is_heldout_prompt(prompt: Prompt, fraction: float) -> bool:
    """Return whether a prompt is held out, which its own text decides."""
    text = prompt if isinstance(prompt, str) else json.dumps([dict(m) for m in prompt])
    digest = hashlib.sha256(f"heldout prompt/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def keep_hardest(difficulty: Sequence[float | int], fraction: float) -> list[int]:
    """Return the places of the hardest `fraction`, in their order.

    Of n examples exactly floor(fraction n + 1/2) are kept, and one at least.  Where the difficulty
    of the last one kept is shared by others, those that come first stay.

    Args:
      difficulty: of each example, higher is harder.
      fraction: above 0, at most 1.
    """
    if not 0 < fraction <= 1:
        raise JaxherdError(f"keep_hardest={fraction} must be above 0 and at most 1.")
    count = max(1, math.floor(fraction * len(difficulty) + 0.5))
    ranked = sorted(range(len(difficulty)), key=lambda place: (-difficulty[place], place))
    return sorted(ranked[:count])


def hardest_examples(examples: Sequence[Example], fraction: float) -> list[Example]:
    """Return the hardest `fraction` of the examples (`keep_hardest`); 1 keeps all, judged or not.

    Raises JaxherdError naming the first example whose difficulty nobody has judged.
    """
    if fraction == 1:
        return list(examples)
    difficulty = []
    for number, example in enumerate(examples, 1):
        if example.difficulty is None:
            raise JaxherdError(
                f"{example.where or f'Example {number}'} has no difficulty, which "
                f"keep_hardest={fraction} goes by: add it, or keep all with keep_hardest=1."
            )
        difficulty.append(example.difficulty)
    return [examples[place] for place in keep_hardest(difficulty, fraction)]


def examples_digest(examples: Sequence[Example]) -> str:
    """Return a hash of what the examples say, in order."""
    digest = hashlib.sha256()
    for e in examples:
        prompt = e.prompt if isinstance(e.prompt, str) else [dict(m) for m in e.prompt]
        data = json.dumps([prompt, e.answer, e.rejected, e.difficulty]).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def source_folder(
    source: Any, artifacts: Mapping[str, os.PathLike[str]] | None
) -> pathlib.Path | None:
    """Return the folder of the stage that a source reads; None where it reads none.

    Raises JaxherdError if the stage's folder was not given.
    """
    stage = getattr(source, "stage", None)
    if stage is None:
        return None
    if artifacts is None or stage not in artifacts:
        raise JaxherdError(f"the examples lie in the folder of the stage {stage!r}: read it.")
    return pathlib.Path(artifacts[stage])


def _difficulty(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JaxherdError(f"{where}: the difficulty {value!r} is no number.")
    return float(value)


def _word(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise JaxherdError(f"{where}: the capability {value!r} is no text.")
    return value
