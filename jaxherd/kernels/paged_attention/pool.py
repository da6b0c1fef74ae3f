"""One layer's pool of pages of keys and values, laid out so that decoding reads no padding.

A token's key/value heads lie side by side in the last axis, [pages, page_size, K H]: that axis is a
multiple of 128 lanes for every head size that our models have, so that a page is dense in memory
and goes to the matrix unit without being taken apart (heads of 64 would fill half of the lanes of a
[.., 4, 64] array).  Scales of int8 pools lie with the tokens in the last axis for the same reason.

Axis letters: P pages, p tokens of a page, D = K H, B sequences, T new tokens, K key/value heads, H
head size, Q pages of a sequence, w pages gathered, S = w p keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """Pages of keys and values of one layer, shared by all sequences.

    Position t of a sequence lies in slot t mod p of page table[t // p].  Slots that were never
    written may hold anything.

    Attributes:
      k_PpD, v_PpD: [P, p, D] float, or int8 with scales.
      k_scale_PKp, v_scale_PKp: [P, K, p] float32, value = scale x code, one per token and head; or
        None.
    """

    # Any: arrays, and in their place shapes or shardings.
    k_PpD: Any
    v_PpD: Any
    k_scale_PKp: Any = None
    v_scale_PKp: Any = None

    @classmethod
    def empty(cls, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype) -> "PagePool":
        """Return a pool of zeros; dtype int8 gives one with scales."""
        shape = (pages, page_size, kv_heads * head_dim)

        def scale():
            if jnp.dtype(dtype) != jnp.int8:
                return None
            return jnp.zeros((pages, kv_heads, page_size), jnp.float32)

        # An array each: a pool may be donated, and a buffer can be so only once.
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale(), scale())

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_PpD.shape[1]

    def write(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        page_table_BQ: Int[Array, "B Q"],
        positions_BT: Int[Array, "B T"],
    ) -> "PagePool":
        """Return the pool with new tokens in their slots; negative positions are skipped."""
        kept_BT = positions_BT >= 0
        at_BT = jnp.maximum(positions_BT, 0)
        pages_BT = jnp.take_along_axis(page_table_BQ, at_BT // self.page_size, axis=1)
        # Beyond the pool: dropped.
        pages_BT = jnp.where(kept_BT, pages_BT, self.k_PpD.shape[0])
        slots_BT = at_BT % self.page_size

        def put(store, scale, new):
            if scale is not None:
                codes, new_scale = _codes(new)
                scale = scale.at[pages_BT, :, slots_BT].set(new_scale, mode="drop")
                new = codes
            flat = rearrange(new, "B T K H -> B T (K H)").astype(store.dtype)
            return store.at[pages_BT, slots_BT].set(flat, mode="drop"), scale

        k, k_scale = put(self.k_PpD, self.k_scale_PKp, k_BTKH)
        v, v_scale = put(self.v_PpD, self.v_scale_PKp, v_BTKH)
        return PagePool(k, v, k_scale, v_scale)

    def gather(
        self,
        page_table_BQ: Int[Array, "B Q"],
        first_B: Int[Array, "B"],
        lengths_B: Int[Array, "B"],
        *,
        width: int,
        head_dim: int,
        dtype: Any,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], Int[Array, "B S"]]:
        """Return (keys, values, positions) of `width` pages a sequence as plain rows.

        Args:
          first_B: the first page, counted within the sequence.
          lengths_B: tokens of each sequence; what lies beyond is zeros at position -1.
        """
        page, columns = self.page_size, page_table_BQ.shape[1]
        index_Bw = first_B[:, None] + jnp.arange(width)
        positions_BS = rearrange(index_Bw[..., None] * page + jnp.arange(page), "B w p -> B (w p)")
        stored_BS = positions_BS < lengths_B[:, None]
        held_Bw = stored_BS[:, ::page]
        found_Bw = jnp.take_along_axis(page_table_BQ, jnp.clip(index_Bw, 0, columns - 1), axis=1)
        pages_Bw = jnp.where(held_Bw, found_Bw, 0)

        def rows(store, scales):
            x = rearrange(store[pages_Bw], "B w p (K H) -> B (w p) K H", H=head_dim)
            if scales is not None:
                x = x.astype(jnp.float32) * rearrange(scales[pages_Bw], "B w K p -> B (w p) K 1")
            # What was never written may be no number at all.
            return jnp.where(stored_BS[:, :, None, None], x, 0).astype(dtype)

        k, v = rows(self.k_PpD, self.k_scale_PKp), rows(self.v_PpD, self.v_scale_PKp)
        return k, v, jnp.where(stored_BS, positions_BS, -1)


def _codes(x_BTKH) -> tuple[jax.Array, jax.Array]:
    """Return int8 codes and their scale, symmetric, one per token and head."""
    x = x_BTKH.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale
