"""Plans of real small programs, compiled by the TPU compiler on this machine."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxherd.core.errors import JaxherdError
from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.planning.compile import compile_plan
from jaxherd.planning.flags import FLAG_SETS, options_for
from jaxherd.planning.report import GIB, Plan

pytest.importorskip("libtpu")
LAYERS, WIDTH, HIDDEN, TOKENS = 3, 512, 1024, 4096


def fsdp_scan(target):
    """A scan over MLP layers with every weight gathered in the loop: step, arguments, mesh."""
    mesh = Mesh(np.array(abstract_devices(target)).reshape(1, -1), ("data", "fsdp"))

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def layer(x_TD, weights):
        up_DF, down_FD = (jax.lax.with_sharding_constraint(w, place()) for w in weights)
        return x_TD + jax.nn.silu(x_TD @ up_DF) @ down_FD, None

    def step(weights, x_TD):
        def loss(weights):
            y_TD, _ = jax.lax.scan(layer, x_TD, weights)
            return jnp.mean(y_TD.astype(jnp.float32) ** 2)

        gradients = jax.grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - (0.1 * g).astype(w.dtype), weights, gradients)

    shapes = ((LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH))
    weights = tuple(
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place(None, "fsdp")) for s in shapes
    )
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=place(("data", "fsdp")))
    out = tuple(w.sharding for w in weights)
    return jax.jit(step, donate_argnums=0, out_shardings=out), (weights, x), mesh


FLOPS = 6.0 * LAYERS * 2 * WIDTH * HIDDEN * TOKENS


@functools.cache
def plan_of(name, flags=None):
    target = parse_target(name)
    jitted, arguments, mesh = fsdp_scan(target)
    return compile_plan(
        jitted,
        arguments,
        target=target,
        mesh=mesh,
        flops_per_step=FLOPS,
        tokens_per_step=TOKENS,
        experiment="test/fsdp",
        layout_name="fsdp",
        compiler_options=options_for(target, flags),
    )


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def plan(request):
    return plan_of(request.param)


def test_gathers_are_counted_through_the_loop(plan):
    devices = parse_target(plan.slice).devices
    gathers = [row for row in plan.collectives if row.op == "all-gather"]
    assert {row.axes for row in gathers} == {"fsdp"}
    assert {row.group_size for row in gathers} == {devices}
    # Each layer gathers its two matrices once (without remat the backward pass keeps them); each
    # gather sends out * (n-1)/n bytes.
    one = WIDTH * HIDDEN * 2 * (devices - 1) / devices
    assert sum(row.count for row in gathers) == 2 * LAYERS
    assert sum(row.bytes for row in gathers) == pytest.approx(2 * LAYERS * one)


def test_gradients_are_reduced_over_the_same_axis(plan):
    reductions = [r for r in plan.collectives if r.op in ("reduce-scatter", "all-reduce")]
    assert "fsdp" in {row.axes for row in reductions}
    assert sum(row.count for row in reductions) >= 2


def test_memory_is_the_compilers(plan):
    target = parse_target(plan.slice)
    per_chip = target.chip.devices_per_chip
    state = 2 * LAYERS * WIDTH * HIDDEN * 2 / target.devices
    batch = TOKENS * WIDTH * 2 / target.devices
    assert plan.fits and plan.hbm_limit_gib == target.chip.hbm_gib
    assert plan.memory.arguments * GIB == pytest.approx((state + batch) * per_chip, rel=0.01)
    # The donated state is not counted twice.
    assert plan.memory.aliased * GIB == pytest.approx(state * per_chip, rel=0.01)
    m = plan.memory
    total = m.arguments + m.outputs - m.aliased + m.temporaries + m.code
    assert plan.hbm_gib_per_chip == pytest.approx(total)


def test_bounds_are_consistent(plan):
    target = parse_target(plan.slice)
    assert plan.compute_seconds == pytest.approx(FLOPS / (target.chips * target.chip.peak("bf16")))
    longest = max(plan.compute_seconds, plan.hbm_seconds)
    assert plan.estimated_step_seconds == pytest.approx(longest + plan.exposed_seconds)
    assert plan.mfu_bound == pytest.approx(plan.compute_seconds / longest)
    assert 0 < plan.mfu_bound <= 1
    assert 0 <= plan.exposed_collective_share <= 1
    assert 0 <= plan.non_matmul_share < 1
    # The compiler's own estimate of the matmuls is not far below the peak's.
    assert plan.schedule_seconds > plan.compute_seconds
    assert plan.bottleneck in ("compute", "hbm", "collectives")


def test_json_round_trip_and_table(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan
    data = json.loads(plan.to_json())
    assert list(data)[:13] == [
        "experiment",
        "slice",
        "chips",
        "fits",
        "hbm_gib_per_chip",
        "hbm_limit_gib",
        "flops_per_step",
        "tokens_per_step",
        "collective_bytes",
        "compile_seconds",
        "estimated_step_seconds",
        "bottleneck",
        "mfu_bound",
    ]
    from rich.console import Console

    out = io.StringIO()
    plan.render(Console(file=out, width=140))
    for word in ("fits", "all-gather", "fsdp", "MFU, at most", "argument", "libtpu"):
        assert word in out.getvalue()


def test_sparsecores_hide_what_the_default_exposes():
    default = plan_of("v5p:2x2x1", "none")
    offloaded = plan_of("v5p:2x2x1")
    assert default.exposed_collective_share == pytest.approx(1.0, abs=0.05)
    assert offloaded.exposed_collective_share < default.exposed_collective_share
    assert any(row.unit == "sparsecore" for row in offloaded.collectives)


def test_wrong_plans_are_refused():
    with pytest.raises(JaxherdError, match="not a plan"):
        Plan.from_json("{}")
    with pytest.raises(JaxherdError, match="not a plan"):
        Plan.from_json("no json")


def test_arguments_must_be_on_the_target():
    target = parse_target("v5e:2x2")
    jitted, arguments, mesh = fsdp_scan(target)
    bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    settings = dict(flops_per_step=1, tokens_per_step=1, experiment="x")
    with pytest.raises(JaxherdError, match="compile for the CPU"):
        compile_plan(jitted, bare, target=target, mesh=mesh, **settings)
    with pytest.raises(JaxherdError, match="256 devices and the mesh has 4"):
        compile_plan(jitted, arguments, target=parse_target("v5e:16x16"), mesh=mesh, **settings)
    with pytest.raises(JaxherdError, match="No such compile option"):
        compile_plan(
            jitted,
            arguments,
            target=target,
            mesh=mesh,
            compiler_options={"xla_no_such_thing": True},
            **settings,
        )


def test_option_sets():
    v5e = parse_target("v5e:2x2")
    assert options_for(parse_target("v5p:4x4x4"), "none") == {}
    assert options_for(parse_target("cpu:8")) == {}
    assert options_for(v5e, "none", {"a": 1}) == {"a": 1}
    with pytest.raises(JaxherdError, match="does not exist on v5e"):
        options_for(v5e, "sparsecore")
    with pytest.raises(JaxherdError, match="'sparsecore'"):
        options_for(v5e, "sparscore")
    with pytest.raises(JaxherdError, match="for TPUs"):
        options_for(parse_target("h100:8"), "sparsecore")
    assert all(flags.why for flags in FLAG_SETS.values())


def test_between_slices_the_network_is_seen():
    """Two slices: gathered and scattered inside, all-reduced across by the network runtime."""
    target = parse_target("2*v5e:2x2")
    mesh = Mesh(np.array(abstract_devices(target)).reshape(2, 4), ("data", "fsdp"))

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def step(w_DF, x_TD):
        def loss(w_DF):
            w_DF = jax.lax.with_sharding_constraint(w_DF, place())
            return jnp.mean(jnp.tanh(x_TD @ w_DF).astype(jnp.float32) ** 2)

        return w_DF - jax.grad(loss)(w_DF).astype(w_DF.dtype)

    w = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16, sharding=place("fsdp"))
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=place(("data", "fsdp")))
    plan = compile_plan(
        jax.jit(step, donate_argnums=0, out_shardings=w.sharding),
        (w, x),
        target=target,
        mesh=mesh,
        flops_per_step=6.0 * 4096 * 1024 * 2048,
        tokens_per_step=4096,
        experiment="test/slices",
    )
    (across,) = [row for row in plan.collectives if row.unit == "network"]
    assert (across.op, across.axes, across.group_size) == ("all-reduce", "data", 2)
    # Each device all-reduces its quarter of the gradient with its peer in the other slice.
    quarter = 1024 * 2048 * 2 / 4
    assert across.bytes == pytest.approx(2 * quarter / 2)
    assert across.seconds == pytest.approx(quarter / (25e9 / 8))
    inside = {row.op: row for row in plan.collectives if row.unit != "network"}
    assert inside["all-gather"].axes == inside["reduce-scatter"].axes == "fsdp"
    assert inside["all-gather"].bytes == 3 * quarter
    assert any("Between slices" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["cpu", "v5e:1x1"])
def test_one_device_has_no_collectives(name):
    target = parse_target(name)
    mesh = Mesh(np.array(abstract_devices(target)), ("data",))
    place = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)
    plan = compile_plan(
        jax.jit(lambda x: x @ x),
        (x,),
        target=target,
        mesh=mesh,
        flops_per_step=2.0 * 256**3,
        tokens_per_step=256,
        experiment="test/cpu",
        matmul_dtype="f32",
    )
    assert plan.fits and plan.collectives == () and plan.collective_bytes == 0
    assert plan.memory.arguments * GIB == 256 * 256 * 4
    assert (plan.non_matmul_share is None) == (target.kind == "cpu")
    assert plan.exposed_collective_share is None
