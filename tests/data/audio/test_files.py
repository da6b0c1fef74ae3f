"""Audio files in and out, and what is refused."""

import numpy as np
import pytest
import soundfile

from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio.files import read_audio, resample, with_channels, write_audio


def tone(rate=8000, seconds=0.5, hertz=440.0, channels=2):
    t = np.arange(int(rate * seconds)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * t)
    return np.stack([wave * (1 - 0.3 * c) for c in range(channels)], axis=1).astype(np.float32)


@pytest.mark.parametrize("suffix, tolerance", [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.05)])
def test_round_trip(tmp_path, suffix, tolerance):
    wave = tone()
    path = write_audio(tmp_path / f"a{suffix}", wave, 8000)
    found, rate = read_audio(path)
    assert rate == 8000 and found.shape == wave.shape and found.dtype == np.float32
    assert np.abs(found - wave).max() < tolerance
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_loud_samples_are_clipped(tmp_path):
    found, _ = read_audio(write_audio(tmp_path / "a.wav", tone() * 4, 8000))
    assert 0.99 < np.abs(found).max() <= 1.0


def test_resampling_keeps_the_tone():
    wave = tone(rate=44100, seconds=1.0, hertz=1000.0)
    found = resample(wave, 44100, 48000)
    assert len(found) == 48000
    spectrum = np.abs(np.fft.rfft(found[:, 0] * np.hanning(48000)))
    assert spectrum.argmax() == 1000
    np.testing.assert_allclose(np.square(found).mean(), np.square(wave).mean(), rtol=1e-2)


def test_channels():
    wave = tone(channels=2)
    np.testing.assert_allclose(with_channels(wave, 1)[:, 0], wave.mean(axis=1))
    np.testing.assert_array_equal(with_channels(wave[:, :1], 2)[:, 1], wave[:, 0])
    with pytest.raises(JaxherdError, match="2 channels cannot be made 3"):
        with_channels(wave, 3)


def test_bad_files_are_told_in_one_sentence(tmp_path):
    with pytest.raises(JaxherdError, match="There is no audio file"):
        read_audio(tmp_path / "none.wav")
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"RIFF" + bytes(range(256)) * 4)
    with pytest.raises(JaxherdError, match="cannot be decoded as audio"):
        read_audio(noise)
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros((0, 1), np.float32), 8000)
    with pytest.raises(JaxherdError, match="holds no sound"):
        read_audio(empty)
    wrong = tmp_path / "nan.wav"
    soundfile.write(wrong, np.full((80, 1), np.nan, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(JaxherdError, match="no numbers"):
        read_audio(wrong)
    long = write_audio(tmp_path / "long.wav", tone(seconds=2.0), 8000)
    with pytest.raises(JaxherdError, match="2 s long, more than the 1 s"):
        read_audio(long, max_seconds=1)


def test_bad_outputs_are_told_before_anything_is_written(tmp_path):
    with pytest.raises(JaxherdError, match="the suffix says the format"):
        write_audio(tmp_path / "a.mp3", tone(), 8000)
    with pytest.raises(JaxherdError, match="does not exist or cannot be written"):
        write_audio(tmp_path / "no" / "a.wav", tone(), 8000)
    assert not list(tmp_path.iterdir())
