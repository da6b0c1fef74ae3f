"""Results that Meta published of Llama 4, as data beside which a run of one's own is printed.

Developer-reported, of bfloat16 models; nothing here was measured by jaxherd, and the released models are too
large for it to try.  A row compares with a run only in the same setting: shots, split and metric are part of
it.  llama4.md section 8; [CARD] is Meta's model card.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

Kind = Literal["pretrained", "instruct"]

CARD = "[CARD] Llama 4 model card"
BEHEMOTH = "ai-tldr.dev model page, of the preview"
PRETRAINED = ("Llama 3.1 70B", "Llama 3.1 405B", "Llama 4 Scout", "Llama 4 Maverick")
INSTRUCT = ("Llama 3.3 70B", "Llama 3.1 405B", "Llama 4 Scout", "Llama 4 Maverick")
PREVIEW = "Llama 4 Behemoth (preview)"

# What must not be quoted as a result of the released models.
CAVEAT = (
    "LMArena's Elo of 1417 belonged to an experimental chat variant of Maverick, not to the released "
    "checkpoint: it is no figure of Maverick's (besthub.dev)."
)


@dataclasses.dataclass(frozen=True)
class Published:
    """One figure.

    Attributes:
      model: as its developer calls it.
      kind: pretrained or instruct.
      benchmark: with its variant.
      shots: examples before the question; None where the source does not say.
      metric: what the figure counts.
      value: as published.
      source: where it stands.
    """

    model: str
    kind: Kind
    benchmark: str
    shots: int | None
    metric: str
    value: float
    source: str = CARD


# (benchmark, shots, metric, figures in the order of the models above; None where none is published).
_Row = tuple[str, int | None, str, tuple[float | None, ...]]

_PRETRAINED: tuple[_Row, ...] = (
    ("MMLU", 5, "macro average accuracy, %", (79.3, 85.2, 79.6, 85.5)),
    ("MMLU-Pro", 5, "macro average exact match, %", (53.8, 61.6, 58.2, 62.9)),
    ("MATH", 4, "exact match, %", (41.6, 53.5, 50.3, 61.2)),
    ("MBPP", 3, "pass@1, %", (66.4, 74.4, 67.8, 77.6)),
    ("TydiQA", 1, "average F1, %", (29.9, 34.3, 31.5, 31.7)),
    ("ChartQA", 0, "relaxed accuracy, %", (None, None, 83.4, 85.3)),
    ("DocVQA", 0, "ANLS, %", (None, None, 89.4, 91.6)),
)
_INSTRUCT: tuple[_Row, ...] = (
    ("MMMU", 0, "accuracy, %", (None, None, 69.4, 73.4)),
    ("MMMU-Pro (mean of Standard and Vision)", 0, "accuracy, %", (None, None, 52.2, 59.6)),
    ("MathVista", 0, "accuracy, %", (None, None, 70.7, 73.7)),
    ("ChartQA", 0, "relaxed accuracy, %", (None, None, 88.8, 90.0)),
    ("DocVQA (test)", 0, "ANLS, %", (None, None, 94.4, 94.4)),
    ("LiveCodeBench (10/2024 to 02/2025)", 0, "pass@1, %", (33.3, 27.7, 32.8, 43.4)),
    ("MMLU-Pro", 0, "macro average accuracy, %", (68.9, 73.4, 74.3, 80.5)),
    ("GPQA Diamond", 0, "accuracy, %", (50.5, 49.0, 57.2, 69.8)),
    ("MGSM", 0, "average exact match, %", (91.1, 91.6, 90.6, 92.3)),
    ("MTOB (half book) en to kgv", 0, "chrF", (None, None, 42.2, 54.0)),
    ("MTOB (half book) kgv to en", 0, "chrF", (None, None, 36.6, 46.4)),
    ("MTOB (full book) en to kgv", 0, "chrF", (None, None, 39.7, 50.8)),
    ("MTOB (full book) kgv to en", 0, "chrF", (None, None, 36.3, 46.7)),
)
_PREVIEW: tuple[tuple[str, str, float], ...] = (
    ("MATH-500", "%", 95.0),
    ("MMLU-Pro", "%", 82.2),
    ("GPQA Diamond", "%", 73.7),
    ("MMMU", "%", 76.1),
    ("Multilingual MMLU", "%", 85.8),
    ("LiveCodeBench", "%", 49.4),
)


def _rows(kind: Kind, models: tuple[str, ...], table: tuple[_Row, ...]) -> Iterable[Published]:
    for benchmark, shots, metric, values in table:
        for model, value in zip(models, values, strict=True):
            if value is not None:
                yield Published(model, kind, benchmark, shots, metric, value)


RESULTS: tuple[Published, ...] = (
    *_rows("pretrained", PRETRAINED, _PRETRAINED),
    *_rows("instruct", INSTRUCT, _INSTRUCT),
    *(
        Published(PREVIEW, "instruct", benchmark, None, metric, value, BEHEMOTH)
        for benchmark, metric, value in _PREVIEW
    ),
)

# Tasks of lm-evaluation-harness and the benchmark whose questions they ask.  Prompts and the reading of
# answers may differ from Meta's.
_TASKS: tuple[tuple[str, str], ...] = (
    ("mmlu_pro", "MMLU-Pro"),
    ("mmlu", "MMLU"),
    ("minerva_math", "MATH"),
    ("hendrycks_math", "MATH"),
    ("mbpp", "MBPP"),
    ("tydiqa", "TydiQA"),
    ("chartqa", "ChartQA"),
    ("docvqa", "DocVQA"),
    ("mmmu_pro", "MMMU-Pro (mean of Standard and Vision)"),
    ("mmmu", "MMMU"),
    ("mathvista", "MathVista"),
    ("gpqa_diamond", "GPQA Diamond"),
    ("mgsm", "MGSM"),
)


def benchmark_of(task: str) -> str | None:
    """Return the benchmark that a task of the harness asks; None where nothing is published of it.

    A part of a benchmark (`mmlu_anatomy`) is not the benchmark: only whole ones, and their variants
    of prompting (`mmlu_pro`, `gpqa_diamond_zeroshot`), are found.
    """
    for name, benchmark in _TASKS:
        rest = task.removeprefix(name)
        if task == name or (task.startswith(name + "_") and rest in _VARIANTS):
            return benchmark
    return None


_VARIANTS = (
    "_zeroshot", "_n_shot", "_cot_zeroshot", "_cot_n_shot", "_generative", "_continuation",
    "_direct", "_native_cot", "_en_cot", "_instruct", "_val", "_test", "_llama",
)  # fmt: skip


def beside(task: str, shots: int | None, kind: Kind | None = None) -> list[Published]:
    """Return the published figures of a task's benchmark: those in the same setting come first.

    Args:
      task: of the harness.
      shots: of the run; None if unknown.
      kind: pretrained or instruct alone, where given.
    """
    benchmark = benchmark_of(task)
    found = [
        row
        for row in RESULTS
        if benchmark is not None
        and row.benchmark.split(" (")[0] == benchmark.split(" (")[0]
        and kind in (None, row.kind)
    ]
    return sorted(found, key=lambda row: row.shots != shots)
