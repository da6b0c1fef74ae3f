"""What the forward pass keeps for the gradient, by name.

Layers mark intermediate values with `jax.ad_checkpoint.checkpoint_name`; a policy keeps some of
them and recomputes the rest.
"""

from collections.abc import Callable

import jax

from jaxherd.core.errors import JaxherdError, nearest

_policies = jax.checkpoint_policies

POLICIES: dict[str, Callable | None] = {
    # Keep everything: fastest, largest.
    "none": None,
    # Keep nothing but the layer's input: smallest, one more forward pass.
    "full": _policies.nothing_saveable,
    # Keep the results of matrix products without batch dimensions.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # Keep what the attention kernel needs for its gradient, recompute the rest.
    "kernel": _policies.save_only_these_names("attention_residuals"),
    # Likewise, and its projected output, which saves a matrix product for as many bytes again.
    "attention": _policies.save_only_these_names("attention_out", "attention_residuals"),
}


def checkpointed(function: Callable, policy: str) -> Callable:
    """Return `function` with its residuals chosen by the policy.

    Raises:
      JaxherdError: no policy of this name.
    """
    if policy not in POLICIES:
        raise JaxherdError(f"no remat policy {policy!r}; " + nearest(policy, POLICIES))
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)
