"""Attention by every rule against NumPy; the blocked and the splash form against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.kernels import attention
from jaxherd.kernels.attention import AttentionMask, reference
from jaxherd.kernels.attention.mask import allowed_pairs

RULES = {
    "causal": ("causal", None),
    "chunked": ("chunked", 5),
    "window": ("sliding_window", 4),
    "window_of_one": ("sliding_window", 1),
    "bidirectional": ("bidirectional", None),
    "prefix": ("prefix", None),
}
PREFIX = np.asarray([3, 7], np.int32)


def packed(batch: int, length: int, seed: int = 0):
    """Positions and segments of packed rows: three documents, then padding."""
    rng = np.random.default_rng(seed)
    positions, segments = np.full((batch, length), -1), np.zeros((batch, length), int)
    for row in range(batch):
        edges = [0, *sorted(rng.choice(np.arange(1, length - 2), 2, replace=False)), length - 2]
        for number, (start, end) in enumerate(zip(edges, edges[1:])):
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = number + 1
    return positions.astype(np.int32), segments.astype(np.int32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 23])
def test_pairs_are_those_of_the_dense_mask(rule, length):
    kind, size = RULES[rule]
    positions = jnp.arange(length)[None]
    prefix = jnp.asarray([4]) if kind == "prefix" else None
    mask = AttentionMask(positions, positions, prefix_length_B=prefix, kind=kind, size=size)
    assert allowed_pairs(kind, size, length, 4) == int(mask.dense().sum())


def arrays(batch=2, length=23, heads=4, kv_heads=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, size)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, kv_heads, size)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def in_numpy(q, k, v, positions, segments, kind, size):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(length):
            p = positions[b, t]
            seen = [
                s
                for s in range(length)
                if p >= 0
                and positions[b, s] >= 0
                and segments[b, s] == segments[b, t]
                and (
                    kind == "bidirectional"
                    or positions[b, s] <= p
                    or (kind == "prefix" and positions[b, s] < PREFIX[b])
                )
                and (kind != "chunked" or positions[b, s] // size == p // size)
                and (kind != "sliding_window" or positions[b, s] > p - size)
            ]
            for n in range(heads):
                if not seen:
                    continue
                scores = k[b, seen, n // group].astype(np.float64) @ q[b, t, n] * width**-0.5
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def mask_of(positions, segments, rule, **options) -> AttentionMask:
    kind, size = RULES.get(rule, rule if isinstance(rule, tuple) else None)
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    return AttentionMask(
        positions, positions, segments, segments,
        prefix_length_B=jnp.asarray(PREFIX)[: len(positions)] if kind == "prefix" else None,
        kind=kind, size=size, self_attention=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_reference_against_numpy(rule):
    q, k, v = arrays()
    positions, segments = packed(2, 23)
    mask = mask_of(positions, segments, rule)
    found = attention(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(
        found, in_numpy(q, k, v, positions, segments, *RULES[rule]), atol=1e-5
    )
    assert (np.asarray(found)[positions < 0] == 0).all(), "padding gives zeros"


def value_and_gradients(function, q, k, v):
    cotangent = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(cotangent)

    return [np.asarray(x) for x in run(q, k, v)]


@pytest.mark.parametrize("block", [4, 7, 16, 64])
@pytest.mark.parametrize("rule", RULES)
def test_blocked_is_the_reference(rule, block):
    q, k, v = arrays(length=23)
    mask = mask_of(*packed(2, 23), rule)
    wanted = value_and_gradients(lambda *a: reference.attend(*a, mask, 0.3), q, k, v)
    found = value_and_gradients(
        lambda *a: reference.attend_blocked(*a, mask, 0.3, block=block), q, k, v
    )
    for a, b in zip(found, wanted):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5)


@given(
    length=st.sampled_from([1, 2, 9, 16, 33]),
    block=st.sampled_from([1, 4, 8]),
    size=st.integers(1, 40),
    kind=st.sampled_from(["chunked", "sliding_window"]),
    contiguous=st.booleans(),
)
def test_blocked_with_any_size(length, block, size, kind, contiguous):
    q, k, v = arrays(1, length, 2, 1, 4)
    positions = np.arange(length, dtype=np.int32)[None]
    mask = dataclasses.replace(
        mask_of(positions, np.ones_like(positions), (kind, size)), contiguous=contiguous
    )
    found = reference.attend_blocked(q, k, v, mask, 0.5, block=block)
    np.testing.assert_allclose(found, reference.attend(q, k, v, mask, 0.5), atol=1e-5)


def test_splash_says_why_it_cannot_run():
    q, k, v = arrays(length=23)
    mask = dataclasses.replace(mask_of(*packed(2, 23), "causal"), self_attention=False)
    with pytest.raises(JaxherdError, match="neither the queries' own tokens nor in the order"):
        attention(q, k, v, mask=mask, implementation="splash")


def test_temperature_scales_the_query():
    q, k, v = arrays()
    mask = mask_of(*packed(2, 23), "causal")
    factor = jnp.linspace(0.5, 2, 46).reshape(2, 23)
    found = attention(q, k, v, mask=mask, temperature_BT=factor)
    wanted = attention(q * factor[:, :, None, None], k, v, mask=mask)
    np.testing.assert_array_equal(found, wanted)


def test_wrong_names_and_heads():
    q, k, v = arrays()
    mask = mask_of(*packed(2, 23), "causal")
    with pytest.raises(JaxherdError, match="did you mean 'splash'"):
        attention(q, k, v, mask=mask, implementation="splsh")
    with pytest.raises(JaxherdError, match="3 query heads are no multiple of 2"):
        attention(q[:, :, :3], k, v, mask=mask)
