"""attention beside the splash attentions of jax and tokamax and jax's flash attention, with gradients.

Shape: T,N,K,H,size; 8192,40,8,128,0 (a full layer of Llama 4 in training) by default; a size is a
chunk.  See compare.py.  Here "rows" is how many block pairs are visited for each that is needed, by
the map that drives the grid (jax's flash attention visits them all and skips the arithmetic of those
above the diagonal; plain splash's map is that of one document, so packed rows are counted against
three documents of a third of the row).  "inner / tile" is bundles per 512 x 1024 x 1024
multiplications: two visits of a block of 1,024 x 1,024 scores with heads of 128, forward.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.kernels import AttentionMask, attention
from jaxherd.kernels.attention import blocks

DEFAULT = (8192, 40, 8, 128, 0)
BLOCK = 1024


def case(what, T, N, K, H, size, packed=False, backward=False):
    """Return (function, shapes) of one line, for the child process."""
    shapes = [((1, T, N, H), "bfloat16"), ((1, T, K, H), "bfloat16"), ((1, T, K, H), "bfloat16"),
              ((1, T), "int32"), ((1, T), "int32")]  # fmt: skip
    if what == "flash":
        shapes[1] = shapes[2] = shapes[0]
    call = functools.partial(
        {"ours": _ours, "splash": _splash, "flash": _flash, "tokamax": _tokamax}[what], size, packed
    )
    if not backward:
        return call, shapes

    def gradients(*arguments):
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)

    return gradients, shapes


def _ours(size, packed, q, k, v, positions, segments):
    own = segments if packed else None
    mask = AttentionMask(
        positions, positions, own, own, kind="chunked" if size else "causal", size=size or None,
        self_attention=True, contiguous=not packed,
    )  # fmt: skip
    return attention(q, k, v, mask=mask, implementation="splash")


def _splash(size, packed, q, k, v, positions, segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1:3]
    rule = masks.ChunkedCausalMask((T, T), size) if size else masks.CausalMask((T, T))
    block = min(BLOCK, T)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([rule] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=512, block_q_dkv=block,
            block_kv_dkv=block, block_kv_dkv_compute=512, use_fused_bwd_kernel=True,
        ),
        head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    ids = splash.SegmentIds(segments, segments) if packed else None
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


def _tokamax(size, packed, q, k, v, positions, segments):
    from tokamax._src.ops.experimental.tpu.splash_attention import base
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    T = q.shape[1]
    rule = masks.ChunkedCausalMask((T, T), size) if size else masks.CausalMask((T, T))
    block = min(BLOCK, T)
    config = splash.SplashConfig(
        block_q=block, block_kv=block, block_kv_compute=512, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=512, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha(rule, config=config, q_seq_shards=1)
    ids = base.SegmentIds(segments, segments) if packed else None
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


def _flash(size, packed, q, k, v, positions, segments):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = flash.SegmentIds(segments, segments) if packed else None
    return flash.flash_attention(
        q, k, v, segment_ids=ids, causal=True, sm_scale=q.shape[-1] ** -0.5
    ).swapaxes(1, 2)


def entries(shape, chip):
    """Return the lines of the table."""
    from compare import Entry

    T, N, K, H, size = shape or DEFAULT
    common = {"T": T, "N": N, "K": K, "H": H, "size": size}
    kind = "chunked" if size else "causal"

    def count(length, kind=kind):
        return int(blocks.needed_blocks(kind, size or None, length, BLOCK, BLOCK).sum())

    needed = count(T)
    # Three documents, one after another: a block at a border belongs to two of them.
    index = np.arange(T, dtype=np.int32)
    ids = index * 3 // T * T + (index % (-(-T // 3)) // size if size else 0)
    packed_needed = int(
        blocks.needed_by_tokens(index, size or None, ids, ids, BLOCK, BLOCK, T).sum()
    )
    floor = (2 * T * N * H + 2 * T * K * H) * 2
    visit = BLOCK * BLOCK * H

    def line(label, what, kernels, visited, needed, matmuls, packed=False, backward=False, block=1):
        arguments = {"what": what, **common, "packed": packed, "backward": backward}
        # Of each visit: a block of keys and of values; of each row of blocks: queries and outputs.
        moved = N * (visited * BLOCK * H * 2 * 2 + 2 * T * H * 2) * matmuls / 2
        return Entry(label, arguments, kernels, (int(visit * matmuls * block),),
                     N * needed * visit * matmuls, moved, floor * matmuls / 2,
                     visited / needed)  # fmt: skip

    every = (T // BLOCK) ** 2
    found = [
        line("ours, one document", "ours", ("fwd",), needed, needed, 2),
        line("splash, one document", "splash", ("fwd",), needed, needed, 2),
        line("ours, packed", "ours", ("fwd",), packed_needed, packed_needed, 2, packed=True),
        line("splash, packed", "splash", ("fwd",), needed, packed_needed, 2, packed=True),
    ]
    if tokamax := importlib.util.find_spec("tokamax") is not None:
        found.append(line("tokamax splash, one document", "tokamax", ("fwd",), needed, needed, 2))
    if not size:
        # Its default blocks: 128 x 128.
        found.append(line("flash attention", "flash", ("flash",), every, needed, 2, block=1 / 64))
    found += [
        line("ours, one document: gradients", "ours", ("dkv",), needed, needed, 5, backward=True),
        line("splash, one document: gradients", "splash", ("dkv",), needed, needed, 5,
             backward=True),
    ]  # fmt: skip
    if tokamax:
        found.append(line("tokamax splash, one document: gradients", "tokamax", ("dkv",), needed,
                          needed, 5, backward=True))  # fmt: skip
    return found
