"""The exact velocity field of a Gaussian mixture (melodyflow.md 6.3), in numbers of our own."""

import jax
import jax.numpy as jnp
import numpy as np

DIM, COMPONENTS, STD = 16, 8, 0.3


def means(seed: int = 0) -> np.ndarray:
    """Means for which the mixture has about unit variance."""
    drawn = np.random.default_rng(seed).standard_normal((COMPONENTS, DIM))
    drawn -= drawn.mean(axis=0)
    return (drawn / drawn.std() * np.sqrt(1 - STD**2)).astype(np.float32)


def samples(count: int, seed: int = 1) -> jax.Array:
    """Draws as latents [count, 1, 16]."""
    rng = np.random.default_rng(seed)
    x = means()[rng.integers(0, COMPONENTS, count)] + STD * rng.standard_normal((count, DIM))
    return jnp.asarray(x[:, None], jnp.float32)


def velocity(z_BTC: jax.Array, t_B: jax.Array) -> jax.Array:
    """E[x1 - x0 | z_t = z]."""
    mu, z, t = jnp.asarray(means()), z_BTC.reshape(len(z_BTC), DIM), t_B[:, None]
    var = t**2 * STD**2 + (1 - t) ** 2
    off = z[:, None] - t[:, :, None] * mu
    responsibility = jax.nn.softmax(-0.5 * (off**2).sum(-1) / var, axis=-1)
    gain = (t * STD**2 - (1 - t)) / var
    each = mu + gain[:, :, None] * off
    return jnp.einsum("bk,bkd->bd", responsibility, each).reshape(z_BTC.shape)
