"""A program too big for its slice is explained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.planning.compile import compile_plan
from jaxherd.planning.misfit import advise, is_out_of_memory, parse_out_of_memory
from jaxherd.planning.report import GIB

pytest.importorskip("libtpu")


def too_big(target):
    """A scan whose saved activations take 16 layers of 1 GiB on each device."""
    mesh = Mesh(np.array(abstract_devices(target)).reshape(2, 2), ("data", "fsdp"))

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def loss(weights_LDD, x_TD):
        def layer(x_TD, w_DD):
            return jnp.tanh(x_TD @ w_DD), None

        return jnp.sum(jax.lax.scan(layer, x_TD, weights_LDD)[0])

    weights = jax.ShapeDtypeStruct((16, 2048, 2048), jnp.float32, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((4 * 131072, 2048), jnp.float32, sharding=place(("data", "fsdp")))
    return jax.jit(jax.grad(loss)), (weights, x), mesh


def misfit(rebuild=None):
    target = parse_target("v5e:2x2")
    jitted, arguments, mesh = too_big(target)
    return compile_plan(
        jitted,
        arguments,
        target=target,
        mesh=mesh,
        flops_per_step=1.0,
        tokens_per_step=4 * 131072,
        experiment="test/too-big",
        rebuild=rebuild,
    )


def test_needed_and_available_memory_buffers_and_advice():
    plan = misfit()
    assert not plan.fits and plan.bottleneck == "memory"
    assert plan.hbm_limit_gib == 15.75
    assert 17 < plan.hbm_gib_per_chip < 60
    assert plan.estimated_step_seconds is None and plan.mfu_bound is None
    # One device holds a quarter of x: 131072 * 2048 * 4 bytes are exactly 1 GiB.
    assert plan.largest_buffers[0].gib == 1.0
    assert plan.largest_buffers[0].shape == "float32[131072,2048]"
    text = " ".join(plan.advice)
    assert "batch per chip" in text and "remat" in text
    assert "fsdp=4, data=1" in text
    assert "v5e:2x4" in text or "v5e:4x4" in text


def test_rebuilt_for_more_memory_names_the_activations():
    plan = misfit(rebuild=too_big)
    assert any("v5p:2x2x1" in note for note in plan.notes)
    largest = plan.largest_buffers[0]
    assert largest.gib >= 16
    assert "131072,2048" in largest.shape
    assert plan.memory.temporaries > 16


def test_vmem_overflow_names_the_kernel():
    from jax.experimental import pallas as pl

    target = parse_target("v5e:2x2")
    mesh = Mesh(np.array(abstract_devices(target)), ("fsdp",))

    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def call(x):
        block = pl.BlockSpec((8192, 8192), lambda i: (0, 0))
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(
            double, out_shape=out, grid=(1,), in_specs=[block], out_specs=block, name="too_wide"
        )(x)

    spec = PartitionSpec()
    mapped = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=NamedSharding(mesh, spec))
    plan = compile_plan(
        jax.jit(mapped),
        (x,),
        target=target,
        mesh=mesh,
        flops_per_step=1.0,
        tokens_per_step=1,
        experiment="test/kernel",
    )
    assert not plan.fits
    assert "too_wide" in plan.notes[0] and "256 MiB" in plan.notes[0] and "128 MiB" in plan.notes[0]
    assert "too_wide" in plan.advice[0] and "smaller blocks" in plan.advice[0]


def test_other_forms_of_the_message():
    listed = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.
Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/dot_general" source_file="model.py" source_line=12
     Shape: f32[65536,32768]{1,0:T(8,128)}
     Unpadded size: 8.00G
     ==========================

  2. Size: 512.0M
     Operator: op_name="jit(step)/add"
     Shape: f32[8192,16384]{1,0:T(8,128)}
"""
    told = parse_out_of_memory(listed)
    assert told.space == "hbm"
    assert told.needed_bytes == 18.5 * GIB and told.available_bytes == 15.75 * GIB
    assert [buffer.gib for buffer in told.buffers] == [8.0, 0.5]
    assert told.buffers[0].where == "jit(step)/dot_general (model.py:12)"
    scoped = parse_out_of_memory(
        "RESOURCE_EXHAUSTED: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem "
        "while allocating on stack for %gmm.3 = custom-call(). Scoped allocation with size "
        "20.00M and limit 16.00M exceeded scoped vmem limit by 4.00M."
    )
    assert (scoped.space, scoped.kernel) == ("vmem", "gmm.3")
    assert scoped.needed_bytes == 20 * 2**20 and scoped.available_bytes == 16 * 2**20
    unknown = parse_out_of_memory("RESOURCE_EXHAUSTED: no more")
    assert unknown.needed_bytes is None
    assert is_out_of_memory(RuntimeError(listed)) and not is_out_of_memory(RuntimeError("other"))


def test_advice_when_the_state_alone_is_too_big():
    target = parse_target("v5e:2x2")
    lines = advise(target, needed_gib=40.0, arguments_gib=30.0, mesh_shape={"fsdp": 4})
    assert "train state and batch alone take 30.0 GiB" in lines[0]
    # 160 GiB with a tenth to spare: 16 chips of v5e, or 2 of v5p (the smallest slice has 4).
    assert "v5e:4x4" in lines[-1] and "v5p:2x2x1" in lines[-1]
