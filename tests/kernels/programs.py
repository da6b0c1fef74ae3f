"""The programs of the attention specs, as they are compiled for TPUs and GPUs that are not here."""

import jax
import jax.numpy as jnp

from jaxherd.kernels import AttentionMask, PagePool, attention, paged_attention
from jaxherd.kernels.attention import arg_specs
from jaxherd.kernels.paged_attention import arg_specs as paged_specs


def attention_program(spec: arg_specs.ArgSpec, implementation: str | None):
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
            contiguous=same and not spec.packed, keys_by_position=not same and not spec.scattered,
        )  # fmt: skip
        return attention(q, k, v, mask=mask, implementation=implementation)

    def run(*arguments):
        if not spec.trained:
            return call(*arguments)
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)

    return run, (q, k, k, p, r, p, prefix)


def paged_program(spec: paged_specs.ArgSpec, implementation: str | None = None):
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
        return paged_attention(
            q, pool, table, lengths, kind=spec.kind, size=spec.size, implementation=implementation
        )

    return run, (q, pool, table, lengths)
