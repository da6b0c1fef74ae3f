"""The loss balancer of EnCodec: every loss gets its share of the gradient at the decoder's output.

    G = sum_i total_norm (w_i / sum_j w_j) g_i / average(||g_i||),   g_i = d loss_i / d output

so that a loss's weight says how much it matters, whatever its scale.  Source: melodyflow.md 2.2.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.modules import Module, buffer


@dataclasses.dataclass(frozen=True)
class BalancerConfig:
    """How gradients are balanced; defaults are audiocraft's, except `batch_mean`.

    Attributes:
      enabled: False adds the gradients up by their weights, as ordinary weighted losses.
      ema_decay: of the averages of norms, which are corrected for their start.
      total_norm: norm of the combined gradient if all parts were aligned.
      per_batch_item: norms of single examples, averaged, instead of the whole batch's norm.
      batch_mean: divide the combined gradient by the batch size when norms are per item.
        Audiocraft does not, so its gradients grow with the batch and terms outside the balancer
        (the KL) lose weight against it; Adam alone would not tell the difference.
      epsilon: added to the averaged norm.
    """

    enabled: bool = True
    ema_decay: float = 0.999
    total_norm: float = 1.0
    per_batch_item: bool = True
    batch_mean: bool = True
    epsilon: float = 1e-12


def debiased(average: jax.Array, count: jax.Array, value: jax.Array, decay: float):
    """Return (average, count) of an exponential average after one more value.

    average_n = sum_i decay^(n-i) value_i / sum_i decay^(n-i), the first average being the value.
    """
    count = decay * count + 1.0
    return average + (value - average) / count, count


class Balancer(Module):
    """Averaged gradient norms, one slot for each loss name."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.norms = buffer(jnp.zeros(len(names)), (None,))
        self.count = buffer(jnp.zeros(()), ())

    def scales(
        self,
        config: BalancerConfig,
        weights: Mapping[str, float],
        gradients: Mapping[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return the factor of every gradient, and every gradient's norm in this batch.

        Args:
          config: see there.
          weights: of the losses that take part; zero leaves one out.
          gradients: d loss / d output, the batch first.
        Raises:
          JaxherdError: a loss that the balancer has no slot for, or weights that sum to zero.
        """
        for name in gradients:
            if name not in self.names:
                raise JaxherdError(f"balancer: no loss {name!r}; " + nearest(name, self.names))
        total = sum(weights[name] for name in gradients)
        if total <= 0:
            raise JaxherdError("balancer: all loss weights are zero; give one a positive weight.")
        norms, scales = {}, {}
        for name, gradient in gradients.items():
            batch = gradient.shape[0]
            squares = jnp.square(gradient.astype(jnp.float32)).reshape(batch, -1).sum(axis=1)
            norm = jnp.sqrt(squares).mean() if config.per_batch_item else jnp.sqrt(squares.sum())
            norms[name] = norm
            if not config.enabled:
                scales[name] = jnp.asarray(weights[name], jnp.float32)
                continue
            slot = self.names.index(name)
            average, _ = debiased(
                self.norms[...][slot].astype(jnp.float32),
                self.count[...].astype(jnp.float32),
                norm,
                config.ema_decay,
            )
            scale = config.total_norm * weights[name] / total / (config.epsilon + average)
            shared = config.batch_mean and config.per_batch_item
            scales[name] = scale / batch if shared else scale
        return scales, norms


def updated(
    buffers: Mapping[str, jax.Array],
    names: tuple[str, ...],
    norms: Mapping[str, jax.Array],
    decay: float,
) -> dict[str, jax.Array]:
    """Return a balancer's buffers {"norms", "count"} after a step with these norms."""
    old = buffers["norms"]
    new = jnp.stack([norms.get(name, old[slot]) for slot, name in enumerate(names)])
    average, count = debiased(old, buffers["count"], new, decay)
    return {"norms": average, "count": count}
