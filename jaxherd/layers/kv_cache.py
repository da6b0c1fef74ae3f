"""Keys and values of one attention layer, as a ring over positions.

Position p lives in slot p mod C.  The stored positions decide what a query may see, so one
structure serves full layers (C = longest sequence), sliding windows (C = window) and chunks
(C = chunk: what is left of the previous chunk is masked by its positions).

Axis letters: B batch, T new tokens, C capacity, K key/value heads, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys, values and their positions; -1 marks an empty slot."""

    k: Float[Array, "*stack B C K H"]
    v: Float[Array, "*stack B C K H"]
    positions: Int[Array, "*stack B C"]

    @classmethod
    def empty(
        cls, stack: tuple[int, ...], batch: int, capacity: int, kv_heads: int, head_dim: int, dtype
    ) -> "LayerCache":
        """Return a cache without entries; `stack` are leading dimensions of scanned layers."""
        shape = (*stack, batch, capacity, kv_heads, head_dim)
        return cls(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.full((*stack, batch, capacity), -1, jnp.int32),
        )

    def write(
        self,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        positions_BT: Int[Array, "B T"],
    ) -> "LayerCache":
        """Return the cache with the new tokens in their slots; negative positions are skipped.

        Of more tokens than slots the last ones stay.
        """
        capacity = self.positions.shape[1]
        newest_B1 = positions_BT.max(axis=1, keepdims=True)
        kept_BT = (positions_BT >= 0) & (positions_BT > newest_B1 - capacity)
        slots_BT = jnp.where(kept_BT, positions_BT % capacity, capacity)
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

        def put(store, new):
            return store.at[rows_B1, slots_BT].set(new.astype(store.dtype), mode="drop")

        return LayerCache(
            put(self.k, k_BTKH), put(self.v, v_BTKH), put(self.positions, positions_BT)
        )
