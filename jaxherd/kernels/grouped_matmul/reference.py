"""The definition of the grouped product.  Axis letters: M rows, K inner, G groups, N columns."""

import jax.numpy as jnp


def group_of_row(group_sizes_G, rows: int):
    """Return the group of each row; rows of the tail get G."""
    ends_G = jnp.cumsum(group_sizes_G)
    return jnp.searchsorted(ends_G, jnp.arange(rows, dtype=ends_G.dtype), side="right")


def grouped_matmul(x_MK, w_GKN, group_sizes_G):
    """Every row by every matrix, then a choice: G times the work, and plain to read."""
    group_M = group_of_row(group_sizes_G, x_MK.shape[0])
    choice_GM = group_M[None, :] == jnp.arange(w_GKN.shape[0])[:, None]
    chosen_GMK = jnp.where(choice_GM[:, :, None], x_MK[None], 0)
    y_MN = jnp.einsum("GMK,GKN->MN", chosen_GMK, w_GKN, preferred_element_type=jnp.float32)
    # The choice also keeps what comes back for rows of no group out of the gradient.
    return jnp.where((group_M < w_GKN.shape[0])[:, None], y_MN, 0).astype(x_MK.dtype)
