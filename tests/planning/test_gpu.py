"""Compiling for eight H100s on a machine without a GPU (needs jax[cuda12])."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxherd.cli.plan_ import plan_stage
from jaxherd.core import catalog
from jaxherd.core.errors import JaxherdError
from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.planning import gpu
from jaxherd.planning.compile import compile_plan


def plan_of(name):
    target = parse_target(name)
    mesh = Mesh(np.array(abstract_devices(target)).reshape(-1), ("fsdp",))
    place = NamedSharding(mesh, PartitionSpec("fsdp"))

    def step(w_DF, x_TD):
        def loss(w_DF):
            return jnp.mean(jnp.tanh(x_TD @ w_DF).astype(jnp.float32) ** 2)

        return w_DF - (0.1 * jax.grad(loss)(w_DF)).astype(w_DF.dtype)

    w = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=place)
    x = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16, sharding=place)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=place)
    return compile_plan(
        jitted,
        (w, x),
        target=target,
        mesh=mesh,
        flops_per_step=6.0 * 8192 * 1024 * 4096,
        tokens_per_step=8192,
        experiment="test/gpu",
    )


@pytest.mark.gpu_compile
def test_eight_h100s():
    plan = plan_of("h100:8")
    assert plan.fits and plan.chips == 8
    gather = next(row for row in plan.collectives if row.op == "all-gather")
    assert (gather.axes, gather.group_size) == ("fsdp", 8)
    assert gather.bytes == pytest.approx(1024 * 4096 * 2 * 7 / 8)
    # 7.3 MB over 18 links of 25 GB/s.
    assert gather.seconds == pytest.approx(gather.bytes / 450e9)
    # No cycle estimates on GPUs: what hides a collective is not claimed.
    assert plan.exposed_collective_share is None and plan.non_matmul_share is None
    assert plan.estimated_step_seconds >= plan.compute_seconds
    assert any("no cycle estimates" in note for note in plan.notes)


@pytest.mark.gpu_compile
def test_two_hosts_and_the_generic_name():
    assert plan_of("h100:16").fits
    assert plan_of("gpu:2").slice == "gpu:2"
    with pytest.raises(JaxherdError, match="h100 only"):
        abstract_devices(parse_target("a100:8"))


def test_without_the_plugin_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert not gpu.cuda_compiler_available()
    with pytest.raises(JaxherdError, match=r"jaxherd\[cuda\]"):
        gpu.require_cuda_compiler()


@pytest.mark.gpu_compile
def test_scout_trains_on_one_host_of_gpus():
    """The recipe's own step at its gpu scale, for eight H100s that are not here."""
    experiment = catalog.load("llama4/scout", "gpu")
    plan = plan_stage(experiment, experiment.stages[0], parse_target("h100:8"))
    assert plan.fits and plan.chips == 8
    assert plan.flops_per_step == experiment.stages[0].flops_per_step()
    assert any(row.op in ("all-gather", "all-reduce") for row in plan.collectives)


@pytest.mark.gpu_compile
@pytest.mark.parametrize("stage", ["codec", "flow", "samples"])
def test_music_compiles_for_one_host_of_gpus(stage):
    """Codec with all discriminators, velocity network at 30 s, sampler of 64 evaluations."""
    experiment = catalog.load("melodyflow/text_to_music", "gpu")
    found = experiment.stage(stage)
    plan = plan_stage(experiment, found, parse_target("h100:8"))
    assert plan.fits and plan.chips == 8
    assert plan.flops_per_step == found.flops_per_step()
    assert plan.hbm_gib_per_chip <= 40
