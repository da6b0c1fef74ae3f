"""A chunked layer costs what its length does, by the program that the TPU compiler makes of it."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import AttentionMask, attention
from jaxherd.layers.attention import Attention, AttentionConfig, SequenceInfo
from jaxherd.planning.costs import attention_flops
from jaxherd.planning.hlo import parse_hlo

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

# So many heads that the shorter program's arrays do not fit in VMEM: there they would cost nothing.
HEADS, KV_HEADS, CHUNK, WIDTH = 16, 16, 8192, 256
LENGTHS = (32768, 131072)


def kernel(kind, length, packed):
    """Return (function, shapes): attention alone, forward."""

    def run(q, k, v, positions, segments):
        segments = segments if packed else None
        mask = AttentionMask(
            positions, positions, segments, segments, kind=kind, size=CHUNK,
            self_attention=True, contiguous=not packed,
        )  # fmt: skip
        return attention(q, k, v, mask=mask, implementation="splash")

    q, k = ((1, length, n, 128) for n in (HEADS, KV_HEADS))
    tokens = ((1, length), "int32")
    return run, ((q, "bfloat16"), (k, "bfloat16"), (k, "bfloat16"), tokens, tokens)


def layer(kind, length, packed):
    """Return (function, shapes): the gradients of a whole layer."""
    size = CHUNK if kind == "chunked" else None
    config = AttentionConfig(HEADS, KV_HEADS, 128, kind, size, rope_positions="chunk_relative")
    module = abstract(
        lambda: cast_floating(Attention(config, WIDTH, key=jax.random.key(0)), jnp.bfloat16)
    )
    definition, params, buffers = split(module)

    def loss(params, x, positions, segments):
        info = SequenceInfo.create(
            positions, segments if packed else None, (config,), contiguous=not packed
        )
        out, _ = definition.merge(params, buffers)(x, info, implementation="splash")
        return out.astype(jnp.float32).sum()

    tokens = ((1, length), "int32")
    given = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    return jax.grad(loss, (0, 1)), (given, ((1, length, WIDTH), "bfloat16"), tokens, tokens)


def cost(function, shapes) -> dict:
    """Compile for v5e; return the kernels' calls, visits and FLOPs, bytes and temporaries.

    Visits are the steps of the kernels' grids, by the operands of the compiled calls: rows and heads
    of q times the map's [blocks of queries, visits of each].
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])

    def run(*arguments):
        with partitioner.activate():
            return function(*arguments)

    def is_shape(part):
        return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], tuple)

    arguments = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct(*part, sharding=partitioner.replicated()),
        shapes,
        is_leaf=lambda part: is_shape(part) and all(isinstance(n, int) for n in part[0]),
    )
    compiled = jax.jit(run).lower(*arguments).compile()
    found = {"calls": 0, "visits": 0, "flops": 0.0}
    for line, _, runs in parse_hlo(compiled.as_text()).schedule():
        if line.target != "tpu_custom_call":
            continue
        operands = line.attributes.split("operand_layout_constraints={")[1]
        blocks, visits = re.search(r"s(?:8|16)\[1,(\d+),(\d+)\]", operands).groups()
        steps = int(blocks) * int(visits)
        for part in re.search(r"bf16\[([\d,]+),\d+,128\]", operands)[1].split(","):
            steps *= int(part)
        found["calls"] += 1
        found["visits"] += steps * runs
        found["flops"] += attention_flops(line)[0] * runs
    found["bytes"] = compiled.cost_analysis()["bytes accessed"]
    found["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def growth(program, kind: str, packed: bool = False) -> dict:
    """Return each figure at the longer length over that at the shorter."""
    short, long = (cost(*program(kind, length, packed)) for length in LENGTHS)
    assert short.pop("calls") == long.pop("calls") > 0
    return {name: long[name] / short[name] for name in short}


@pytest.mark.filterwarnings("ignore")
def test_forward_is_linear():
    found = growth(kernel, "chunked")
    assert found == pytest.approx(dict.fromkeys(found, 4.0), rel=0.05)


@pytest.mark.tpu_compile_full
@pytest.mark.filterwarnings("ignore")
def test_a_causal_layer_is_not():
    """The same measure of a layer that sees all earlier tokens."""
    found = growth(kernel, "causal")
    assert found["visits"] == 16 and found["flops"] == pytest.approx(16, rel=1e-3)


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_the_training_of_a_layer_is_linear(packed):
    """With gradients; packed rows keep the chunks of their documents as ids, at run time."""
    found = growth(layer, "chunked", packed)
    assert found["visits"] == 4.0 and found["flops"] == pytest.approx(4.0, rel=1e-3)
    # Two schedules differ in what they keep in VMEM and prefetch: no few percent, but not 16.
    assert 3.5 < found["bytes"] < 4.2 and 2.5 < found["temporaries"] < 5
