"""What an edit or a sample is judged by: Frechet distance, chroma, onsets.  NumPy, on the host.

Axis letters: T samples, C audio channels, K frames, N rows, F features.  Source: melodyflow.md 7.
"""

import math

import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError

_WINDOW, _HOP = 4096, 1024


def frechet_distance(
    mean_a_F: Float[np.ndarray, "F"],
    covariance_a_FF: Float[np.ndarray, "F F"],
    mean_b_F: Float[np.ndarray, "F"],
    covariance_b_FF: Float[np.ndarray, "F F"],
) -> float:
    """Return ||mu_a - mu_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    The root's trace is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), which is symmetric: eigenvalues
    instead of a general matrix root, so that singular covariances give no complex numbers.
    """
    a, b = (np.asarray(s, np.float64) for s in (covariance_a_FF, covariance_b_FF))
    gap = np.asarray(mean_a_F, np.float64) - np.asarray(mean_b_F, np.float64)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b @ root)
    cross = np.sqrt(np.maximum(inner, 0)).sum()
    return float(gap @ gap + np.trace(a) + np.trace(b) - 2 * cross)


def frechet_of(a_NF: Float[np.ndarray, "N F"], b_NF: Float[np.ndarray, "M F"]) -> float:
    """Return the Frechet distance of two sets of features.

    Raises:
      JaxherdError: fewer than two rows.
    """
    if min(len(a_NF), len(b_NF)) < 2:
        raise JaxherdError("a Frechet distance needs at least two rows on each side.")
    a, b = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    covariances = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    first, second = covariances
    return frechet_distance(a.mean(axis=0), first, b.mean(axis=0), second)


def log_mel_embedding(
    wave_TC: Float[np.ndarray, "T C"], sample_rate: int, bands: int = 40
) -> Float[np.ndarray, "F"]:
    """Return mean and standard deviation over time of log energies in bands, without any network."""
    power_KB, edges = _power(wave_TC, sample_rate)
    limits = np.geomspace(50.0, sample_rate / 2, bands + 1)
    sums = [power_KB[:, (edges >= lo) & (edges < hi)].sum(axis=1)
            for lo, hi in zip(limits[:-1], limits[1:])]  # fmt: skip
    log_KF = np.log10(np.stack(sums, axis=1) + 1e-6)
    return np.concatenate([log_KF.mean(axis=0), log_KF.std(axis=0)])


def chroma(wave_TC: Float[np.ndarray, "T C"], sample_rate: int) -> Float[np.ndarray, "K 12"]:
    """Return the share of amplitude of each pitch class (C first) in every frame.

    Notes from A2 (110 Hz) to 4 kHz, in windows of at least 0.34 s: a semitone at 110 Hz is 6.5 Hz
    wide, and two lines closer than a bin cannot be told apart.  Amplitude and not energy, so that
    the bass is not all that counts.
    """
    window = 1 << math.ceil(math.log2(0.34 * sample_rate))
    power_KB, hertz = _power(wave_TC, sample_rate, window=window, hop=window // 8)
    heard = (hertz >= 110.0 * 2 ** (-1 / 24)) & (hertz <= 4000.0)
    pitch = np.round(69 + 12 * np.log2(hertz[heard] / 440.0)).astype(int) % 12
    sums = np.zeros((len(power_KB), 12))
    np.add.at(sums.T, pitch, np.sqrt(power_KB[:, heard]).T)
    return sums / (sums.sum(axis=1, keepdims=True) + 1e-9)


def onset_strength(wave_TC: Float[np.ndarray, "T C"], sample_rate: int) -> Float[np.ndarray, "K"]:
    """Return the summed rise of log energies from frame to frame."""
    power_KB, _ = _power(wave_TC, sample_rate, window=1024, hop=256)
    rise = np.diff(np.log10(power_KB + 1e-6), axis=0)
    return np.maximum(rise, 0).mean(axis=1)


def chroma_correlation(
    a_TC: Float[np.ndarray, "T C"], b_TC: Float[np.ndarray, "T C"], *, sample_rate: int
) -> float:
    """Return the correlation of two recordings' chroma over all frames and classes."""
    return _correlation(chroma(a_TC, sample_rate), chroma(b_TC, sample_rate))


def onset_correlation(
    a_TC: Float[np.ndarray, "T C"], b_TC: Float[np.ndarray, "T C"], *, sample_rate: int
) -> float:
    """Return the correlation of two recordings' onset strengths over time."""
    return _correlation(onset_strength(a_TC, sample_rate), onset_strength(b_TC, sample_rate))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-20))


def _power(wave_TC, sample_rate: int, *, window: int = _WINDOW, hop: int = _HOP):
    """Return (power [frames, bins], Hz of the bins) of the channels' mean."""
    mono = np.asarray(wave_TC, np.float64).mean(axis=1)
    if len(mono) < window:
        mono = np.pad(mono, (0, window - len(mono)))
    frames = np.lib.stride_tricks.sliding_window_view(mono, window)[::hop]
    spectrum = np.fft.rfft(frames * np.hanning(window), axis=1)[:, 1:]
    hertz = np.fft.rfftfreq(window, 1 / sample_rate)[1:]
    return np.square(np.abs(spectrum)) / window, hertz
