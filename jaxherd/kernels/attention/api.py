"""One entry to attention; `implementation` says which code runs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.platform import platform
from jaxherd.kernels.attention import reference, sequence_parallel
from jaxherd.kernels.attention.mask import AttentionMask

IMPLEMENTATIONS = ("reference", "xla", "splash", "pallas_gpu", "gather", "ring")

# Below this many scores per head and row the whole score matrix is cheaper than a loop.
_DENSE_SCORES = 1 << 20

# Local rules up to this size are computed for all blocks at once.
_LOCAL_SIZE = 512


def attention(
    q_BTHD: Float[Array, "B T N D"],
    k_BSKD: Float[Array, "B S K D"],
    v_BSKD: Float[Array, "B S K D"],
    *,
    mask: AttentionMask,
    scale: float | None = None,
    temperature_BT: Float[Array, "B T"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N D"]:
    """Grouped-query attention under a lazily computed mask.

    out = softmax(scale (temperature q) k^T + mask) v; query head h uses key/value head h // (N / K).

    Args:
      q_BTHD: queries; N heads of size D.
      k_BSKD, v_BSKD: keys and values; N must be a multiple of K.  Where the mask has a negative
        position all three may hold anything; elsewhere they are numbers, seen or not.
      mask: the rule over positions and segments.
      scale: D**-0.5 by default.
      temperature_BT: a factor on each query, the same for its heads (Llama 4's layers without
        RoPE, llama4.md 2.3); the product is rounded to the queries' dtype.
      implementation: "reference" (the definition), "xla" (blocked when long), "splash" (jax's
        splash attention, TPU), "pallas_gpu" (ours, through Triton), "gather" or "ring" (where
        the length is sharded, see `sequence_parallel`) or None, which takes gather where the length
        is sharded, splash on TPU where it applies and its padding is small, and xla otherwise.
      interpret: run a Pallas implementation in interpret mode, for tests on CPU.
    Returns:
      [B, T, N, D] in the dtype of `q_BTHD`; a query that sees no key gives zeros.
    Raises:
      JaxherdError: an unknown implementation, or one that cannot run here.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise JaxherdError(
            f"attention: no implementation {implementation!r}; "
            + nearest(implementation, IMPLEMENTATIONS)
        )
    if q_BTHD.shape[2] % k_BSKD.shape[2]:
        raise JaxherdError(
            f"attention: {q_BTHD.shape[2]} query heads are no multiple of {k_BSKD.shape[2]} "
            "key/value heads."
        )
    if temperature_BT is not None:
        q_BTHD = (q_BTHD * temperature_BT[:, :, None, None]).astype(q_BTHD.dtype)
    factor = float(q_BTHD.shape[-1] ** -0.5 if scale is None else scale)
    q_BTHD, k_BSKD, v_BSKD = mask.without_padding(q_BTHD, k_BSKD, v_BSKD)
    out_BTHD: Any = _attend(q_BTHD, k_BSKD, v_BSKD, mask, factor, implementation, interpret)
    if mask.contiguous or mask.finite_padding:
        return out_BTHD
    # What comes back for padding may be anything as well; kernels let padding attend to padding.
    return jnp.where((mask.q_positions_BT >= 0)[:, :, None, None], out_BTHD, 0)


def _attend(q_BTHD, k_BSKD, v_BSKD, mask: AttentionMask, factor: float, implementation, interpret):
    if implementation is None:
        implementation = "splash" if _splash_pays(q_BTHD, k_BSKD, mask) else "xla"
        if sequence_parallel.applies(q_BTHD, k_BSKD, mask):
            implementation = "gather"
    if implementation in ("gather", "ring"):
        return sequence_parallel.attend(
            q_BTHD, k_BSKD, v_BSKD, mask, factor, implementation, interpret=interpret
        )
    if implementation == "splash":
        from jaxherd.kernels.attention import splash

        return splash.attend(q_BTHD, k_BSKD, v_BSKD, mask, factor, interpret=interpret)
    if implementation == "pallas_gpu":
        from jaxherd.kernels.attention import pallas_gpu

        return pallas_gpu.attend(q_BTHD, k_BSKD, v_BSKD, mask, factor, interpret=interpret)
    short = mask.size is not None and mask.size <= _LOCAL_SIZE and mask.size < q_BTHD.shape[1]
    if implementation == "xla" and mask.self_attention and mask.is_local and short:
        return reference.attend_local(q_BTHD, k_BSKD, v_BSKD, mask, factor)
    if implementation == "xla" and q_BTHD.shape[1] * k_BSKD.shape[1] > _DENSE_SCORES:
        return reference.attend_blocked(q_BTHD, k_BSKD, v_BSKD, mask, factor)
    return reference.attend(q_BTHD, k_BSKD, v_BSKD, mask, factor)


def _splash_pays(q_BTHD, k_BSKD, mask) -> bool:
    from jaxherd.kernels.attention import splash

    length, keys = q_BTHD.shape[1], k_BSKD.shape[1]
    # Short rows would be padded to a block of 128; their whole scores are cheap.
    fits = length >= 1024 or -length % 128 <= length // 16
    if mask.kind == "bidirectional" and keys != length:
        # Scores of a single block of keys stay in fast memory without a kernel; XLA fills lanes of
        # 128 as well, so that the padding of more is no reason (README.md).
        fits &= keys > 128
    return platform() == "tpu" and fits and splash.unsupported(q_BTHD, k_BSKD, mask) is None
