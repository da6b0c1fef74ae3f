"""How far two signals' magnitude spectra are from each other, at several resolutions.

Source: melodyflow.md 2.2 (stereo as left, right, mid and side; Stable Audio's autoencoder is trained
by seven transforms).  The form of the terms is Yamamoto et al.'s, arXiv 1910.11480, section 2.2.

Axis letters: B batch, T samples, C audio channels, V views of a signal.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.spectral import Stereo, StftConfig, stereo_views, stft


@dataclasses.dataclass(frozen=True)
class MultiScaleStft:
    """Spectral convergence and magnitude distances, averaged over transforms.

    With S = |STFT| of the output and R = |STFT| of the target, for every transform

        convergence ||R - S|| / ||R|| + log_magnitude mean |ln R - ln S| + magnitude mean |R - S|

    Attributes:
      scales: the transforms.
      convergence, log_magnitude, magnitude: factors of the terms; zero leaves one out.
      floor: energies below it count as this, so that logarithms are finite and silence has no slope.
      per_view: a ratio of norms for every view, averaged, instead of one for all.  A view that is
        silent in the target, as the side of a mono recording, then outweighs all others.
    """

    scales: tuple[StftConfig, ...] = tuple(StftConfig(2**e) for e in range(11, 4, -1))
    convergence: float = 1.0
    log_magnitude: float = 1.0
    magnitude: float = 0.0
    floor: float = 1e-8
    per_view: bool = False

    def __post_init__(self):
        factors = (self.convergence, self.log_magnitude, self.magnitude)
        if not self.scales or min(factors) < 0 or max(factors) <= 0 or self.floor <= 0:
            raise JaxherdError(
                "a multi-scale STFT loss needs at least one transform, factors that are not negative "
                f"nor all zero, and a positive floor; got {len(self.scales)} transforms, factors "
                f"{factors} and floor {self.floor}."
            )


def multi_scale_stft(
    output_BTC: Float[Array, "B T C"],
    target_BTC: Float[Array, "B T C"],
    config: MultiScaleStft,
    stereo: Stereo = "mid_side",
) -> Float[Array, ""]:
    """Return the distance over a stereo signal's L, R, mid and side, or the channels of any other.

    `stereo="separate"` leaves mid and side out.

    Raises:
      JaxherdError: a signal that is too short for one of the transforms.
    """
    output_BVT, target_BVT = (stereo_views(wave, stereo) for wave in (output_BTC, target_BTC))
    return stft_distance(output_BVT, target_BVT, config)


def stft_distance(
    output_BVT: Float[Array, "B V T"], target_BVT: Float[Array, "B V T"], config: MultiScaleStft
) -> Float[Array, ""]:
    """Return the distance of signals as they are; see `MultiScaleStft`.

    Norms are taken over the whole batch: a quiet example counts for little in the convergence, and
    as much as any in the logarithms.

    Raises:
      JaxherdError: a signal that is too short for one of the transforms.
    """
    # Both signals go through one transform: half as many, twice as large.
    both = jnp.concatenate([output_BVT, target_BVT])
    total = jnp.zeros(())
    for scale in config.scales:
        spectrum = stft(both, scale)
        energy = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        energy = jnp.maximum(energy, config.floor)
        output, target = jnp.split(jnp.sqrt(energy), 2)
        if config.convergence:
            axes = (0, 2, 3) if config.per_view else (0, 1, 2, 3)
            # The tiny summand keeps the slope of equal signals finite.
            error = jnp.sqrt(jnp.sum(jnp.square(target - output), axes) + 1e-20)
            size = jnp.sqrt(jnp.sum(jnp.square(target), axes))
            total += config.convergence * jnp.mean(error / size)
        if config.log_magnitude:
            output_log, target_log = jnp.split(0.5 * jnp.log(energy), 2)
            total += config.log_magnitude * jnp.mean(jnp.abs(target_log - output_log))
        if config.magnitude:
            total += config.magnitude * jnp.mean(jnp.abs(target - output))
    return total / len(config.scales)
