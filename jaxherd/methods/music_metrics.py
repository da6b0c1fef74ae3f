"""What an edit or a sample is judged by: distances of features, chroma, onsets.  NumPy, on the host.

The formulas alone.  The networks that published scores put in front of them (VGGish, PaSST, CLAP)
are downloaded at run time and no part of jaxherd: bring their outputs, or those of another network
and say which.

Axis letters: T samples, C audio channels, K frames, N rows, F features, L classes.
Source: melodyflow.md 7.
"""

import math
from collections.abc import Sequence
from typing import Literal

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


def posterior_divergence(
    reference_NL: Float[np.ndarray, "N L"],
    made_NL: Float[np.ndarray, "M K"],
    *,
    classes: Literal["one", "many"] = "one",
    floor: float = 1e-6,
) -> float:
    """Return the mean over rows of KL(reference || made) in nats: KLD of a tagger's posteriors.

    One class of many, p over the row summing to 1:  sum_l p ln(p / q).
    Tags that each hold or not:                      the same of (p, 1 - p), summed over tags.

    Args:
      reference_NL, made_NL: posteriors of pairs: a recording, and what was made for its caption.
      classes: "one" for a softmax, "many" for a sigmoid a tag.
      floor: within logarithms probabilities are at least this.
    Raises:
      JaxherdError: shapes that differ, no row, or rows that are no probabilities.
    """
    p, q = _pairs(reference_NL, made_NL, "posteriors")
    for rows in (p, q):
        if rows.min() < 0 or rows.max() > 1 + 1e-5:
            raise JaxherdError("posteriors lie between 0 and 1: take the softmax or sigmoid first.")
        if classes == "one" and np.abs(rows.sum(axis=1) - 1).max() > 1e-3:
            raise JaxherdError(
                "rows of posteriors of one class sum to 1: normalise them, or give classes='many' "
                "for tags that each hold or not."
            )

    def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p * np.log(np.maximum(p, floor) / np.maximum(q, floor))).sum(axis=1)

    found = divergence(p, q)
    if classes == "many":
        found = found + divergence(np.maximum(1 - p, 0), np.maximum(1 - q, 0))
    return float(found.mean())


def clap_score(text_NF: Float[np.ndarray, "N F"], audio_NF: Float[np.ndarray, "M G"]) -> float:
    """Return the mean over pairs of <text, audio> / (||text|| ||audio||).

    Args:
      text_NF, audio_NF: embeddings of captions and clips by one CLAP network, pair by pair.
    Raises:
      JaxherdError: shapes that differ, no row, or an embedding that is all zero.
    """
    text, audio = _pairs(text_NF, audio_NF, "embeddings")
    sizes = np.linalg.norm(text, axis=1) * np.linalg.norm(audio, axis=1)
    if not sizes.all():
        raise JaxherdError("an embedding is all zero and has no direction: leave its pair out.")
    return float(((text * audio).sum(axis=1) / sizes).mean())


def lpaps(
    source: Sequence[Float[np.ndarray, "... _"]],
    edit: Sequence[Float[np.ndarray, "... _"]],
    weights: Sequence[Float[np.ndarray, "_"]] | None = None,
) -> float:
    """Return the layer-wise distance of two recordings' features in one network.

        sum over layers of mean over positions of sum_f w_f (a_f / ||a|| - b_f / ||b||)^2

    with norms over the features of a position; a position whose features are all zero stays zero.
    The checkpoint that published figures use is known to be flawed (melodyflow.md 7).

    Args:
      source, edit: the maps of every layer, features last.
      weights: w of every layer, as LPIPS learns them; 1 when None.
    Raises:
      JaxherdError: other numbers or shapes of layers or weights, no layer, or an empty one.
    """
    if not source or len(source) != len(edit) or len(weights or source) != len(source):
        raise JaxherdError(
            f"layers are compared one by one; got {len(source)} and {len(edit)}"
            + ("" if weights is None else f" with {len(weights)} weights")
            + "."
        )
    total = 0.0
    for layer, maps in enumerate(zip(source, edit)):
        a, b = _pairs(*maps, f"maps of layer {layer}")
        scale = np.ones(a.shape[-1]) if weights is None else np.asarray(weights[layer])
        if scale.shape != a.shape[-1:]:
            raise JaxherdError(
                f"layer {layer} has {a.shape[-1]} features and {scale.size} weights: give one each."
            )
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-10) for x in (a, b))
        total += float((np.square(a - b) @ scale).mean())
    return total


def _pairs(a: np.ndarray, b: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return both in float64, of one shape that is not empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not a.size:
        raise JaxherdError(f"{what} are compared pair by pair; got {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise JaxherdError(f"{what} must be finite numbers.")
    return a, b


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
