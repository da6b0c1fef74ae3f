"""Pulling an inverted velocity back to the statistics of velocities on the true path.

The KL term compares patches of a velocity with those of a reference velocity; the pair term of the
original ReNoise asks for no correlation along time.

Axis letters: B batch, T frames, C latent channels, P patches, N values of a patch.
Source: melodyflow.md 6.2.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

_FLOOR = 1e-6


def _moments(v_BTC, patch: int):
    """Return mean and unbiased variance of patches of `patch` frames by `patch` channels."""
    frames, channels = (size // patch * patch for size in v_BTC.shape[1:])
    cut = v_BTC[:, :frames, :channels].astype(jnp.float32)
    v_BPN = rearrange(cut, "B (T a) (C b) -> B (T C) (a b)", a=patch, b=patch)
    return v_BPN.mean(axis=-1), v_BPN.var(axis=-1, ddof=1)


def patch_kl(
    a_BTC: Float[Array, "B T C"], b_BTC: Float[Array, "B T C"], patch: int = 4
) -> Float[Array, "B"]:
    """Return the divergence of a's patches from b's, summed over the patches of each row.

    Each patch is a Gaussian by its mean mu and unbiased variance s:
    | log((s_b + 1e-6) / (s_a + 1e-6)) + (s_a + (mu_a - mu_b)^2) / (s_b + 1e-6) - 1 |, without the
    usual half.  Frames and channels beyond a multiple of `patch` do not count.
    """
    mean_a, var_a = _moments(a_BTC, patch)
    mean_b, var_b = _moments(b_BTC, patch)
    logs = jnp.log((var_b + _FLOOR) / (var_a + _FLOOR))
    ratio = (var_a + jnp.square(mean_a - mean_b)) / (var_b + _FLOOR)
    return jnp.abs(logs + ratio - 1).sum(axis=-1)


def pair_correlation(v_BTC: Float[Array, "B T C"], key: jax.Array) -> Float[Array, "B"]:
    """Return the squared correlation of each channel with itself at a random lag, summed.

    At the full length and after each halving by averaging pairs, down to 8 frames: one lag from 1
    to half of the length, sum over channels of mean_t(v_t v_(t + lag))^2.  The term of ReNoise
    and pix2pix-zero, which roll an image along both sides, for latents with one axis of time
    [recall; melodyflow.md 6.2 names the term without its formula].
    """
    total, level = jnp.zeros(v_BTC.shape[0]), 0
    v_BTC = v_BTC.astype(jnp.float32)
    while True:
        frames = v_BTC.shape[1]
        lag_key = jax.random.fold_in(key, level)
        lag = jax.random.randint(lag_key, (), 1, max(frames // 2, 1) + 1)
        total += jnp.square((v_BTC * jnp.roll(v_BTC, lag, axis=1)).mean(axis=1)).sum(axis=-1)
        if frames < 16:
            return total
        even = v_BTC[:, : frames // 2 * 2]
        v_BTC, level = rearrange(even, "B (T two) C -> B T two C", two=2).mean(axis=2), level + 1


def regularize(
    v_BTC: Float[Array, "B T C"],
    reference_BTC: Float[Array, "B T C"],
    key: jax.Array,
    *,
    lambda_kl: float,
    lambda_pair: float = 0.0,
    pair_rolls: int = 5,
    pair_positions: int = 4096,
    gradient_steps: int = 4,
    clip: float = 100.0,
    patch: int = 4,
) -> Float[Array, "B T C"]:
    """Return the velocity after a few steps down the gradient of the terms.

    v <- v - lambda clip(grad, -clip, clip), `gradient_steps` times for the KL term; after each, the
    pair term the same way, `pair_rolls` times with a share of its weight each.

    The pair term is a mean over positions, so its gradient is the smaller the more there are, and
    its weight belongs to a size: `pair_positions`, the 64 x 64 of the images it was made for
    [recall].  Latents of other lengths take steps of the same size a position; with the weight as
    it is, short latents diverge.  This scaling is ours.
    """
    share = lambda_pair / pair_rolls * v_BTC.shape[1] / pair_positions

    def step(v, number):
        if lambda_kl:
            gradient = jax.grad(lambda x: patch_kl(x, reference_BTC, patch).sum())(v)
            v = v - lambda_kl * jnp.clip(gradient, -clip, clip)
        if lambda_pair:
            for roll in range(pair_rolls):
                roll_key = jax.random.fold_in(jax.random.fold_in(key, number), roll)
                gradient = jax.grad(lambda x, k=roll_key: pair_correlation(x, k).sum())(v)
                v = v - share * jnp.clip(gradient, -clip, clip)
        return v, None

    return jax.lax.scan(step, v_BTC, jnp.arange(gradient_steps))[0]
