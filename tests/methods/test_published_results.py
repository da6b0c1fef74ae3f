"""The published tables: complete, with settings, and never beside what they do not compare with."""

import pytest

from jaxherd.methods.published_results import (
    CAVEAT,
    INSTRUCT,
    PRETRAINED,
    RESULTS,
    benchmark_of,
    beside,
)


def figures(kind, benchmark):
    return {r.model: r.value for r in RESULTS if (r.kind, r.benchmark) == (kind, benchmark)}


def test_the_cards_own_rows():
    """Rows typed in a second time from the spec, section 8."""
    assert list(figures("pretrained", "MMLU").values()) == [79.3, 85.2, 79.6, 85.5]
    assert list(figures("pretrained", "MATH").values()) == [41.6, 53.5, 50.3, 61.2]
    assert figures("pretrained", "ChartQA") == {"Llama 4 Scout": 83.4, "Llama 4 Maverick": 85.3}
    assert list(figures("instruct", "GPQA Diamond").values())[:4] == [50.5, 49.0, 57.2, 69.8]
    assert figures("instruct", "MTOB (full book) kgv to en")["Llama 4 Maverick"] == 46.7
    assert figures("instruct", "MATH-500") == {"Llama 4 Behemoth (preview)": 95.0}


def test_counts_and_settings():
    by_kind = {kind: [r for r in RESULTS if r.kind == kind] for kind in ("pretrained", "instruct")}
    assert len(by_kind["pretrained"]) == 5 * 4 + 2 * 2
    assert len(by_kind["instruct"]) == 4 * 4 + 9 * 2 + 6
    shots = {r.benchmark: r.shots for r in by_kind["pretrained"]}
    assert shots == {
        "MMLU": 5,
        "MMLU-Pro": 5,
        "MATH": 4,
        "MBPP": 3,
        "TydiQA": 1,
        "ChartQA": 0,
        "DocVQA": 0,
    }
    assert {r.model for r in by_kind["pretrained"]} == set(PRETRAINED)
    assert {r.model for r in by_kind["instruct"]} == {*INSTRUCT, "Llama 4 Behemoth (preview)"}
    assert all(r.source and r.metric and 0 < r.value <= 100 for r in RESULTS)
    # The arena's figure is no figure of the released model.
    assert not any("rena" in r.benchmark or r.value > 1000 for r in RESULTS)
    assert "1417" in CAVEAT and "experimental" in CAVEAT


@pytest.mark.parametrize(
    "task, benchmark",
    [
        ("mmlu", "MMLU"), ("mmlu_pro", "MMLU-Pro"), ("mmlu_anatomy", None), ("mmlu_pro_law", None),
        ("gpqa_diamond_zeroshot", "GPQA Diamond"), ("gpqa_main_zeroshot", None), ("mbpp_plus", None),
        ("minerva_math", "MATH"), ("local_addition", None), ("mmmu_val", "MMMU"),
    ],
)  # fmt: skip
def test_tasks_and_benchmarks(task, benchmark):
    assert benchmark_of(task) == benchmark


def test_the_same_setting_comes_first():
    found = beside("mmlu_pro", 0)
    assert [r.shots for r in found] == [0, 0, 0, 0, 5, 5, 5, 5, None] or found[0].shots == 0
    assert {r.kind for r in beside("mmlu_pro", 5, "pretrained")} == {"pretrained"}
    assert beside("local_addition", 0) == []
