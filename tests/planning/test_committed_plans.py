"""The committed plans: readable, within the marks, and what the code compiles to today."""

import json

import jax
import pytest

from jaxherd.cli.plan_ import plan_stage
from jaxherd.core import catalog, resources
from jaxherd.core.targets import parse_target
from jaxherd.planning.report import Plan

PLANS = sorted((resources.folder("tpu") / "plans").glob("*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_is_whole(path):
    plan = Plan.from_json(path.read_text())
    target = parse_target(plan.slice)
    assert plan.chips == target.chips
    assert plan.hbm_limit_gib == pytest.approx(target.chip.hbm_gib)
    assert plan.fits == (plan.hbm_gib_per_chip <= plan.hbm_limit_gib)
    if plan.fits:
        assert 0 < plan.mfu_bound <= 1
        assert plan.estimated_step_seconds >= plan.compute_seconds * 0.999
    else:
        assert plan.advice


def test_scout_needs_less_memory_than_the_mark():
    """At 8,192 tokens a chip on v5p:4x4x8: at most 37 GiB a chip (public stack: 41).

    What nothing hides of the collectives is at most 0.15 of their ideal time (public: 1.0), and
    work that is no matrix product at most 0.2 of the core's (public: 0.33).
    """
    plan = json.loads(
        (resources.folder("tpu") / "plans" / "llama4-scout-v5p-4x4x8.json").read_text()
    )
    assert plan["tokens_per_step"] == 8192 * 128
    assert plan["flops_per_step"] == catalog.load("llama4/scout", "full").stages[0].flops_per_step()
    assert plan["hbm_gib_per_chip"] <= 31
    assert plan["exposed_collective_share"] <= 0.15
    assert plan["non_matmul_share"] <= 0.2


def test_some_plan_does_not_fit_and_says_what_to_change():
    misfits = [p for p in (json.loads(path.read_text()) for path in PLANS) if not p["fits"]]
    assert misfits and all(p["advice"] and p["largest_buffers"] for p in misfits)


OVERRIDES = ("pretrain.layout.fsdp=2", "pretrain.layout.expert=2")


@pytest.fixture(scope="module")
def cheap():
    """The laptop's model on four chips: the same step, small enough to compile in a test."""
    pytest.importorskip("libtpu")
    experiment = catalog.load("llama4/scout", "cpu").with_overrides(OVERRIDES)
    # What is read is what was compiled now, not a program kept from before.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield plan_stage(experiment, experiment.stages[0], parse_target("v5e:2x2"))
    jax.config.update("jax_enable_compilation_cache", before)


def test_cheap_plan_compiles_to_what_is_committed(cheap):
    path = resources.folder("tpu") / "plans" / "llama4-scout-cpu-scale-v5e-2x2.json"
    committed = Plan.from_json(path.read_text())
    assert cheap.fits and committed.fits
    assert cheap.flops_per_step == committed.flops_per_step
    assert cheap.tokens_per_step == committed.tokens_per_step
    if cheap.versions.get("libtpu") == committed.versions.get("libtpu"):
        assert cheap.hbm_gib_per_chip == pytest.approx(committed.hbm_gib_per_chip, rel=0.05)
        assert cheap.collective_bytes == pytest.approx(committed.collective_bytes, rel=0.05)
    assert {row.op for row in cheap.collectives} >= {"ragged-all-to-all"}
    # Attention is priced by its FLOPs, as every other kernel.
    assert not any("priced by their bytes alone" in note for note in cheap.notes)
    assert cheap.non_matmul_share == pytest.approx(committed.non_matmul_share, abs=0.02)
