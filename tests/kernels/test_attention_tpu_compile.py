"""Attention compiled by Mosaic for four generations of TPU, at the models' shapes."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import AttentionMask, attention
from jaxherd.kernels.attention.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

# One of each kind of program in the default suite, spread over the generations.
QUICK = [
    ("v5p", "llama4_train_chunked"),
    ("v5e", "mobilellm_pro_packed"),
    ("v6e", "llama4_prefill"),
    ("v5p", "llama4_prefill_chunked"),
    ("tpu7x", "llama4_vision"),
    ("v5e", "head_72"),
]


def program(spec: ArgSpec):
    """Return (function, abstract arguments): the call, and its gradients if trained."""
    batch, length, keys = spec.batch, spec.length, spec.keys or spec.length
    p = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    r = jax.ShapeDtypeStruct((batch, keys), jnp.int32)
    prefix = jax.ShapeDtypeStruct((batch,), jnp.int32)
    q = jax.ShapeDtypeStruct((batch, length, spec.heads, spec.head_dim), spec.dtype)
    k = jax.ShapeDtypeStruct((batch, keys, spec.kv_heads, spec.head_dim), spec.dtype)

    def call(q, k, v, p, r, s, prefix):
        same = keys == length
        mask = AttentionMask(
            p, p if same else r, s if spec.packed else None, s if spec.packed else None,
            prefix_length_B=prefix if spec.kind == "prefix" else None,
            kind=spec.kind, size=spec.size, self_attention=same,
            contiguous=same and not spec.packed, keys_by_position=not same,
        )  # fmt: skip
        return attention(q, k, v, mask=mask, implementation="splash")

    def run(*arguments):
        if not spec.trained:
            return call(*arguments)
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)

    return run, (q, k, k, p, r, p, prefix)


def compiled(chip: str, function, arguments) -> str:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    partitioner = Partitioner.create(Layout("one"), devices[:1])

    def run(*given):
        with partitioner.activate():
            return function(*given)

    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.replicated()),
        arguments,
    )
    return jax.jit(run).lower(*placed).compile().as_text()


def check(chip, name):
    spec = ARG_SPECS[name]
    text = compiled(chip, *program(spec))
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    passes = {re.search(r"_(fwd|dq|dkv)_", call)[1] for call in calls}
    wanted = {"fwd"}
    if spec.trained:
        # Whole rows of chunks become short rows of their own.
        blocks = (spec.size if spec.kind == "chunked" and not spec.packed else spec.length) / 1024
        wanted |= {"dkv"} if blocks <= 8 else {"dkv", "dq"}
    assert passes == wanted


@pytest.mark.parametrize("chip, name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_compiles(chip, name):
    check(chip, name)


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.filterwarnings("ignore")
def test_every_spec_compiles(chip, name):
    check(chip, name)
