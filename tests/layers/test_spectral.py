"""STFT and mel against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.spectral import (
    MelConfig,
    StftConfig,
    frame,
    hz_to_mel,
    log_mel,
    mel_filterbank,
    mel_spectrogram,
    mel_to_hz,
    stereo_views,
    stft,
)


def signal(samples: int, *lead: int) -> np.ndarray:
    return np.random.RandomState(samples).normal(size=(*lead, samples)).astype(np.float32)


def by_definition(x: np.ndarray, config: StftConfig) -> np.ndarray:
    """One frame and one bin at a time, in float64."""
    size, hop = config.n_fft, config.hop
    if config.padding == "center":
        x = np.pad(x, size // 2, mode="reflect")
    elif config.padding == "same":
        wanted = -(-len(x) // hop)
        x = np.pad(x, (size - hop) // 2, mode="reflect")
        x = np.pad(x, (0, max(0, (wanted - 1) * hop + size - len(x))))
    window = np.zeros(size)
    length = config.window_size
    for n in range(length):
        window[(size - length) // 2 + n] = 0.5 * (1 - np.cos(2 * np.pi * n / length))
    if config.normalized:
        window /= np.sqrt((window**2).sum())
    rows, t = [], np.arange(size)
    for start in range(0, len(x) - size + 1, hop):
        piece = x[start : start + size].astype(np.float64) * window
        rows.append(
            [(piece * np.exp(-2j * np.pi * k * t / size)).sum() for k in range(config.bins)]
        )
    return np.asarray(rows)


@pytest.mark.parametrize(
    "config",
    [
        StftConfig(16),
        StftConfig(16, 4, padding="none"),
        StftConfig(16, 5, padding="none", normalized=True),
        StftConfig(16, 6, win_length=11),
        StftConfig(15, 7, win_length=12, padding="center"),
        StftConfig(16, 4, padding="same", normalized=True),
        StftConfig(16, 16, padding="same"),
        StftConfig(32, 24, padding="same"),
    ],
)
@pytest.mark.parametrize("samples", [48, 61])
@pytest.mark.parametrize("transform", ["fft", "matmul"])
def test_stft_is_its_definition(config, samples, transform):
    x = signal(samples, 2)
    ours = np.asarray(stft(jnp.asarray(x), config, transform=transform))
    assert ours.shape == (2, config.frames(samples), config.bins)
    for row, found in zip(x, ours):
        np.testing.assert_allclose(found, by_definition(row, config), atol=1e-5)


def test_both_transforms_have_one_gradient():
    x = jnp.asarray(signal(300))
    config = StftConfig(64, normalized=True)

    def loss(x, transform):
        found = stft(x, config, transform=transform)
        return jnp.square(found.real).sum() + jnp.abs(found.imag).sum()

    fft, matmul = (jax.grad(loss)(x, transform) for transform in ("fft", "matmul"))
    np.testing.assert_allclose(matmul, fft, atol=1e-4)


def test_large_transforms_agree():
    x = jnp.asarray(signal(8192))
    config = StftConfig(2048, normalized=True)
    fft, matmul = (stft(x, config, transform=t) for t in ("fft", "matmul"))
    np.testing.assert_allclose(matmul, fft, atol=2e-5)


def test_same_padding_gives_a_frame_for_every_begun_hop():
    config = StftConfig(64, 16, padding="same")
    assert [config.frames(n) for n in (160, 161, 176, 177)] == [10, 11, 11, 12]


def test_frames_by_blocks_equal_frames_by_index():
    x = jnp.asarray(signal(50, 3))
    blocks = frame(x, 12, 4)
    np.testing.assert_array_equal(blocks, x[:, np.arange(10)[:, None] * 4 + np.arange(12)])


def test_a_short_signal_is_told_what_to_do():
    with pytest.raises(JaxherdError, match="longer signal or a smaller n_fft"):
        stft(jnp.zeros(31), StftConfig(64))
    with pytest.raises(JaxherdError, match="n_fft=64"):
        stft(jnp.zeros(63), StftConfig(64, padding="none"))
    with pytest.raises(ValueError, match="win_length"):
        StftConfig(16, win_length=17)


def test_mel_scales_invert_and_meet_known_values():
    hz = np.array([0.0, 100.0, 999.0, 1000.0, 3000.0, 8000.0])
    for scale in ("htk", "slaney"):
        np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz, scale), scale), hz, atol=1e-6)
    np.testing.assert_allclose(hz_to_mel(1000.0, "htk"), 999.9855, atol=1e-3)
    np.testing.assert_allclose(hz_to_mel(np.array([600.0, 1000.0, 6400.0]), "slaney"), [9, 15, 42])


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_filters_are_triangles_between_even_mels(scale):
    filters = mel_filterbank(6, 512, 8000, f_min=200.0, f_max=3500.0, scale=scale)
    assert filters.shape == (257, 6) and filters.dtype == np.float32
    hz = np.arange(257) * 8000.0 / 512
    edges = mel_to_hz(np.linspace(hz_to_mel(200.0, scale), hz_to_mel(3500.0, scale), 8), scale)
    for m in range(6):
        triangle = np.interp(hz, edges[m : m + 3], [0.0, 1.0, 0.0])
        np.testing.assert_allclose(filters[:, m], triangle, atol=1e-5)
    # Between the first and last peak the triangles add up to one.
    inside = (hz >= edges[1]) & (hz <= edges[-2])
    np.testing.assert_allclose(filters[inside].sum(axis=1), 1.0, atol=1e-5)
    area = mel_filterbank(6, 512, 8000, f_min=200.0, f_max=3500.0, scale=scale, norm="slaney")
    np.testing.assert_allclose(area.sum(axis=0) * 8000.0 / 512, 1.0, rtol=0.02)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("log, mode", [("none", "add"), ("log10", "add"), ("ln", "clip")])
def test_log_mel_is_its_definition(power, log, mode):
    config = MelConfig(
        8000, StftConfig(64, 16), n_mels=5, f_min=50.0, power=power, log=log, floor_mode=mode
    )
    x = signal(200)
    mel = (np.abs(by_definition(x, config.stft)) ** power) @ config.filters()
    raised = mel + 1e-5 if mode == "add" else np.maximum(mel, 1e-5)
    wanted = {"none": mel, "log10": np.log10(raised), "ln": np.log(raised)}[log]
    np.testing.assert_allclose(log_mel(jnp.asarray(x), config), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_silence_are_finite():
    for power in (1.0, 2.0):
        config = MelConfig(8000, StftConfig(64, 16), n_mels=5, power=power)
        grad = jax.grad(lambda x, c=config: log_mel(x, c).sum())(jnp.zeros(128))
        assert np.isfinite(grad).all()
        assert np.isfinite(mel_spectrogram(jnp.zeros(128), config)).all()


def test_stereo_is_seen_as_left_right_mid_and_side():
    wave = jnp.asarray(signal(8, 1)).reshape(1, 4, 2)
    left, right = wave[0, :, 0], wave[0, :, 1]
    np.testing.assert_allclose(
        stereo_views(wave)[0], [left, right, (left + right) / 2, (left - right) / 2], atol=1e-6
    )
    assert stereo_views(wave[..., :1]).shape == (1, 1, 4)
    np.testing.assert_array_equal(stereo_views(wave, "separate")[0], [left, right])
