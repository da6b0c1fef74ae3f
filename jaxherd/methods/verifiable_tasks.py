"""Small tasks whose answers a program can check: prompts, rewards, transcripts to learn from.

An answer stands between tags, `<answer>42</answer>`, and its reward has two parts:

    reward = w [the form is right] + (1 - w) [the form is right and so is what stands inside]

The form is right where a completion has each tag once, in order, and nothing but white space after
the second one; text before the first one is free.  What stands inside is right where it equals the
known answer, white space at its ends aside.  So every reward is 0, w or 1.

Nothing is known about the prompts, verifiers and reward models of Llama 4's RL (llama4.md
section 7): these tasks are jaxherd's, made so that a tiny model of characters can learn them.
"""

import dataclasses
import functools
import hashlib
import pathlib
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.examples import Example, check_messages, is_heldout_prompt, json_lines
from jaxherd.data.prompt_format import Prompt
from jaxherd.data.sources import resolve


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt and the answer to it.

    Attributes:
      prompt: a text or messages.
      answer: what stands between the tags.
      capability: what it takes, such as "addition"; batches mix capabilities evenly.
      level: its difficulty within the capability.
    """

    prompt: Prompt
    answer: str
    capability: str
    level: int = 1


@runtime_checkable
class RewardedProblems(Protocol):
    """What online RL needs of a set of tasks: a frozen dataclass."""

    def problems(self, split: str) -> Sequence[Any]:
        """Return the problems (`prompt` and `capability` each) of "train" or "heldout"."""
        ...

    def reward(self, problem: Any, completion: str) -> float:
        """Return the reward of a completion, from 0 to 1."""
        ...


@dataclasses.dataclass(frozen=True)
class TaggedAnswer:
    """The rule above.

    Attributes:
      tag: its name.
      format_weight: w.
    """

    tag: str = "answer"
    format_weight: float = 0.1

    def __post_init__(self):
        if not self.tag.isalnum():
            raise JaxherdError(f"tag={self.tag!r} must be letters and digits.")
        if not 0 <= self.format_weight < 1:
            raise JaxherdError(f"format_weight={self.format_weight} must lie from 0 to below 1.")

    def wrap(self, answer: str) -> str:
        """Return the shortest completion of the right form."""
        return f"<{self.tag}>{answer}</{self.tag}>"

    def inside(self, completion: str) -> str | None:
        """Return what stands between the tags; None where the form is wrong."""
        opening, closing = f"<{self.tag}>", f"</{self.tag}>"
        if completion.count(opening) != 1 or completion.count(closing) != 1:
            return None
        _, _, rest = completion.partition(opening)
        answer, found, after = rest.partition(closing)
        return answer.strip() if found and not after.strip() else None

    def reward(self, completion: str, answer: str) -> float:
        """Return 0, w or 1."""
        inside = self.inside(completion)
        if inside is None:
            return 0.0
        return 1.0 if inside == answer.strip() else self.format_weight


@dataclasses.dataclass(frozen=True)
class VerifiableTasks:
    """Problems made by programs; the same for the same settings.

    A problem is held out by a hash of its prompt, so that no prompt is on both sides.

    Attributes:
      tasks: (capability, level) pairs; capabilities are the keys of `CAPABILITIES`.
      per_task, heldout_per_task: different prompts of each pair; fewer where no more exist.
      heldout_fraction: share of all prompts that are held out.
      wording: "terse", a few characters ("12+34="); "words", a sentence that also asks for the tags.
      answer: how answers are written and rewarded.
      spoiled: share of the transcripts that teach the worse answer, as text from anywhere does.
      seed: of all draws.
    """

    tasks: tuple[tuple[str, int], ...] = (("addition", 1), ("addition", 2), ("reversal", 3))
    per_task: int = 256
    heldout_per_task: int = 32
    heldout_fraction: float = 0.2
    wording: Literal["terse", "words"] = "terse"
    answer: TaggedAnswer = TaggedAnswer()
    spoiled: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.spoiled <= 1:
            raise JaxherdError(f"spoiled={self.spoiled} must lie from 0 to 1.")
        for capability, level in self.tasks:
            if capability not in CAPABILITIES:
                raise JaxherdError(
                    f"There is no capability {capability!r}: {nearest(capability, CAPABILITIES)}"
                )
            most = len(_RULES) if capability == "instructions" else 12
            if not 1 <= level <= most:
                raise JaxherdError(f"{capability!r} has levels 1 to {most}, not {level}.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise JaxherdError("tasks must name at least one (capability, level), none twice.")
        if min(self.per_task, self.heldout_per_task) < 1 or not 0 < self.heldout_fraction < 1:
            raise JaxherdError(
                "per_task and heldout_per_task must be at least 1, heldout_fraction between 0 and 1."
            )
        if self.wording not in ("terse", "words"):
            raise JaxherdError(
                f"wording={self.wording!r}: {nearest(self.wording, ('terse', 'words'))}"
            )

    def problems(self, split: str) -> tuple[Problem, ...]:
        """Return the problems of "train" or "heldout", task by task."""
        if split not in ("train", "heldout"):
            raise JaxherdError(
                f"There is no split {split!r}: {nearest(split, ('train', 'heldout'))}"
            )
        return _problems(self, split)

    def reward(self, problem: Problem, completion: str) -> float:
        """Return the reward of a completion: 0, `format_weight` or 1."""
        return self.answer.reward(completion, problem.answer)

    def examples(self, split: str, folder: pathlib.Path | None = None) -> list[Example]:
        """Return the problems as transcripts to learn from; their level is their difficulty.

        The rejected answer of each is wrong in one way: another answer, no tags, or words after
        the second tag.  It takes the answer's place where a transcript is spoiled.
        """
        return [
            Example(
                p.prompt,
                self._worse(p) if self._is_spoiled(p) else self.answer.wrap(p.answer),
                rejected=self._worse(p),
                difficulty=float(p.level),
                capability=p.capability,
                where=f"Problem {number} of {p.capability!r}",
            )
            for number, p in enumerate(self.problems(split), 1)
        ]

    def _is_spoiled(self, problem: Problem) -> bool:
        digest = hashlib.sha256(f"is spoiled/{self.seed}/{problem.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.spoiled * 2**64

    def _worse(self, problem: Problem) -> str:
        digest = hashlib.sha256(f"spoiled/{self.seed}/{problem.prompt}".encode()).digest()
        right = self.answer.wrap(problem.answer)
        match digest[0] % 3:
            case 0:
                return self.answer.wrap(_other(problem.answer, digest))
            case 1:
                return problem.answer
        return f"{right} {problem.answer}"


@dataclasses.dataclass(frozen=True)
class AnswerFile:
    """Problems of a JSON Lines file: {"prompt": text or messages, "answer": text}.

    A line may also have "capability" (a word).

    Attributes:
      path: any source that `resolve` takes; may be absent until the problems are read.
      heldout_fraction: the expected share of prompts held out, by each prompt's own text.
      answer: how answers are written and rewarded; prompts must ask for it themselves.
    """

    path: str
    heldout_fraction: float = 0.04
    answer: TaggedAnswer = TaggedAnswer()

    def problems(self, split: str) -> tuple[Problem, ...]:
        """Read the problems of "train" or "heldout".

        Raises JaxherdError naming the file and the first line that is no problem.
        """
        path, found = resolve(self.path), []
        for number, entry in json_lines(path):
            prompt, answer = entry.get("prompt"), entry.get("answer")
            capability = entry.get("capability", "")
            if not isinstance(answer, str) or not isinstance(capability, str):
                raise JaxherdError(
                    f"Line {number} of {str(path)!r} needs texts in 'answer' and 'capability'."
                )
            if not isinstance(prompt, str):
                prompt = check_messages(prompt, f"Line {number} of {str(path)!r}: 'prompt'")
            if is_heldout_prompt(prompt, self.heldout_fraction) == (split == "heldout"):
                found.append(Problem(prompt, answer, capability))
        if not found:
            raise JaxherdError(f"The {split!r} split of {self.path!r} has no problems.")
        return tuple(found)

    def reward(self, problem: Problem, completion: str) -> float:
        """Return the reward of a completion: 0, `format_weight` or 1."""
        return self.answer.reward(completion, problem.answer)


# Draws per wanted prompt before a task is taken to have no more of them.
_PATIENCE = 50


@functools.lru_cache(maxsize=32)
def _problems(config: VerifiableTasks, split: str) -> tuple[Problem, ...]:
    wanted = config.per_task if split == "train" else config.heldout_per_task
    found: list[Problem] = []
    for capability, level in config.tasks:
        digest = hashlib.sha256(f"{config.seed}/{capability}/{level}/{split}".encode()).digest()
        chance = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        mine: dict[str, Problem] = {}
        for _ in range(_PATIENCE * wanted):
            terse, words, answer = CAPABILITIES[capability](chance, level)
            asked = f"{words} Write the answer as {config.answer.wrap('...')}."
            prompt = terse if config.wording == "terse" else asked
            if is_heldout_prompt(prompt, config.heldout_fraction) == (split == "heldout"):
                mine.setdefault(prompt, Problem(prompt, answer, capability, level))
            if len(mine) == wanted:
                break
        if not mine:
            raise JaxherdError(
                f"The {split!r} split has no problem of {capability!r} at level {level}: change "
                "heldout_fraction."
            )
        found += mine.values()
    return tuple(found)


def _number(chance: np.random.Generator, digits: int) -> int:
    return int(chance.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits))


def _word(chance: np.random.Generator, letters: int) -> str:
    return "".join(chance.choice(list(string.ascii_lowercase), letters))


def _addition(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    a, b = _number(chance, level), _number(chance, level)
    return f"{a}+{b}=", f"What is {a} + {b}?", str(a + b)


def _subtraction(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    b, a = sorted((_number(chance, level), _number(chance, level)))
    return f"{a}-{b}=", f"What is {a} - {b}?", str(a - b)


def _multiplication(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    a, b = _number(chance, level), _number(chance, 1)
    return f"{a}*{b}=", f"What is {a} times {b}?", str(a * b)


def _reversal(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    word = _word(chance, level + 1)
    return f"reverse {word}:", f"Write the letters of {word} backwards.", word[::-1]


def _sorting(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    word = _word(chance, level + 1)
    return f"sort {word}:", f"Sort the letters of {word} by the alphabet.", "".join(sorted(word))


def _counting(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    letters = "".join(chance.choice(["a", "b"], level + 1))
    return f"a in {letters}:", f"How many letters a are in {letters}?", str(letters.count("a"))


# What an instruction asks for, and what it makes of a word.
_RULES: dict[str, tuple[str, Callable[[str], str]]] = {
    "caps": ("in capital letters", str.upper),
    "twice": ("twice in a row", lambda w: w + w),
    "dashes": ("with a dash between its letters", "-".join),
    "quotes": ("in double quotes", lambda w: f'"{w}"'),
    "brackets": ("in square brackets", lambda w: f"[{w}]"),
}


def _instructions(chance: np.random.Generator, level: int) -> tuple[str, str, str]:
    word, names = _word(chance, 3), []
    text = word
    for number in chance.permutation(len(_RULES))[:level]:
        name = list(_RULES)[number]
        names.append(name)
        text = _RULES[name][1](text)
    asked = ", then ".join(_RULES[name][0] for name in names)
    return f"{' '.join(names)} {word}:", f"Write {word} {asked}.", text


# Each makes (terse prompt, prompt in words, answer) of a level: digits of the numbers, letters of
# the word less one, or instructions that are to be followed.
CAPABILITIES: dict[str, Callable[[np.random.Generator, int], tuple[str, str, str]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "reversal": _reversal,
    "sorting": _sorting,
    "counting": _counting,
    "instructions": _instructions,
}


def _other(answer: str, digest: bytes) -> str:
    """Return the answer with one character changed, of the same kind."""
    place = digest[1] % len(answer)
    kinds = (string.digits, string.ascii_lowercase, string.ascii_uppercase, string.punctuation)
    kind = next((k for k in kinds if answer[place] in k), string.ascii_lowercase)
    choices = [c for c in kind if c != answer[place] and c not in "<>/"]
    return answer[:place] + choices[digest[2] % len(choices)] + answer[place + 1 :]
