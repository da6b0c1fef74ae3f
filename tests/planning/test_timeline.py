"""What hides a collective: schedules written by hand, with figures worked out by hand."""

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxherd.core.targets import abstract_devices, parse_target
from jaxherd.planning.costs import CostModel
from jaxherd.planning.hlo import parse_hlo
from jaxherd.planning.links import Fabric, wire_bytes
from jaxherd.planning.timeline import build_timeline

pytest.importorskip("libtpu")

MATMUL = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
HEAD = """HloModule hand, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%matmul (l: bf16[1024,1024], r: bf16[1024,1024]) -> bf16[1024,1024] {
  %l = bf16[1024,1024]{1,0} parameter(0)
  %r = bf16[1024,1024]{1,0} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0} convolution(%l, %r), dim_labels=bf_io->bf
}

%offloaded (p: bf16[256,1024]) -> bf16[1024,1024] {
  %p = bf16[256,1024]{1,0} parameter(0)
  ROOT %inner = bf16[1024,1024]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}
}, execution_thread="sparsecore"

"""


def program(body: str) -> str:
    return (
        HEAD
        + "ENTRY %main (x: bf16[1024,1024], w: bf16[256,1024]) -> bf16[1024,1024] {\n"
        + "  %x = bf16[1024,1024]{1,0} parameter(0)\n  %w = bf16[256,1024]{1,0} parameter(1)\n"
        + body
        + "}\n"
    )


def matmul(name: str, right: str, microseconds: float, root: bool = False) -> str:
    cycles = round(microseconds * 1750)  # v5p: 1.75 GHz
    return (
        f"  {'ROOT ' if root else ''}%{name} = bf16[1024,1024]{{1,0}} fusion(%x, %{right}), "
        f"kind=kOutput, calls=%matmul, {MATMUL % cycles}\n"
    )


def timeline(text: str, name: str = "v5p:2x2x1", shape=(1, 4)):
    target = parse_target(name)
    mesh = Mesh(np.array(abstract_devices(target)).reshape(shape), ("data", "fsdp"))
    module = parse_hlo(text)
    return build_timeline(module, Fabric(target, mesh), CostModel(module, target.chip))


# One gather of bf16[1024,1024] over four chips on a 2x2 square: each sends 3 shards of 512 KiB,
# two lines without wrap-around, one link of 100 GB/s each.
GATHER_BYTES = 3 * 256 * 1024 * 2
GATHER = GATHER_BYTES / 200e9
START = (
    "  %g = ((bf16[256,1024]{1,0}), bf16[1024,1024]{1,0}) call-start(%w), "
    'async_execution_thread="sparsecore", to_apply=%offloaded\n'
)
DONE = "  %gd = bf16[1024,1024]{1,0} call-done(%g)\n"


def test_synchronous_gather_is_exposed():
    result = timeline(
        program(
            "  %g = bf16[1024,1024]{1,0} all-gather(%w), channel_id=1, "
            "replica_groups={{0,1,2,3}}, dimensions={0}\n" + matmul("m", "g", 10, root=True)
        )
    )
    (use,) = result.collectives
    assert use.wire_bytes == GATHER_BYTES == 1572864
    assert use.seconds == pytest.approx(GATHER) == pytest.approx(7.86432e-6)
    assert use.exposed_seconds == pytest.approx(GATHER)
    assert (use.op, use.axes, use.group_size, use.asynchronous) == ("all-gather", "fsdp", 4, False)
    assert result.matmul_seconds == pytest.approx(10e-6)
    assert result.total_seconds == pytest.approx(10e-6 + GATHER)


@pytest.mark.parametrize(("microseconds", "hidden"), [(2, 2e-6), (20, GATHER), (0, 0.0)])
def test_sparsecore_gather_is_hidden_by_what_runs_meanwhile(microseconds, hidden):
    result = timeline(
        program(START + matmul("m", "x", microseconds) + DONE + matmul("n", "gd", 5, root=True))
    )
    (use,) = result.collectives
    assert use.asynchronous and use.unit == "sparsecore"
    assert use.exposed_seconds == pytest.approx(GATHER - hidden, abs=1e-12)


def test_two_gathers_do_not_hide_behind_the_same_computation():
    second = START.replace("%g =", "%h =")
    result = timeline(
        program(
            START
            + second
            + matmul("m", "x", 8)
            + DONE
            + DONE.replace("%gd", "%hd").replace("%g)", "%h)")
            + matmul("n", "hd", 5, root=True)
        )
    )
    exposed = sum(use.exposed_seconds for use in result.collectives)
    # Both use the same links: 2 * 7.86 us of traffic, 8 us of computation.
    assert exposed == pytest.approx(2 * GATHER - 8e-6)


def test_start_done_pairs():
    text = program(
        "  %g = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) all-gather-start(%w), channel_id=1, "
        "replica_groups=[1,4]<=[4], dimensions={0}\n"
        + matmul("m", "x", 3)
        + "  %gd = bf16[1024,1024]{1,0} all-gather-done(%g)\n"
        + matmul("n", "gd", 5, root=True)
    )
    (use,) = timeline(text).collectives
    assert use.wire_bytes == GATHER_BYTES
    assert use.exposed_seconds == pytest.approx(GATHER - 3e-6)


def test_collective_fusion_chain_counts_once():
    attributes = (
        "channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, "
        'frontend_attributes={chain_id="0"}'
    )
    parts = (
        HEAD
        + f"""%begin (p.1: bf16[256,1024]) -> (bf16[256,1024], u32[]) {{
  %p.1 = bf16[256,1024]{{1,0}} parameter(0)
  %ag.1 = bf16[1024,1024]{{1,0}} all-gather(%p.1), {attributes}
  ROOT %cc.1 = (bf16[256,1024]{{1,0}}, u32[]) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}}

%middle (p.2: bf16[256,1024], x.2: bf16[1024,1024]) -> (bf16[1024,1024], u32[]) {{
  %p.2 = bf16[256,1024]{{1,0}} parameter(0)
  %x.2 = bf16[1024,1024]{{1,0}} parameter(1)
  %ag.2 = bf16[1024,1024]{{1,0}} all-gather(%p.2), {attributes}
  %mm = bf16[1024,1024]{{1,0}} convolution(%x.2, %x.2), dim_labels=bf_io->bf
  ROOT %t.2 = (bf16[1024,1024]{{1,0}}, u32[]) tuple(%mm, %ag.2)
}}

%end (p.3: bf16[256,1024]) -> bf16[1024,1024] {{
  %p.3 = bf16[256,1024]{{1,0}} parameter(0)
  %ag.3 = bf16[1024,1024]{{1,0}} all-gather(%p.3), {attributes}
  ROOT %cc.3 = bf16[1024,1024]{{1,0}} custom-call(%ag.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[1024,1024], w: bf16[256,1024]) -> bf16[1024,1024] {{
  %x = bf16[1024,1024]{{1,0}} parameter(0)
  %w = bf16[256,1024]{{1,0}} parameter(1)
  %s = (bf16[256,1024]{{1,0}}, u32[]) fusion(%w), kind=kCustom, calls=%begin
  %f = (bf16[1024,1024]{{1,0}}, u32[]) fusion(%w, %x), kind=kOutput, calls=%middle, \
{MATMUL % 1750}
  %m = bf16[1024,1024]{{1,0}} get-tuple-element(%f), index=0
  %d = bf16[1024,1024]{{1,0}} fusion(%w), kind=kCustom, calls=%end
{matmul("n", "d", 5, root=True)}}}
"""
    )
    result = timeline(parts)
    (use,) = result.collectives
    assert use.asynchronous and use.unit == "tensorcore"
    assert use.exposed_seconds == pytest.approx(GATHER - 1e-6)


def test_all_reduce_sliced_in_its_fusion_is_a_reduce_scatter():
    text = (
        HEAD
        + """%scatter (p: bf16[1024,1024]) -> bf16[256,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r = bf16[1024,1024]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = bf16[256,1024]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={256,1024}
}

ENTRY %main (x: bf16[1024,1024]) -> bf16[256,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  ROOT %rs = bf16[256,1024]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""
    )
    (use,) = timeline(text).collectives
    assert use.op == "reduce-scatter"
    assert use.wire_bytes == 1024 * 1024 * 2 * 3 / 4


def test_kernels_are_priced_by_their_own_estimate():
    text = program(
        '  ROOT %k = bf16[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"403920000000",'
        '"transcendentals":"0","bytes_accessed":"4194304"}}}\n'
    )
    result = timeline(text)
    # 403.92 GFLOP at 88% of 459 TFLOP/s is one millisecond.
    assert result.matmul_seconds == pytest.approx(1e-3)
    assert result.kernels == ("k",) and not result.unpriced_kernels


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all-gather", 3), ("reduce-scatter", 0.75), ("all-reduce", 1.5), ("all-to-all", 0.75)],
)
def test_wire_bytes(op, factor):
    assert wire_bytes(op, 1000, 4) == 1000 * factor
    assert wire_bytes(op, 1000, 1) == 0


def fabric(name, shape, axes):
    target = parse_target(name)
    return Fabric(target, Mesh(np.array(abstract_devices(target)).reshape(shape), axes))


def test_links_of_a_group():
    cube = fabric("v5p:4x4x4", (64,), ("fsdp",))
    whole = cube.span(tuple(range(64)))
    # A whole cube wraps around on three axes: all six links.
    assert whole.links == 6 and whole.resources == {"x", "y", "z"}
    ring = tuple(i for i, d in enumerate(cube.devices) if tuple(d.coords)[:2] == (0, 0))
    assert cube.span(ring).links == 2 and cube.span(ring).resources == {"z"}
    # Two neighbours have one link.
    assert cube.span(ring[:2]).links == 1
    # v5e wraps around at 16 only.
    assert fabric("v5e:4x4", (16,), ("fsdp",)).span(tuple(range(16))).links == 2
    assert fabric("v5e:16x16", (256,), ("fsdp",)).span(tuple(range(256))).links == 4


def test_cores_of_a_tpu7x_chip():
    seven = fabric("tpu7x:2x2x1", (8,), ("fsdp",))
    same = [i for i, d in enumerate(seven.devices) if tuple(d.coords) == (0, 0, 0)]
    assert len(same) == 2
    assert seven.span(tuple(same)).resources == {"die"}
    # Two devices share a chip's links.
    assert seven.span(tuple(range(8))).links == 1


def test_between_slices_the_network_adds():
    two = fabric("2*v5e:2x2", (2, 4), ("data", "fsdp"))
    span = two.span(tuple(range(8)))
    assert span.slices == 2 and "dcn" in span.resources
    megabyte = 1e6
    inside = 2 * megabyte * 3 / 4 / (2 * 50e9)
    across = (megabyte / 4) / (25e9 / 8)
    assert two.seconds("all-reduce", megabyte, span) == pytest.approx(inside + across)


def test_axes_are_named_from_groups():
    mesh = fabric("v5e:4x4", (4, 4), ("data", "fsdp"))
    rows = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
    columns = tuple(tuple(range(i, 16, 4)) for i in range(4))
    assert mesh.axes(rows) == "fsdp"
    assert mesh.axes(columns) == "data"
    assert mesh.axes((tuple(range(16)),)) == "data+fsdp"
    assert mesh.axes(((0, 1), (2, 3))) == "[fsdp]"
