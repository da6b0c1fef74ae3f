"""The pitch network against the package's own, on its real weights."""

import pathlib
import sys

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.sources import resolve
from jaxherd.methods import music_pitch
from jaxherd.methods.music_embeddings import embedding, frechet_of_clips

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from random_weights import plucked  # noqa: E402


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "crepe_tiny.npz") as data:
        return dict(data)


@pytest.mark.parametrize("head", ["features", "pitches"])
def test_frames_features_and_pitches_are_the_packages(golden, head):
    found = music_pitch.Crepe(head)(plucked(), music_pitch.RATE)
    assert len(found) == golden["count"]
    kept = golden[head]
    found = found[:: len(found) // len(kept)][: len(kept)]
    scale = np.abs(kept).max()
    np.testing.assert_allclose(found / scale, kept / scale, atol=2e-5)


def tone(hertz, rate, seconds=0.5):
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * sum(np.sin(2 * np.pi * hertz * n * t) / n for n in range(1, 6))
    return np.stack([wave, 0.5 * wave], axis=1).astype(np.float32)


@pytest.mark.parametrize("hertz", [82.4, 220.0, 523.25])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_it_hears_what_is_played(hertz, rate):
    found = music_pitch.pitch_hz(music_pitch.Crepe("pitches")(tone(hertz, rate), rate))[5:-5]
    cents = 1200 * np.log2(found / hertz)
    assert np.abs(cents).max() < 30, cents


def test_silence_and_a_single_sample_have_finite_rows():
    for wave in (np.zeros((1600, 1), np.float32), np.ones((1, 2), np.float32)):
        rows = music_pitch.Crepe()(wave, 16_000)
        assert rows.shape == (1 + len(wave) // 160, 256) and np.isfinite(rows).all()


def test_distances_tell_melodies_apart():
    low, high = ([tone(f, 16_000) for f in (f0, f0 * 1.12, f0 * 1.26)] for f0 in (110.0, 440.0))
    again = [wave * 0.7 for wave in low]
    apart, near = (frechet_of_clips(low, x, 16_000, embedding("pitch")) for x in (high, again))
    assert near < 0.01 * apart


def test_other_files_are_told(tmp_path):
    with pytest.raises(JaxherdError, match="finite numbers"):
        music_pitch.Crepe()(np.full((9, 1), np.nan, np.float32), 16_000)
    bad = tmp_path / "tiny.pth"
    bad.write_bytes(resolve(music_pitch.NETWORK).read_bytes()[:-100])
    with pytest.raises(JaxherdError, match="tiny.pth"):
        music_pitch.Crepe(source=str(bad))(tone(220.0, 16_000), 16_000)
