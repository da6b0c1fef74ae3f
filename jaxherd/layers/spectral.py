"""Short-time Fourier transforms and mel spectrograms; sizes in samples, rates in Hz.

Axis letters: T samples, F frames, N bins of the transform (n_fft // 2 + 1), M mel bands.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxherd.core.errors import JaxherdError
from jaxherd.core.platform import platform


@dataclasses.dataclass(frozen=True)
class StftConfig:
    """A short-time Fourier transform with a periodic Hann window.

    Attributes:
      n_fft: samples of a frame.
      hop_length: samples from frame to frame; n_fft // 4 when None.
      win_length: samples of the window, in the middle of the frame; n_fft when None.
      padding: "none" takes whole frames only; "center" reflects n_fft // 2 samples on both sides,
        so that frame i is centred on sample i hop; "same" reflects (n_fft - hop) // 2 and fills the
        last frame with zeros, which gives ceil(T / hop) frames (audiocraft's mel losses).
      normalized: divide by the window's root sum of squares.
    """

    n_fft: int
    hop_length: int | None = None
    win_length: int | None = None
    padding: Literal["none", "center", "same"] = "center"
    normalized: bool = False

    def __post_init__(self):
        if not 0 < self.window_size <= self.n_fft or self.hop < 1:
            raise ValueError(
                f"n_fft={self.n_fft} needs 0 < win_length <= n_fft and hop_length >= 1, got "
                f"{self.window_size} and {self.hop}"
            )

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return self.n_fft // 4 if self.hop_length is None else self.hop_length

    @property
    def window_size(self) -> int:
        """Samples of the window."""
        return self.n_fft if self.win_length is None else self.win_length

    @property
    def bins(self) -> int:
        """Frequencies from zero to half the sample rate."""
        return self.n_fft // 2 + 1

    def frames(self, samples: int) -> int:
        """Return the number of frames of a signal."""
        left, right = self._pads(samples)
        return max(0, (samples + left + right - self.n_fft) // self.hop + 1)

    def window(self) -> np.ndarray:
        """Return the window within its frame, float32 [n_fft]."""
        size = self.window_size
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        if self.normalized:
            window = window / np.sqrt(np.sum(window**2))
        left = (self.n_fft - size) // 2
        return np.pad(window, (left, self.n_fft - size - left)).astype(np.float32)

    def _pads(self, samples: int) -> tuple[int, int]:
        if self.padding == "none":
            return 0, 0
        if self.padding == "center":
            return self.n_fft // 2, self.n_fft // 2
        side = (self.n_fft - self.hop) // 2
        windows = -(-(samples + 2 * side - self.n_fft) // self.hop)
        return side, side + max(0, windows) * self.hop + self.n_fft - samples - 2 * side


Transform = Literal["fft", "matmul"]


def stft(
    x: Float[Array, "*batch T"], config: StftConfig, *, transform: Transform | None = None
) -> Complex[Array, "*batch F N"]:
    """Return sum_t w[t] x[t + i hop] exp(-2 pi i k t / n_fft) for frames i and bins k; float32.

    Args:
      transform: "fft", or "matmul" with the transform's matrix; None takes "matmul" on TPU, whose
        compiler unrolls every FFT into a program of its own (20 to 40 s and 10 to 17 MiB each).
    Raises:
      JaxherdError: the signal is too short to be padded by reflection, or has no whole frame.
    """
    c, samples = config, x.shape[-1]
    x = x.astype(jnp.float32)
    left, right = c._pads(samples)
    reflected = min(left, right) if c.padding == "same" else right
    if max(left, reflected) >= samples or c.frames(samples) < 1:
        raise JaxherdError(
            f"{samples} samples are too few for a transform of n_fft={c.n_fft} with padding "
            f"{c.padding!r}: give a longer signal or a smaller n_fft."
        )
    lead = ((0, 0),) * (x.ndim - 1)
    if left:
        x = jnp.pad(x, (*lead, (left, reflected)), mode="reflect")
    x = jnp.pad(x, (*lead, (0, right - reflected)))
    frames = frame(x, c.n_fft, c.hop) * c.window()
    transform = transform or ("matmul" if platform() == "tpu" else "fft")
    return _dft(frames) if transform == "matmul" else jnp.fft.rfft(frames, axis=-1)


def _dft(frames: Float[Array, "*batch F n"]) -> Complex[Array, "*batch F N"]:
    """Return `rfft` of the last axis as one real matmul, in full float32."""
    n = frames.shape[-1]
    bins = n // 2 + 1
    # Made on the device: a table of 2048 samples would be 17 MB of constants in the program.
    turns = jnp.arange(n)[:, None] * jnp.arange(bins)[None, :] % n
    angle = turns.astype(jnp.float32) * (-2.0 * np.pi / n)
    table = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
    parts = jnp.matmul(frames, table, precision="highest")
    return jax.lax.complex(parts[..., :bins], parts[..., bins:])


def frame(x: Float[Array, "*batch T"], size: int, hop: int) -> Float[Array, "*batch F size"]:
    """Return all whole frames of `size` samples, `hop` apart.

    Where the hop divides the size, frames are put together from shifted blocks: their gradient
    is then a sum of slices and no scatter.
    """
    count = (x.shape[-1] - size) // hop + 1
    if size % hop:
        return x[..., np.arange(count)[:, None] * hop + np.arange(size)]
    parts = size // hop
    x = x[..., : (count + parts - 1) * hop]
    blocks = x.reshape(*x.shape[:-1], count + parts - 1, hop)
    return jnp.concatenate([blocks[..., i : i + count, :] for i in range(parts)], axis=-1)


MelScale = Literal["htk", "slaney"]


def hz_to_mel(hz: np.ndarray | float, scale: MelScale) -> np.ndarray:
    """Return mels: 2595 log10(1 + f / 700), or Slaney's (linear below 1 kHz, then logarithmic)."""
    hz = np.asarray(hz, np.float64)
    if scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + hz / 700.0))
    above = 15.0 + np.log(np.maximum(hz, 1e-9) / 1000.0) / (np.log(6.4) / 27.0)
    return np.where(hz < 1000.0, hz * 3.0 / 200.0, above)


def mel_to_hz(mel: np.ndarray | float, scale: MelScale) -> np.ndarray:
    """Invert `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    if scale == "htk":
        return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))
    above = 1000.0 * np.exp((mel - 15.0) * (np.log(6.4) / 27.0))
    return np.where(mel < 15.0, mel * 200.0 / 3.0, above)


@functools.lru_cache(maxsize=64)
def mel_filterbank(
    n_mels: int,
    n_fft: int,
    sample_rate: int,
    *,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: MelScale = "htk",
    norm: Literal["none", "slaney"] = "none",
) -> np.ndarray:
    """Return triangular filters [n_fft // 2 + 1, n_mels], float32.

    Filter m rises from edge m to edge m + 1 and falls to edge m + 2; the edges are even in mels
    between f_min and f_max (half the sample rate when None).  Norm "slaney" gives each filter an
    area of one per Hz.
    """
    top = sample_rate / 2.0 if f_max is None else f_max
    edges = np.linspace(hz_to_mel(f_min, scale), hz_to_mel(top, scale), n_mels + 2)
    edges = mel_to_hz(edges, scale)
    hz = np.linspace(0.0, sample_rate / 2.0, n_fft // 2 + 1)[:, None]
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters = filters * (2.0 / (edges[2:] - edges[:-2]))
    return filters.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """A mel spectrogram.

    Attributes:
      sample_rate: Hz.
      stft: the transform below.
      n_mels, f_min, f_max, scale, norm: see `mel_filterbank`.
      power: 2 sums energies and 1 magnitudes.
      log: "none", "log10" or "ln" of the bands.
      floor: keeps the logarithm finite; "add" log(x + floor), "clip" log(max(x, floor)).
    """

    sample_rate: int
    stft: StftConfig
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float | None = None
    scale: MelScale = "htk"
    norm: Literal["none", "slaney"] = "none"
    power: float = 2.0
    log: Literal["none", "log10", "ln"] = "ln"
    floor: float = 1e-5
    floor_mode: Literal["add", "clip"] = "add"

    def filters(self) -> np.ndarray:
        """Return the filterbank [N, M]."""
        return mel_filterbank(
            self.n_mels,
            self.stft.n_fft,
            self.sample_rate,
            f_min=self.f_min,
            f_max=self.f_max,
            scale=self.scale,
            norm=self.norm,
        )

    def log_of(self, mel: jax.Array) -> jax.Array:
        """Return the logarithm of band energies, or the energies themselves for log="none"."""
        if self.log == "none":
            return mel
        raised = mel + self.floor if self.floor_mode == "add" else jnp.maximum(mel, self.floor)
        return jnp.log10(raised) if self.log == "log10" else jnp.log(raised)


def mel_spectrogram(x: Float[Array, "*batch T"], config: MelConfig) -> Float[Array, "*batch F M"]:
    """Return band energies (before any logarithm) of every frame."""
    spectrum = stft(x, config.stft)
    energy = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    if config.power != 2.0:
        # The tiny summand keeps the gradient finite where a bin is silent.
        energy = (energy + 1e-20) ** (config.power / 2.0)
    return jnp.matmul(energy, config.filters(), precision="highest")


def log_mel(x: Float[Array, "*batch T"], config: MelConfig) -> Float[Array, "*batch F M"]:
    """Return the mel spectrogram with the config's logarithm."""
    return config.log_of(mel_spectrogram(x, config))


Stereo = Literal["mid_side", "separate"]


def stereo_views(
    wave_BTC: Float[Array, "B T C"], stereo: Stereo = "mid_side"
) -> Float[Array, "B V T"]:
    """Return the signals that spectral losses look at: each channel, and of stereo L, R, mid, side.

    mid = (L + R) / 2 and side = (L - R) / 2; `stereo="separate"` leaves them out.  That
    MelodyFlow's codec looks at them is a guess after Stable Audio (melodyflow.md 2.2), as is their
    scale.
    """
    channels = jnp.swapaxes(wave_BTC, 1, 2)
    if wave_BTC.shape[2] != 2 or stereo == "separate":
        return channels
    left, right = channels[:, 0], channels[:, 1]
    return jnp.stack([left, right, (left + right) / 2, (left - right) / 2], axis=1)
