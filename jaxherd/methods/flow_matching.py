"""Conditional flow matching on the straight path from noise (t = 0) to data (t = 1).

    z_t = t x1 + (1 - t) x0 + sigma_min eps;   loss = mean (v(z_t, t, c) - (x1 - x0))^2

over the frames that clips have: of padded rows the others neither count nor are seen.

Axis letters: B batch, T frames, C latent channels.  Source: melodyflow.md 4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.training.metrics import Metrics, pair

BUCKETS = 5


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The objective.

    Batch fields: latents [B, T, C], standardised; noise [B, T, C] of unit variance, already paired
    with them (`jaxherd.data.coupling`); those of the model's conditioner; and for clips of several
    lengths frame_mask [B, T], 1 for the frames of a row and 0 for the padding behind them.

    Attributes:
      time: "logit_normal" draws t = sigmoid(N(mean, std)), "uniform" t in (0, 1); one t a row.
      time_mean, time_std: of the logit-normal; 0 and 1 are those of a public fine-tuning script,
        the paper's were not recovered.
      sigma_min: of the jitter eps on the path.
      condition_dropout: probability that a row is trained without its condition.  The paper's
        was not recovered; 0.3 is audiocraft's default, 0.1 that of the fine-tuning script.
      times: instead of random times, every row is seen at each of these and no condition is
        dropped: the form for evaluations.
      remat: what the forward pass keeps (`jaxherd.core.remat`).

    Metrics, as means over rows, or over frames where there is a frame_mask: loss; loss_at/lo-hi for
    five equal intervals of t, or loss_at/t for each of `times`; coupling/paired, the mean squared
    difference of latents and noise, and coupling/independent, what it would be for a draw of the
    noise that knows nothing of the latents, E (x1 - x0)^2 = E x1^2 + 1.  As means over rows:
    path_curvature, the squared norm of v - (x1 - x0) of a whole row; and with a frame_mask
    real_frames, the share of frames that are no padding.
    """

    time: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = 0.0
    time_std: float = 1.0
    sigma_min: float = 1e-5
    condition_dropout: float = 0.3
    times: tuple[float, ...] = ()
    remat: str = "none"

    def __post_init__(self):
        if self.time not in ("logit_normal", "uniform"):
            raise JaxherdError(f"time={self.time!r} must be 'logit_normal' or 'uniform'.")
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise JaxherdError(
                f"condition_dropout must be between 0 and 1, got {self.condition_dropout}."
            )
        if any(not 0.0 <= t <= 1.0 for t in self.times):
            raise JaxherdError(f"times must lie between 0 and 1, got {self.times}.")

    def evaluation(self, times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)) -> "FlowMatching":
        """Return the same objective on a fixed grid of times."""
        return dataclasses.replace(self, times=times)

    def sample_times(self, key: jax.Array, batch: int) -> Float[Array, "B"]:
        """Return one t for each row, in float32."""
        if self.time == "uniform":
            return jax.random.uniform(key, (batch,))
        return jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(key, (batch,)))

    def __call__(
        self, model: Any, batch: Mapping[str, Any], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return the mean squared error over rows, (real) frames and channels, and its metrics."""
        time_key, drop_key, jitter_key = jax.random.split(key, 3)
        rows = batch["latents"].shape[0]
        condition = model.condition(batch)
        if self.times:
            return self._on_grid(model, batch, condition, jitter_key)
        if condition is not None and self.condition_dropout:
            keep_B = jax.random.bernoulli(drop_key, 1.0 - self.condition_dropout, (rows,))
            condition = condition.where(keep_B)
        t_B = self.sample_times(time_key, rows)
        error_B = self._errors(model, batch, condition, t_B, jitter_key)
        loss, metrics = self._metrics(error_B, batch)
        weight_B = _weights(batch)
        bucket_B = jnp.clip((t_B * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
        for i in range(BUCKETS):
            inside = (bucket_B == i) * weight_B
            name = f"loss_at/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}"
            metrics[name] = pair((error_B * inside).sum(), inside.sum())
        return loss, metrics

    def _on_grid(self, model, batch, condition, key):
        rows = batch["latents"].shape[0]

        def at(t):
            return self._errors(model, batch, condition, jnp.full((rows,), t), key)

        error_GB = jax.lax.map(at, jnp.asarray(self.times, jnp.float32))
        loss, metrics = self._metrics(error_GB.mean(axis=0), batch)
        weight_B = _weights(batch)
        for t, error_B in zip(self.times, error_GB):
            metrics[f"loss_at/{t:g}"] = pair((error_B * weight_B).sum(), weight_B.sum())
        return loss, metrics

    def _errors(self, model, batch, condition, t_B, key) -> jax.Array:
        """Return the mean squared error of each row over its frames, in float32."""
        x1_BTC = batch["latents"].astype(jnp.float32)
        x0_BTC = batch["noise"].astype(jnp.float32)
        t_B11 = t_B[:, None, None]
        jitter = self.sigma_min * jax.random.normal(key, x1_BTC.shape)
        z_BTC = t_B11 * x1_BTC + (1 - t_B11) * x0_BTC + jitter
        mask_BT = batch.get("frame_mask")
        padding = {} if mask_BT is None else {"seen_BT": mask_BT > 0}
        v_BTC = model(z_BTC, t_B, condition, remat=self.remat, **padding)
        return _mean_squares(v_BTC.astype(jnp.float32) - (x1_BTC - x0_BTC), mask_BT)

    def _metrics(self, error_B, batch) -> tuple[jax.Array, Metrics]:
        """Return the loss, sum over weight of the whole batch, and what is known of every batch."""
        rows, frames, channels = batch["latents"].shape
        mask_BT, weight_B = batch.get("frame_mask"), _weights(batch)
        x1_BTC = batch["latents"].astype(jnp.float32)
        distance_B = _mean_squares(x1_BTC - batch["noise"].astype(jnp.float32), mask_BT)
        power_B = _mean_squares(x1_BTC, mask_BT)
        frames_B = frames if mask_BT is None else weight_B
        total, weight = (error_B * weight_B).sum(), weight_B.sum()
        metrics = {
            "loss": pair(total, weight),
            "path_curvature": pair((error_B * frames_B).sum() * channels, rows),
            "coupling/paired": pair((distance_B * weight_B).sum(), weight),
            "coupling/independent": pair((power_B * weight_B).sum() + weight, weight),
        }
        if mask_BT is not None:
            metrics["real_frames"] = pair(weight, rows * frames)
        return total / weight, metrics

    def train_flops(self, model: Any, spec: Mapping[str, Any]) -> float:
        """Return FLOPs of a training step of the model's config on batches of this shape."""
        tokens = spec["text_states"].shape[1] if "text_states" in spec else 1
        return model.train_flops(*spec["latents"].shape[:2], tokens)


def _weights(batch: Mapping[str, Any]) -> jax.Array:
    """Return what each row counts: its frames where rows differ in length, else 1."""
    if "frame_mask" in batch:
        return batch["frame_mask"].astype(jnp.float32).sum(axis=1)
    return jnp.ones(batch["latents"].shape[0], jnp.float32)


def _mean_squares(values_BTC: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """Return the mean square of each row over channels and the frames that it has."""
    if mask_BT is None:
        return jnp.square(values_BTC).mean(axis=(1, 2))
    seen_BT = mask_BT > 0
    # Before the square: no gradient passes through what stands in the padding, whatever it is.
    squares_BT = jnp.square(jnp.where(seen_BT[..., None], values_BTC, 0.0)).mean(axis=2)
    return squares_BT.sum(axis=1) / jnp.maximum(seen_BT.sum(axis=1), 1)


def gaussian_floor(
    covariance: Float[np.ndarray, "K K"], t: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    """Return the loss of the best predictor for Gaussian data, at each time t.

    Data of covariance S, flattened to K numbers a row, against independent unit noise: the best
    predictor is linear in z_t and leaves, for each eigenvalue w of S, the variance
    w / (t^2 w + (1 - t)^2); the mean over eigenvalues is what a network must beat
    (melodyflow.md 11.4).

    Raises:
      ValueError: the covariance is not symmetric.
    """
    covariance = np.asarray(covariance, np.float64)
    if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9):
        raise ValueError("a covariance must be symmetric")
    w_K = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    t = np.asarray(t, np.float64)[..., None]
    spread = t**2 * w_K + (1 - t) ** 2
    # At t = 1 the noise is unseen in every direction, also in one where the data have no variance.
    left = np.where(spread > 0, w_K / np.where(spread > 0, spread, 1.0), 1.0)
    return np.asarray(left.mean(axis=-1))
