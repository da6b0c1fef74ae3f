"""Which noise goes with which example: exact optimal transport inside a batch, on the host.

Axis letters: B batch.  Source: melodyflow.md 4 (mini-batch coupling).
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


def couple(latents: Float[np.ndarray, "B ..."], noise: Float[np.ndarray, "B ..."]) -> Coupling:
    """Return the assignment that minimises the summed squared distance, solved exactly.

    Args:
      latents, noise: of the same shape; everything behind the batch axis is flattened, so rows
        are crops of one length.
    Raises:
      ValueError: the shapes differ.

    The result depends on the values alone; O(B^3) and meant for the batch of one device or host.
    """
    from scipy.optimize import linear_sum_assignment

    if latents.shape != noise.shape:
        raise ValueError(f"latents {latents.shape} and noise {noise.shape} differ in shape")
    rows = len(latents)
    cost_BB = squared_distances(latents.reshape(rows, -1), noise.reshape(rows, -1))
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
