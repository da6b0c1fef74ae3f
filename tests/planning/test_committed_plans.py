"""The committed plans: readable, within the marks, and what the code compiles to today."""

import json

import jax
import pytest

from jaxherd.cli.plan_ import plan_stage
from jaxherd.core import catalog, resources
from jaxherd.core.targets import parse_target
from jaxherd.planning.readme import write_readme
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


def test_the_table_shows_the_plans():
    assert not write_readme(resources.folder("tpu"), check=True), "run: jaxherd plan --readme"


@pytest.mark.parametrize("stage, most", [("flow", 4.0), ("samples", 4.0)])
@pytest.mark.parametrize("slice_name", ["v5e-8x8", "v6e-8x8"])
def test_music_plans_are_of_the_recipe(stage, most, slice_name):
    """The 1B flow at 30 s and the 64-evaluation sampler, in less than a third of a chip's memory."""
    path = resources.folder("tpu") / "plans" / f"melodyflow-{stage}-{slice_name}.json"
    plan = Plan.from_json(path.read_text())
    found = catalog.load("melodyflow/text_to_music", "full").stage(stage)
    assert plan.flops_per_step == found.flops_per_step()
    assert plan.tokens_per_step == found.units_per_step()
    assert plan.fits and plan.hbm_gib_per_chip <= most


def test_scouts_step_is_within_its_marks():
    """At 8,192 tokens a chip on v5p:4x4x8: at most 30 GiB a chip (public stack: 41).

    What nothing hides of the collectives is at most 0.15 of their ideal time (public: 1.0), and
    work that is no matrix product at most 0.2 of the core's (public: 0.33).
    """
    plan = json.loads(
        (resources.folder("tpu") / "plans" / "llama4-scout-v5p-4x4x8.json").read_text()
    )
    assert plan["tokens_per_step"] == 8192 * 128
    assert plan["flops_per_step"] == catalog.load("llama4/scout", "full").stages[0].flops_per_step()
    assert plan["hbm_gib_per_chip"] <= 30
    assert plan["exposed_collective_share"] <= 0.15
    assert plan["non_matmul_share"] <= 0.2


def test_some_plan_does_not_fit_and_says_what_to_change():
    misfits = [p for p in (json.loads(path.read_text()) for path in PLANS) if not p["fits"]]
    assert misfits and all(p["advice"] and p["largest_buffers"] for p in misfits)


OVERRIDES = ("pretrain.layout.fsdp=2", "pretrain.layout.expert=2")


@pytest.fixture(scope="module")
def uncached():
    """What is read is what was compiled now, not a program kept from before."""
    pytest.importorskip("libtpu")
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture(scope="module")
def cheap(uncached):
    """The laptop's model on four chips: the same step, small enough to compile in a test."""
    experiment = catalog.load("llama4/scout", "cpu").with_overrides(OVERRIDES)
    return plan_stage(experiment, experiment.stages[0], parse_target("v5e:2x2"))


@pytest.mark.slow
def test_the_small_flow_compiles_to_what_is_committed(uncached):
    """The laptop's velocity network in whole: coupling's metrics, conditioner, halves and skips."""
    experiment = catalog.load("melodyflow/text_to_music", "cpu")
    plan = plan_stage(experiment, experiment.stage("flow"), parse_target("v5e:2x2"))
    path = resources.folder("tpu") / "plans" / "melodyflow-flow-cpu-scale-v5e-2x2.json"
    committed = Plan.from_json(path.read_text())
    assert plan.fits and committed.fits
    assert plan.flops_per_step == committed.flops_per_step
    if plan.versions.get("libtpu") == committed.versions.get("libtpu"):
        assert plan.hbm_gib_per_chip == pytest.approx(committed.hbm_gib_per_chip, rel=0.05)
        assert plan.collective_bytes == pytest.approx(committed.collective_bytes, rel=0.05)


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
