"""paged_attention beside jax's paged_attention and ragged_paged_attention.

Shape: B,length,N,K,H,page,size; 64,8192,40,8,128,128,0 (Scout) by default; a size is a window.  See
compare.py.  Decoding is counted by tokens: "inner / tile" is bundles per 512 cached tokens of one
sequence with all of their heads, "MB" what is read for sequences of the full length, and "rows" the
cached tokens read for each that is visible.  HBM is the time of those bytes over that of the visible
tokens' bytes.
"""

import jax.numpy as jnp

from jaxherd.kernels import PagePool, paged_attention
from jaxherd.kernels.paged_attention.pallas_tpu import pages_of_step
from jaxherd.kernels.paged_attention.schedule import most_pages

DEFAULT = (64, 8192, 40, 8, 128, 128, 0)
_STEP = 512


def case(what, B, length, N, K, H, page, size, dtype="bfloat16"):
    """Return (function, shapes) of one line, for the child process."""
    pages, held = length // page, B * (length // page)
    q, lengths, table = ((B, N, H), "bfloat16"), ((B,), "int32"), ((B, pages), "int32")
    if what == "ours":
        pool = [((held, page, K * H), dtype)] * 2
        if dtype == "int8":
            pool += [((held, K, page), "float32")] * 2

        def ours(q, lengths, table, *pool):
            return paged_attention(
                q[:, None], PagePool(*pool), table, lengths,
                kind="sliding_window" if size else "causal", size=size or None,
                implementation="pallas_tpu",
            )  # fmt: skip

        return ours, [q, lengths, table, *pool]
    if what == "jax paged":
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel as theirs

        def paged(q, lengths, table, k, v):
            return theirs.paged_attention(
                q, k, v, lengths, table, pages_per_compute_block=_STEP // page
            )

        return paged, [q, lengths, table, *[((K, held, page, H), dtype)] * 2]
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

    def both(q, lengths, table, pool):
        return ragged.ragged_paged_attention(
            q, pool, lengths, table, jnp.arange(B + 1, dtype=jnp.int32),
            jnp.full((1,), B, jnp.int32), sm_scale=H**-0.5, sliding_window=size or None,
            num_kv_pages_per_block=_STEP // page, num_queries_per_block=8,
            vmem_limit_bytes=64 * 2**20,
        )  # fmt: skip

    return both, [q, lengths, table, ((held, page, 2 * K, H), dtype)]


def entries(shape, chip):
    """Return the lines of the table."""
    from compare import TILE, Entry

    B, length, N, K, H, page, size = shape or DEFAULT
    common = {"B": B, "length": length, "N": N, "K": K, "H": H, "page": page, "size": size}
    kind = "sliding_window" if size else "causal"
    visible = min(size, length) if size else length
    most = most_pages(length // page, 1, page, kind, size or None)
    n = pages_of_step(page, most)

    def line(label, what, kernels, tokens, read, dtype="bfloat16"):
        each = 2 * K * H * (1 if dtype == "int8" else 2) + (8 * K if dtype == "int8" else 0)
        ends = 2 * B * N * H * 2 * (K if what == "ours" else 1)
        return Entry(label, {"what": what, **common, "dtype": dtype}, kernels,
                     (int(TILE * tokens / 512),), int(TILE * B * read / 512),
                     B * read * each + ends, B * visible * each + 2 * B * N * H * 2,
                     read / visible, flops=4.0 * B * N * visible * H)  # fmt: skip

    found = [line("ours", "ours", ("paged_attention",), n * page, most * page)]
    if page % 128 == 0:
        found.append(
            line("ours, int8", "ours", ("paged_attention",), n * page, most * page, "int8")
        )
    if not size:
        # One key/value head at a time.
        found.append(line("jax paged_attention", "jax paged", ("",), _STEP / K, length))
    found.append(line("jax ragged_paged_attention", "jax ragged", ("",), _STEP, length))
    return found
