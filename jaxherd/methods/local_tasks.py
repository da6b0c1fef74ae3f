"""Tasks for lm-evaluation-harness whose data is made here: they need no network and no licence.

    local_addition    multiple choice   sums of two numbers below 100, four answers
    local_reference   rolling           Python's own language reference, in bits a byte
    local_copy        generation        three words of that reference, said again

They tell whether a model and the harness work together, and little about anything else: nobody publishes
figures for them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.data.corpus import is_heldout, python_topics

TASKS = ("local_addition", "local_reference", "local_copy")
_DOCUMENTS, _CHARACTERS = 100, 2000

_COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
_FORMS = {
    "local_addition": """output_type: multiple_choice
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "local_reference": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
""",
    "local_copy": """output_type: generate_until
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 32
  do_sample: false
filter_list:
  - name: strip
    filter:
      - function: regex
        regex_pattern: '^\\s*(.*?)\\s*$'
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}


def write_tasks(folder: Path, names: Sequence[str] = TASKS) -> Path:
    """Write task files and their data into a folder; returns it.

    Raises:
      JaxherdError: there is no such task, or no data for it.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in _FORMS:
            raise JaxherdError(f"there is no local task {name!r}: {', '.join(TASKS)}.")
        data = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(document) + "\n" for document in documents(name))
        data.write_text(lines, encoding="utf-8")
        head = _COMMON.format(name=name, data=json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(
            head + _FORMS[name] + "metadata:\n  version: 1.0\n", encoding="utf-8"
        )
    return folder


def documents(name: str) -> list[dict[str, Any]]:
    """Return the documents of a task, the same at every call with one Python."""
    random = np.random.default_rng(sum(map(ord, name)))
    if name == "local_addition":
        return [_sum(random) for _ in range(_DOCUMENTS)]
    topics = [d for d in python_topics() if is_heldout(d.source, d.path, 0.4)]
    if name == "local_reference":
        long = [d.text for d in topics if len(d.text) >= _CHARACTERS // 2]
        return [{"text": text[:_CHARACTERS]} for text in long[:_DOCUMENTS]]
    words = sorted({w for d in topics for w in re.findall(r"\b[a-z]{4,9}\b", d.text)})
    chosen = random.permutation(len(words))[: 3 * _DOCUMENTS].reshape(-1, 3)
    threes = [" ".join(words[i] for i in row) for row in chosen]
    return [{"question": f"Say again: {three}\nAgain:", "answer": three} for three in threes]


def _sum(random: np.random.Generator) -> dict[str, Any]:
    a, b = (int(n) for n in random.integers(0, 100, 2))
    wrong = [int(n) for n in random.permutation([-11, -10, -9, -2, -1, 1, 2, 9, 10, 11])[:3]]
    choices = [a + b, *(abs(a + b + n) if a + b + n >= 0 else a + b + 12 - n for n in wrong)]
    order = random.permutation(4).tolist()
    return {
        "question": f"{a} + {b} =",
        "choices": [str(choices[i]) for i in order],
        "answer": order.index(0),
    }
