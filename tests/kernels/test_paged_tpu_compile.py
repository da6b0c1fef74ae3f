"""Paged attention compiled by Mosaic for four generations of TPU, at the models' shapes."""

import re

import jax
import jax.numpy as jnp
import pytest
from test_attention_tpu_compile import compiled

from jaxherd.kernels import PagePool, paged_attention
from jaxherd.kernels.paged_attention.arg_specs import ARG_SPECS, ArgSpec
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

QUICK = [
    ("v5p", "scout_full"),
    ("v6e", "scout_draft_4"),
    ("v5e", "mobilellm_pro_local_int8"),
    ("tpu7x", "head_80_float32"),
]


def program(spec: ArgSpec):
    """Return (function, abstract arguments); a pool that holds a chunk of every sequence."""
    pages = -(-spec.length // spec.page_size)
    held = spec.batch * min(pages, 64) + 1
    pool = jax.eval_shape(
        lambda: PagePool.empty(held, spec.page_size, spec.kv_heads, spec.head_dim, spec.dtype)
    )
    q = jax.ShapeDtypeStruct((spec.batch, spec.new, spec.heads, spec.head_dim), spec.query_dtype)
    table = jax.ShapeDtypeStruct((spec.batch, pages), jnp.int32)
    lengths = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)

    def run(q, pool, table, lengths):
        return paged_attention(q, pool, table, lengths, kind=spec.kind, size=spec.size)

    return run, (q, pool, table, lengths)


def check(chip, name):
    spec = ARG_SPECS[name]
    text = compiled(chip, *program(spec))
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    assert len(calls) == 1 and calls[0].startswith("paged_attention"), "chosen by platform"
    pool = f"[{spec.batch * min(-(-spec.length // spec.page_size), 64) + 1},"
    moved = [line for line in text.splitlines() if re.search(r" (copy|transpose)\(", line)]
    assert not [line for line in moved if pool in line.split(" = ")[1][:40]], (
        "the pool is not copied"
    )


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
