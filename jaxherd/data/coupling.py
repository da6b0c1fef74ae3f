"""Which noise goes with which example: exact optimal transport inside a batch, on the host.

Axis letters: A, B batch, F frames, K values.  Source: melodyflow.md 4 (mini-batch coupling).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Coupling:
    """An assignment of noise to examples.

    Attributes:
      permutation_B: example i goes with noise `permutation_B[i]`.
      cost_before, cost_after: mean squared distance of a pair, ||x0 - x1||^2, as drawn and as
        assigned.
    """

    permutation_B: Int[np.ndarray, "B"]
    cost_before: float
    cost_after: float


def squared_distances(
    a_BK: Float[np.ndarray, "A K"], b_BK: Float[np.ndarray, "B K"]
) -> Float[np.ndarray, "A B"]:
    """Return ||a_i - b_j||^2 in float64."""
    a, b = a_BK.astype(np.float64), b_BK.astype(np.float64)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None]
    return np.maximum(squares - 2.0 * (a @ b.T), 0.0)


def masked_distances(
    a: Float[np.ndarray, "A F ..."],
    b: Float[np.ndarray, "B F ..."],
    valid_AF: Float[np.ndarray, "A F"],
) -> Float[np.ndarray, "A B"]:
    """Return the sums of (a_i - b_j)^2 over the frames that row i of `a` has, in float64."""
    valid_AF = valid_AF.astype(np.float64)
    a_AFK = a.reshape(*a.shape[:2], -1).astype(np.float64) * valid_AF[:, :, None]
    b_BFK = b.reshape(*b.shape[:2], -1).astype(np.float64)
    squares_A = np.einsum("afk,afk->a", a_AFK, a_AFK)
    squares = squares_A[:, None] + valid_AF @ np.einsum("bfk,bfk->bf", b_BFK, b_BFK).T
    products = a_AFK.reshape(len(a), -1) @ b_BFK.reshape(len(b), -1).T
    return np.maximum(squares - 2.0 * products, 0.0)


def couple(
    latents: Float[np.ndarray, "B ..."],
    noise: Float[np.ndarray, "B ..."],
    valid: Float[np.ndarray, "B F"] | None = None,
) -> Coupling:
    """Return the assignment that minimises the summed squared distance, solved exactly.

    Args:
      latents, noise: of the same shape; everything behind the batch axis is flattened.
      valid: for rows of several lengths, [B, F, ...]: 1 for the frames that each of the latents
        has, 0 for padding.  The distance of latents j and noise i is that over the frames of j.
    Raises:
      ValueError: the shapes differ.

    The result depends on the values alone; O(B^3) and meant for the batch of one device or host.
    """
    from scipy.optimize import linear_sum_assignment

    if latents.shape != noise.shape:
        raise ValueError(f"latents {latents.shape} and noise {noise.shape} differ in shape")
    rows = len(latents)
    if valid is None:
        cost_BB = squared_distances(latents.reshape(rows, -1), noise.reshape(rows, -1))
    else:
        cost_BB = masked_distances(latents, noise, valid)
    _, permutation_B = linear_sum_assignment(cost_BB)
    return Coupling(
        permutation_B,
        float(np.trace(cost_BB) / rows),
        float(cost_BB[np.arange(rows), permutation_B].mean()),
    )


def coupled_noise(
    latents: Float[np.ndarray, "B ..."], seed: int
) -> tuple[Float[np.ndarray, "B ..."], Coupling]:
    """Return (noise of unit variance, assigned to the latents in their order, the assignment).

    The same seed gives the same draw; only which row it belongs to depends on the latents.
    """
    drawn = np.random.default_rng(seed).standard_normal(latents.shape, dtype=np.float32)
    coupling = couple(latents, drawn)
    return drawn[coupling.permutation_B], coupling
