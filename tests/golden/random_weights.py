"""Weights and tokens that follow from names, the same in every environment.

`numpy.random.RandomState` is frozen by numpy's compatibility policy.
"""

import zlib

import numpy as np


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return N(0, 0.3) for matrices and biases, U(0.5, 1.5) for norm scales."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if "norm" in name:
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    return random.normal(0.0, 0.3, shape).astype(np.float32)


def random_tokens(length: int, vocab_size: int, batch: int = 2) -> np.ndarray:
    return np.random.RandomState(length).randint(0, vocab_size, (batch, length))


def random_tiles(count: int, size: int, channels: int = 3) -> np.ndarray:
    """Return tiles [N, Y, X, C] in [-1, 1]."""
    random = np.random.RandomState(1000 * size + count)
    return random.uniform(-1, 1, (count, size, size, channels)).astype(np.float32)


def random_picture(height: int, width: int) -> np.ndarray:
    """Return a picture [Y, X, 3] of bytes: waves with noise over them."""
    random = np.random.RandomState(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + y / (5 - c)) for c in range(3)]
    picture = 128 + 80 * np.stack(waves, axis=-1) + 20 * random.normal(size=(height, width, 3))
    return picture.clip(0, 255).astype(np.uint8)


def placeholder_tokens(
    images: list[list[int]], features: int, length: int, vocab_size: int
) -> np.ndarray:
    """Return rows [B, T] of text with, for each image of so many tiles, placeholders (V - 1)."""
    random = np.random.RandomState(length)
    text = random.randint(0, vocab_size - 1, (len(images), length))
    for row, counts in zip(text, images):
        at = 2
        for tiles in counts:
            for _ in range(tiles):
                row[at : at + features] = vocab_size - 1
                at += features + 1
            at += 1
        assert at <= length
    return text


def codec_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return U(0.3, 0.9) for weight-norm gains, U(0.5, 1.5) for snake's, else `random_tensor`.

    Larger gains make a deep snake network chaotic: float32 then decides what comes out.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(("original0", "weight_g")):
        return random.uniform(0.3, 0.9, shape).astype(np.float32)
    if name.endswith("alpha"):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    return random_tensor(name, shape)


def random_wave(batch: int, length: int, channels: int) -> np.ndarray:
    return (
        np.random.RandomState(length).uniform(-1, 1, (batch, length, channels)).astype(np.float32)
    )


def wave_pair(batch: int, length: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an output and a target [B, T, C] that have something in common, channels included."""
    waves = random_wave(3 * batch, length, channels)
    common, own, target = waves[:batch], waves[batch : 2 * batch], waves[2 * batch :]
    target = 0.7 * target + 0.3 * common[..., :1]
    return 0.6 * target + 0.4 * own, target


def plucked(seconds: float = 7.0, rate: int = 16_000) -> np.ndarray:
    """Return plucked tones with a beat of noise, quiet, [T, 2] float32; the channels differ."""
    random = np.random.RandomState(7)
    t = np.arange(int(seconds * rate)) / rate
    beat, note = t % 0.5, np.array([57, 64, 69, 60])[(t / 0.5).astype(int) % 4]
    hertz = 440.0 * 2 ** ((note - 69) / 12)
    tone = sum(np.sin(2 * np.pi * hertz * n * t) / n for n in range(1, 5)) * np.exp(-4 * beat)
    noise = random.normal(size=(len(t), 2)) * np.exp(-40 * beat)[:, None]
    return (0.05 * tone[:, None] * [1.0, 0.6] + 0.02 * noise).astype(np.float32)
