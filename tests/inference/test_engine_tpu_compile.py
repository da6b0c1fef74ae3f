"""The engine's programs compiled for TPU: a Scout-shaped model over pages."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating
from jaxherd.core.sharding import Partitioner
from jaxherd.inference import steps
from jaxherd.inference.generate import row_keys
from jaxherd.inference.sampling import RowSampling, Sampling
from jaxherd.layers.paged_cache import CacheRule, PageTables
from jaxherd.models import presets
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

# Pools that do not fit in VMEM, as real ones: smaller ones would be moved there.
SLOTS, PAGE, LENGTH, CHUNK = 32, 128, 8192, 1024
RULES = {CacheRule("chunked", CHUNK): 3 * CHUNK, CacheRule("causal"): LENGTH}


def program(partitioner):
    """Return (function, arguments): several decoding steps; the large arguments are abstract."""
    config = presets.llama4_text(
        vocab_size=512, embed_dim=256, num_layers=8, num_heads=10, num_kv_heads=2, head_dim=128,
        num_experts=4, expert_dim=256, chunk_size=CHUNK, max_length=LENGTH,
    )  # fmt: skip
    pages = {rule: SLOTS * tokens // PAGE for rule, tokens in RULES.items()}

    def build():
        module = cast_floating(config.build(jax.random.key(0)), jnp.bfloat16)
        return module, module.init_pages(pages, PAGE)

    def run(module, pools, numbers, done, tables, temperatures):
        rows = RowSampling.create([Sampling()] * SLOTS, row_keys(None, range(SLOTS)))
        rows = dataclasses.replace(rows, temperature_B=temperatures)
        state = steps.DecodeState(numbers, numbers, done, numbers)
        paged = PageTables(tables, tuple(RULES))
        return steps.decode(module, pools, state, numbers, rows, paged, steps=4)

    module, pools = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partitioner.replicated()),
        abstract(build),
    )
    numbers, done = jnp.zeros(SLOTS, jnp.int32), jnp.zeros(SLOTS, bool)
    temperatures = jnp.zeros(SLOTS)
    tables = (jnp.zeros((SLOTS, LENGTH // PAGE), jnp.int32),) * len(RULES)
    return run, (module, pools, numbers, done, tables, temperatures)


@pytest.mark.filterwarnings("ignore")
def test_a_later_piece_of_a_prompt_takes_the_kernel_in_every_layer():
    """Chunked layers as well as NoPE layers; attention by XLA would take exponentials of scores."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"]).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])
    _, (module, pools, *_, tables, _) = program(partitioner)

    def piece(module, pools, tokens, positions, lengths):
        last = jnp.zeros((2, 256), jnp.bfloat16)
        paged = PageTables(tuple(t[:2] for t in tables), tuple(RULES))
        return steps.prefill(
            module, pools, last, tokens, positions, lengths, paged, cache_is_empty=False
        )

    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=partitioner.replicated())
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=partitioner.replicated())
    with partitioner.activate():
        text = jax.jit(piece).lower(module, pools, tokens, tokens, lengths).as_text()
    # The layers of a rule call one function.
    assert len(re.findall(r'kernel_name = "splash_mha_fwd', text)) == 2
    assert not re.search(r"stablehlo\.exponential .*: tensor<(\d+x){4}", text)


@pytest.mark.filterwarnings("ignore")
def test_decoding_over_pages_compiles_and_copies_no_pool():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"]).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])
    function, given = program(partitioner)
    with partitioner.activate():
        executable = jax.jit(function, donate_argnums=1).lower(*given).compile()
    text = executable.as_text()
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    kernels = [call for call in calls if call.startswith("paged_attention")]
    assert len(kernels) == 2, "one for the chunked layers and one for the NoPE layers"
    pools = {
        tuple(leaf.shape): leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(given[1])
    }
    assert len(pools) == 2
    for shape in pools:
        dimensions = "[" + ",".join(map(str, shape)) + "]"
        copies = [
            line for line in text.splitlines()
            if re.search(r" (copy|copy-start|transpose)\(", line) and dimensions in line
        ]  # fmt: skip
        assert not copies, "the pool is not copied"
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * sum(pools.values()), "pools are updated in place"
    assert memory.temp_size_in_bytes < min(pools.values())
