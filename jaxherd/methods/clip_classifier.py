"""A small classifier of clips, to tell whether an edit has become what it was asked to be.

Axis letters: N rows, T frames, C channels, F features, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class ClipClassifier:
    """Softmax regression on how every channel moves (`features`)."""

    centre_F: np.ndarray
    spread_F: np.ndarray
    weights_FK: np.ndarray
    bias_K: np.ndarray

    def log_odds(self, clips_NTC: Float[np.ndarray, "N T C"]) -> Float[np.ndarray, "N K"]:
        """Return unnormalised log probabilities."""
        x = (features(np.asarray(clips_NTC)) - self.centre_F) / self.spread_F
        return x @ self.weights_FK + self.bias_K

    def predict(self, clips_NTC: Float[np.ndarray, "N T C"]) -> Int[np.ndarray, "N"]:
        """Return the likeliest class of each clip."""
        return self.log_odds(clips_NTC).argmax(axis=1)


def features(clips_NTC: Float[np.ndarray, "N T C"]) -> Float[np.ndarray, "N F"]:
    """Return log powers of every channel in five bands of modulation, and the loudness.

    The bands divide the spectrum over time in equal ratios; loudness is the log of the mean square
    over channels, its mean and its deviation over time.
    """
    clips = np.asarray(clips_NTC, np.float64)
    frames = clips.shape[1]
    power = np.square(np.abs(np.fft.rfft(clips * np.hanning(frames)[None, :, None], axis=1)))
    edges = np.unique(np.round(np.geomspace(1, power.shape[1], 6)).astype(int))
    edges[0] = 0
    spectra = np.log(power + 1e-2)
    parts = [spectra[:, lo:hi].mean(axis=1) for lo, hi in zip(edges, edges[1:])]
    loud = np.log(np.square(clips).mean(axis=2, keepdims=True) + 1e-3)
    return np.concatenate([*parts, loud.mean(axis=1), loud.std(axis=1)], axis=1)


def train_classifier(
    clips_NTC: Float[np.ndarray, "N T C"],
    labels_N: Int[np.ndarray, "N"],
    *,
    seed: int = 0,
    steps: int = 400,
    weight_decay: float = 1e-2,
) -> ClipClassifier:
    """Return a classifier fitted by Adam on all rows at once."""
    x = features(clips_NTC)
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    x = jnp.asarray((x - centre) / spread, jnp.float32)
    y, classes = jnp.asarray(labels_N), int(np.max(labels_N)) + 1
    params = {
        "w": 0.01 * jax.random.normal(jax.random.key(seed), (x.shape[1], classes)),
        "b": jnp.zeros(classes),
    }
    optimizer = optax.adam(3e-2)

    def loss(params):
        logits = x @ params["w"] + params["b"]
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return fit + weight_decay * jnp.square(params["w"]).sum()

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    params = jax.device_get(run(params))
    return ClipClassifier(centre, spread, np.asarray(params["w"]), np.asarray(params["b"]))
