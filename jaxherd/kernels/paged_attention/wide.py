"""Query heads as rows that are as wide as all key/value heads of a token.

A page holds the heads of a token side by side.  A query head's row has zeros outside of its own
key/value head's part, so that its product with a whole token is its own score, and nothing is moved
apart.

Axis letters: B sequences, T new tokens, N query heads, K key/value heads, G = N / K, H head size,
D = K H, R = T N rows.
"""

import jax
import jax.numpy as jnp
from einops import rearrange


def widen(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Return [B, R, D]: each row holds its query under its own key/value head."""
    own = jnp.eye(kv_heads, dtype=q_BTNH.dtype)
    q = rearrange(q_BTNH, "B T (K G) H -> B T K G 1 H", K=kv_heads)
    return rearrange(q * own[:, None, :, None], "B T K G k H -> B (T K G) (k H)")


def own_part(out_BRD: jax.Array, new: int, kv_heads: int) -> jax.Array:
    """Return [B, T, N, H]: of each row the part under its own key/value head."""
    wide = rearrange(out_BRD, "B (T K G) (k H) -> B T G H K k", T=new, K=kv_heads, k=kv_heads)
    return rearrange(jnp.diagonal(wide, axis1=-2, axis2=-1), "B T G H K -> B T (K G) H")
