"""What kernels are priced at: the shares of the peak, and the FLOPs that attention states."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.chips import CHIPS
from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import AttentionMask, attention
from jaxherd.planning.costs import SHARES, CostModel, attention_flops
from jaxherd.planning.hlo import parse_hlo
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

ROOT = Path(__file__).parents[2]


def benchmark():
    path = ROOT / "tests" / "benchmarks" / "matmul_share.py"
    spec = importlib.util.spec_from_file_location("matmul_share", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.filterwarnings("ignore")
def test_kernels_are_priced_as_the_compilers_own_products(chip):
    module = benchmark()
    assert module.share(chip, *module.SHAPES[0]) == pytest.approx(SHARES[chip].matmul, abs=0.01)


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_attention_is_slower_by_the_bundles_of_the_readmes(chip):
    def inner(kernel, line):
        text = (ROOT / "jaxherd" / "kernels" / kernel / "README.md").read_text()
        section = text.split(f"### {chip}\n")[1].split("###")[0]
        return int(re.search(rf"^\| {line} \| \d+ \| (\d+) \|", section, re.M)[1])

    shares, product = SHARES[chip], inner("grouped_matmul", "ours: x w")
    forward = inner("attention", "ours, one document")
    gradient = inner("attention", "ours, one document: gradients")
    wanted = [shares.matmul * product / bundles for bundles in (forward, gradient)]
    assert [shares.attention, shares.attention_gradient] == pytest.approx(wanted, abs=0.01)


def kernels(length: int, batch: int, packed: bool):
    """Compile attention and its gradients; return its kernels as (name, FLOPs of all runs, priced)."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])

    def run(q, k, v, p, s):
        mask = AttentionMask(p, p, s, s, self_attention=True, contiguous=not packed)
        with partitioner.activate():
            return jax.grad(
                lambda *a: attention(*a, mask=mask, implementation="splash").sum(), (0, 1, 2)
            )(q, k, v)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.replicated())

    q, k = array(batch, length, 4, 128), array(batch, length, 2, 128)
    p = array(batch, length, dtype=jnp.int32)
    module = parse_hlo(jax.jit(run).lower(q, k, k, p, p).compile().as_text())
    model, found = CostModel(module, CHIPS["v5e"]), {}
    for line, computation, runs in module.schedule():
        if line.target == "tpu_custom_call":
            flops, gradient = attention_flops(line)
            cost = model.cost(line, computation)
            share = SHARES["v5e"].attention_gradient if gradient else SHARES["v5e"].attention
            assert cost.kernel and cost.priced
            assert cost.matmul_seconds == pytest.approx(flops / 197e12 / share)
            name = re.search(r"splash_mha_(fwd|dkv|dq)_", line.op_name)[1]
            found[name] = found.get(name, 0) + flops * runs
    return found


@pytest.mark.parametrize(
    "length, batch, packed, products",
    [
        # One grid for both rows; the fused gradient.
        (512, 2, False, {"fwd": 2, "dkv": 5}),
        # Nine blocks of 128 and documents: rows in a loop, and two gradient kernels.
        (9216, 2, True, {"fwd": 2, "dkv": 4, "dq": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_flops_of_attention_are_read_from_a_compiled_program(length, batch, packed, products):
    one = 2 * batch * 4 * 128 * length * (length + 1) / 2
    assert kernels(length, batch, packed) == pytest.approx(
        {name: count * one for name, count in products.items()}, rel=1e-5
    )
