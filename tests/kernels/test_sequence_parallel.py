"""Attention over rows cut along their length, on fake devices, against whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_parity import arrays, mask_of

from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import AttentionMask, attention
from jaxherd.kernels.attention import sequence_parallel
from jaxherd.kernels.attention.arg_specs import ArgSpec

# A shard is 32 tokens: a chunk in a shard, one over two, windows over two and three shards.
SPECS = {
    "causal": ArgSpec("", 256, 4, 2, 16),
    "causal_packed": ArgSpec("", 256, 4, 2, 16, packed=True),
    "chunk_in_a_shard": ArgSpec("", 256, 4, 2, 16, "chunked", 16),
    "chunk_over_shards": ArgSpec("", 256, 4, 2, 16, "chunked", 48, packed=True),
    "window": ArgSpec("", 256, 4, 2, 16, "sliding_window", 20, packed=True),
    "wide_window": ArgSpec("", 256, 4, 2, 16, "sliding_window", 60),
    "prefix": ArgSpec("", 256, 4, 2, 16, "prefix", packed=True),
    "bidirectional": ArgSpec("", 256, 4, 2, 16, "bidirectional", packed=True),
}
LONG = Layout("long", sequence=8, fsdp=1)


def value_and_gradients(function, arguments):
    out, pull = jax.vjp(function, *arguments)
    cotangent = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    return out, *pull(jnp.asarray(cotangent))


def compare(spec, layout, run, tolerance=1e-5):
    spec = dataclasses.replace(spec, dtype="float32")
    q_k_v, mask = arrays(spec), mask_of(spec)
    wanted = value_and_gradients(
        lambda *a: attention(*a, mask=mask, implementation="reference"), q_k_v
    )
    partitioner = Partitioner.create(layout, jax.devices()[:8])
    with partitioner.activate():
        found = jax.jit(lambda *a: value_and_gradients(lambda *b: run(*b, mask), a))(*q_k_v)
    for one, other in zip(found, wanted):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=tolerance * float(np.abs(other).max()))


@pytest.mark.parametrize("variant", ["gather", "ring"])
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients(name, variant):
    compare(
        SPECS[name], LONG, lambda q, k, v, mask: attention(
            q, k, v, mask=mask, implementation=variant
        ),
    )  # fmt: skip


def test_with_batch_and_heads_sharded_too():
    spec = dataclasses.replace(SPECS["chunk_over_shards"], batch=2)
    layout = Layout("mixed", fsdp=2, sequence=2, tensor=2)
    for variant in ("gather", "ring"):
        compare(
            spec, layout, lambda q, k, v, mask, variant=variant: attention(
                q, k, v, mask=mask, implementation=variant
            ),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["causal_packed", "chunk_over_shards", "wide_window"])
def test_splash_on_gathered_keys(name):
    """What a TPU computes with, interpreted; two shards of 128 tokens each."""

    def attend(q, k, v, mask):
        arrays = mask.without_padding(q, k, v)
        out = sequence_parallel.attend(
            *arrays, mask, 0.25, "gather", inner="splash", interpret=True
        )  # fmt: skip
        return jnp.where((mask.q_positions_BT >= 0)[:, :, None, None], out, 0)

    layout = Layout("two", fsdp=4, sequence=2, overrides=(("batch", ()),))
    compare(SPECS[name], layout, attend, tolerance=1e-4)


def collectives(spec, variant) -> set[str]:
    q_k_v, mask = arrays(dataclasses.replace(spec, dtype="float32")), mask_of(spec)
    partitioner = Partitioner.create(LONG, jax.devices()[:8])
    with partitioner.activate():
        text = (
            jax.jit(lambda *a: attention(*a, mask=mask, implementation=variant))
            .lower(*q_k_v)
            .as_text()
        )
    return {name for name in ("all_gather", "collective_permute") if f"stablehlo.{name}" in text}


def test_only_what_a_rule_needs_is_exchanged():
    assert collectives(SPECS["causal"], "gather") == {"all_gather"}
    assert collectives(SPECS["causal"], "ring") == {"collective_permute"}
    assert collectives(SPECS["wide_window"], "gather") == {"collective_permute"}
    for variant in ("gather", "ring", None):
        assert collectives(SPECS["chunk_in_a_shard"], variant) == set(), "aligned chunks stay home"
    assert collectives(SPECS["causal"], None) == {"all_gather"}, "the default of a sharded length"


@pytest.mark.parametrize(
    "kind, size, contiguous, wanted",
    [
        ("causal", None, True, 7), ("chunked", 8192, True, 0), ("chunked", 8192, False, 1),
        ("chunked", 16384, True, 2), ("sliding_window", 512, True, 1),
        ("sliding_window", 1, True, 0), ("bidirectional", None, True, 7),
    ],
)  # fmt: skip
def test_hops(kind, size, contiguous, wanted):
    p = jnp.arange(8)[None]
    mask = AttentionMask(p, p, kind=kind, size=size, contiguous=contiguous)
    assert sequence_parallel.hops(mask, 8192, 8) == wanted


def test_what_cannot_run_is_said():
    q_k_v, mask = arrays(SPECS["causal"]), mask_of(SPECS["causal"])
    with pytest.raises(JaxherdError, match="'ring' needs an active layout that shards the length"):
        attention(*q_k_v, mask=mask, implementation="ring")
    odd = dataclasses.replace(SPECS["causal"], length=250)
    eight = Partitioner.create(LONG, jax.devices()[:8]).activate()
    with eight, pytest.raises(JaxherdError, match="250 is not divisible by the 8 devices"):
        attention(*arrays(odd), mask=mask_of(odd), implementation="gather")
