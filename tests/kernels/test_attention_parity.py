"""Every implementation of attention against the definition, values and gradients (interpreted)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Parity

from jaxherd.kernels import attention
from jaxherd.kernels.attention import AttentionMask, splash
from jaxherd.kernels.attention.arg_specs import ARG_SPECS, ArgSpec

# Scores are sums of 64 to 128 products, weights are exponentials of them: composite.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def mask_of(spec: ArgSpec, seed: int = 0) -> AttentionMask:
    """Return the mask of a spec; packed rows hold three documents and padding."""
    rng = np.random.default_rng(seed)
    batch, length, keys = spec.batch, spec.length, spec.keys or spec.length
    prefix = jnp.asarray(rng.integers(0, length // 2 + 1, batch), jnp.int32)
    rule = dict(kind=spec.kind, size=spec.size, prefix_length_B=prefix)
    if spec.kind != "prefix":
        rule["prefix_length_B"] = None
    q_index = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    if spec.scattered:
        # Rows that end in padding; keys that are empty in between, and one that always counts.
        ends = rng.integers(1, length + 1, (batch, 1))
        stored = np.where(rng.random((batch, keys)) < 0.7, np.arange(keys), -1).astype(np.int32)
        stored[:, -1] = 0
        positions = np.where(q_index < ends, q_index, -1)
        return AttentionMask(jnp.asarray(positions), jnp.asarray(stored), **rule)
    if keys > length:
        # A cache that the row fills part of the way; of a local rule the pages in sight alone.
        k_index = np.broadcast_to(np.arange(keys, dtype=np.int32), (batch, keys))
        offset = keys - length - length // 3
        first = np.zeros((batch, 1), np.int32)
        if spec.kind in ("chunked", "sliding_window"):
            first = 96 + 33 * np.arange(batch, dtype=np.int32)[:, None]
        positions = q_index + offset + first
        stored = np.where(k_index < offset + length, k_index + first, -1)
        return AttentionMask(
            jnp.asarray(positions), jnp.asarray(stored), keys_by_position=True, **rule
        )
    if not spec.packed:
        p = jnp.asarray(q_index)
        return AttentionMask(p, p, self_attention=True, contiguous=True, **rule)
    positions, segments = (
        np.full((batch, length), -1, np.int32),
        np.zeros((batch, length), np.int32),
    )
    end = length - length // 7
    for row in range(batch):
        edges = [0, *sorted(rng.choice(np.arange(1, end), 2, replace=False)), end]
        for number, (start, stop) in enumerate(zip(edges, edges[1:])):
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number + 1
    p, s = jnp.asarray(positions), jnp.asarray(segments)
    return AttentionMask(p, p, s, s, self_attention=True, **rule)


def arrays(spec: ArgSpec, seed: int = 0):
    rng = np.random.default_rng(seed)
    keys = spec.keys or spec.length

    def draw(length, heads):
        values = rng.normal(size=(spec.batch, length, heads, spec.head_dim))
        return jnp.asarray(values, spec.dtype)

    return draw(spec.length, spec.heads), draw(keys, spec.kv_heads), draw(keys, spec.kv_heads)


def check(implementation, spec, *, gradients=True, seed=0):
    """Compare; what is padding, or was never written, is no number for the implementation."""
    mask = mask_of(spec, seed)
    padding = {0: mask.q_positions_BT < 0, 1: mask.k_positions_BS < 0}

    def dirty(which, array):
        rows = padding[0 if which in (0, "cotangent") else 1]
        return jnp.where(rows[..., None, None], jnp.asarray(jnp.nan, array.dtype), array)

    def clean(array, rows):
        return jnp.where(rows[..., None, None], 0, array)

    q, k, v = arrays(spec, seed)

    def call(q, k, v, **options):
        return attention(q, k, v, mask=mask, **options)

    Parity(call, (0, 1, 2), TOLERANCE).check(
        implementation,
        (clean(q, padding[0]), clean(k, padding[1]), clean(v, padding[1])),
        interpret=implementation in ("splash", "pallas_gpu"),
        gradients=gradients,
        dirty=dirty,
    )


@pytest.mark.parametrize("implementation", ["splash", "xla"])
@pytest.mark.parametrize("name", ARG_SPECS)
def test_specs(name, implementation):
    spec = ARG_SPECS[name].shrunk()
    check(implementation, spec, gradients=spec.trained)


@pytest.mark.parametrize("kind, size", [("causal", None), ("chunked", 200), ("sliding_window", 90)])
def test_a_piece_of_a_prompt(kind, size):
    """Rows whose keys start at different positions; pieces that cross several edges of chunks."""
    spec = ArgSpec("piece", 256, 2, 1, 64, kind, size, keys=640, dtype="float32", batch=2)
    check("splash", spec, gradients=False)


@pytest.mark.parametrize("name", ARG_SPECS)
def test_triton(name):
    spec = ARG_SPECS[name].shrunk()
    check("pallas_gpu", dataclasses.replace(spec, batch=min(spec.batch, 2)), gradients=spec.trained)


@pytest.mark.parametrize("kind", ["causal", "chunked", "sliding_window", "prefix"])
def test_long_rows_take_the_two_gradient_kernels(kind, monkeypatch):
    """More blocks of keys than the fused gradient is used for."""
    monkeypatch.setattr(splash, "_BLOCKS", (128,))
    spec = ArgSpec(
        "long", 1200, 2, 1, 64, kind, 200 if kind in ("chunked", "sliding_window") else None,
        packed=True, dtype="float32",
    )  # fmt: skip
    check("splash", spec)


SHAPES = dict(
    length=st.integers(1, 300), groups=st.sampled_from([1, 4, 5, 8]), kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([64, 72, 80, 88, 128]),
    kind=st.sampled_from(["causal", "chunked", "sliding_window", "bidirectional", "prefix"]),
    size=st.integers(1, 300), packed=st.booleans(), batch=st.integers(1, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip


def drawn_spec(length, groups, kv_heads, head_dim, kind, size, packed, batch, dtype):
    local = kind in ("chunked", "sliding_window")
    return ArgSpec(
        "any", length, groups * kv_heads, kv_heads, head_dim, kind, size if local else None,
        packed=packed and length > 8, dtype=dtype, batch=batch,
    )  # fmt: skip


@given(**SHAPES)
@settings(max_examples=8)
def test_any_shape(**drawn):
    check("splash", drawn_spec(**drawn), gradients=False)


@given(**{**SHAPES, "length": st.integers(16, 150), "size": st.integers(2, 150)})
@settings(max_examples=2)
@pytest.mark.parametrize("implementation", ["splash", "pallas_gpu"])
def test_gradients_of_any_shape(implementation, **drawn):
    """With one key a query has no gradient at all, and nothing to compare rounding with."""
    check(implementation, drawn_spec(**drawn))


def test_a_row_of_padding_alone_gives_zeros():
    spec = ArgSpec("empty", 256, 2, 1, 64, "causal", packed=True, dtype="float32", batch=2)
    q, k, v = arrays(spec)
    mask = mask_of(spec)
    empty = mask.q_positions_BT.at[0].set(-1)
    mask = dataclasses.replace(mask, q_positions_BT=empty, k_positions_BS=empty)
    for implementation in ("splash", "xla"):
        out = attention(
            q, k, v, mask=mask, implementation=implementation,
            interpret=implementation == "splash",
        )  # fmt: skip
        assert (np.asarray(out[0]) == 0).all() and np.isfinite(out).all()
        assert np.abs(out[1]).max() > 0
