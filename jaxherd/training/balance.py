"""Options to balance the load of routed experts: none, an auxiliary loss, or a bias update.

None of them is Meta's disclosed recipe for Llama 4; nothing about it is disclosed
(llama4.md section 3).  Axis letters: E experts.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Balancing = Literal["none", "auxiliary_loss", "bias_update"]


def auxiliary_loss(
    load_E: Float[Array, "*layers E"],
    probability_E: Float[Array, "*layers E"],
    tokens: Float[Array, "*layers"],
) -> Float[Array, ""]:
    """Return the mean over layers of E sum_e f_e P_e, which is 1 for a uniform load.

    f_e is the share of rows that expert e got, P_e its mean router probability (softmax of the
    logits, not the sigmoid scores).
    """
    share = load_E / jnp.maximum(load_E.sum(axis=-1, keepdims=True), 1.0)
    mean = probability_E / jnp.maximum(tokens[..., None], 1.0)
    return (load_E.shape[-1] * (share * mean).sum(axis=-1)).mean()


def bias_step(
    bias_E: Float[Array, "*layers E"], load_E: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """Return the selection bias after one optimiser step (not one microbatch).

    delta_e = rate sign(mean(n) - n_e), centred so that the bias keeps its mean.
    """
    delta = rate * jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)
    return bias_E + delta - delta.mean(axis=-1, keepdims=True)
