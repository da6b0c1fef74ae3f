"""Audio files in and out, and what is refused."""

import tracemalloc

import numpy as np
import pytest
import soundfile

from jaxherd.core.errors import JaxherdError
from jaxherd.data.audio import files
from jaxherd.data.audio.files import (
    AudioInfo,
    audio_blocks,
    audio_info,
    read_audio,
    resample,
    with_channels,
    write_audio,
)


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


def test_a_file_whose_channels_do_not_fit_is_named(tmp_path):
    path = write_audio(tmp_path / "six.wav", tone(channels=6), 8000)
    for read in (read_audio, lambda *a, **k: next(audio_blocks(*a, **k))):
        with pytest.raises(JaxherdError, match=r"six.wav': 6 channels cannot be made 2"):
            read(path, channels=2)
    assert read_audio(path, channels=1)[0].shape[1] == 1


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


def write_long(path, seconds, rate, hertz=50.0):
    """A tone with a beat in every second, written piece by piece."""
    t = np.arange(rate * 60) / rate
    minute = (0.5 * np.sin(2 * np.pi * hertz * t) * (t % 1 < 0.5)).astype(np.float32)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for start in range(0, seconds, 60):
            file.write(minute[: rate * (seconds - start)])
    return path


@pytest.mark.parametrize("rate, new_rate", [(4410, 4800), (4800, 2205), (4000, 4000), (4000, 1000)])
@pytest.mark.parametrize("block_seconds", [0.11, 0.5, 30.0])
def test_blocks_join_without_seams(tmp_path, rate, new_rate, block_seconds):
    wave = np.random.default_rng(0).normal(size=(int(rate * 1.7) + 3, 2)).astype(np.float32) / 8
    path = write_audio(tmp_path / "a.flac", wave, rate)
    own, _ = read_audio(path)
    wanted = own if rate == new_rate else resample(own, rate, new_rate)
    blocks = list(audio_blocks(path, sample_rate=new_rate, block_seconds=block_seconds))
    assert len(blocks) == 1 if block_seconds == 30.0 else len(blocks) > 2
    np.testing.assert_allclose(np.concatenate(blocks), wanted, atol=1e-6)
    mono = np.concatenate(list(audio_blocks(path, channels=1, block_seconds=block_seconds)))
    np.testing.assert_allclose(mono[:, 0], own.mean(axis=1), atol=1e-7)


def test_three_hours_are_read_in_bounded_memory(tmp_path):
    hours = 3 * 3600
    path = write_long(tmp_path / "long.flac", hours, 1000)
    info = audio_info(path)
    assert (info.seconds, info.channels, info.sample_rate) == (hours, 1, 1000)
    next(audio_blocks(path, sample_rate=1500))  # imports what it needs
    tracemalloc.start()
    try:
        length = level = 0.0
        for block in audio_blocks(path, sample_rate=1500, channels=2):
            length, level = length + len(block), level + float(np.square(block).sum())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert length == hours * 1500
    # Half of each second is a sine of amplitude 1/2, in two channels.
    assert level / length == pytest.approx(2 * 0.5 * 0.125, rel=0.02)
    assert peak < length * 2 * 4 / 20, "less than a twentieth of the whole wave"
    with pytest.raises(JaxherdError, match="10800 s long, more than the 600 s"):
        read_audio(path, max_seconds=600)


def test_a_file_that_is_cut_off_is_told(tmp_path):
    wave = np.random.default_rng(0).normal(size=(80_000, 1)).astype(np.float32) / 8
    for suffix, told in (
        (".ogg", "is cut off after|cannot be decoded"),
        (".flac", "cannot be decoded|ends after"),
    ):
        whole = write_audio(tmp_path / f"a{suffix}", wave, 8000)
        assert len(read_audio(whole)[0]) == 80_000
        for share in (0.5, 0.9, 0.999):
            part = tmp_path / f"part{suffix}"
            part.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
            with pytest.raises(JaxherdError, match=told):
                read_audio(part)


def test_positions_of_a_whole_ogg_may_run_ahead(tmp_path):
    """A recording that players play to its end: its pages count a little more than they hold."""
    wave = np.random.default_rng(0).normal(size=(80_000, 1)).astype(np.float32) / 8
    for suffix, ahead in ((".ogg", 0.13), (".flac", 0.05)):
        path = write_audio(tmp_path / f"a{suffix}", wave, 8000)
        claim = AudioInfo(8000, 80_000 + int(ahead * 8000), 1)
        assert sum(len(piece) for piece, _ in files._decoded(path, claim, 4096)) == 80_000
    for suffix, ahead in ((".ogg", 1.1), (".flac", 0.13)):
        claim = AudioInfo(8000, 80_000 + int(ahead * 8000), 1)
        with pytest.raises(JaxherdError, match="ends after 10.0 s"):
            list(files._decoded(tmp_path / f"a{suffix}", claim, 4096))


def test_an_mp3_that_is_cut_off_is_told(tmp_path):
    whole, part = tmp_path / "a.mp3", tmp_path / "part.mp3"
    soundfile.write(whole, tone(16_000, 5.0), 16_000)
    assert len(read_audio(whole)[0]) == 80_000
    part.write_bytes(whole.read_bytes()[: int(0.9 * whole.stat().st_size)])
    with pytest.raises(JaxherdError, match=r"ends after 4\.\d s of the 5\.0 s"):
        read_audio(part)


def test_silence_is_sound(tmp_path):
    path = write_audio(tmp_path / "a.wav", np.zeros((800, 2), np.float32), 8000)
    found, _ = read_audio(path, sample_rate=4000)
    assert found.shape == (400, 2) and not found.any()


def wav_bytes(tmp_path, *, kind="WAV", subtype="PCM_16") -> bytes:
    path = tmp_path / "whole.wav"
    soundfile.write(path, tone(8000, 1.0), 8000, format=kind, subtype=subtype)
    return path.read_bytes()


def with_length(data: bytes, length: int) -> bytes:
    """The file with another length in the header of its samples."""
    at = data.index(b"data") + 4
    return data[:at] + length.to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("WAV", "IMA_ADPCM")],
)  # fmt: skip
def test_a_wav_that_is_cut_off_is_told(tmp_path, kind, subtype):
    """libsndfile would take the file's size for the header's."""
    data = wav_bytes(tmp_path, kind=kind, subtype=subtype)
    whole = audio_info(tmp_path / "whole.wav")
    assert not whole.streamed and len(read_audio(tmp_path / "whole.wav")[0]) == whole.frames
    part = tmp_path / "part.wav"
    for share in (0.4, 0.9, 0.999):
        part.write_bytes(data[: int(share * len(data))])
        told = r"part.wav' is cut off after \d\.\d+ s of the (1\.0\d|0\.99) s that its header"
        with pytest.raises(JaxherdError, match=told):
            read_audio(part)


def test_what_follows_the_samples_of_a_wav_may_be_cut(tmp_path):
    """And one byte is filled up: neither is sound."""
    data = wav_bytes(tmp_path)
    path = tmp_path / "more.wav"
    path.write_bytes(data + b"LIST" + (100).to_bytes(4, "little") + b"INFO")
    assert len(read_audio(path)[0]) == 8000


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000, 0x80000000])
def test_a_recorded_stream_is_read_to_its_end(tmp_path, length):
    """Programs that write into a pipe leave a length that stands for "unknown"."""
    path = tmp_path / "stream.wav"
    path.write_bytes(with_length(wav_bytes(tmp_path), length))
    assert audio_info(path).streamed
    np.testing.assert_array_equal(read_audio(path)[0], read_audio(tmp_path / "whole.wav")[0])


def test_a_wav_that_was_never_finished_is_told(tmp_path):
    path = tmp_path / "open.wav"
    path.write_bytes(with_length(wav_bytes(tmp_path), 0))
    with pytest.raises(
        JaxherdError, match="says in its header that it holds no sound, though 32000"
    ):
        audio_info(path)


def test_headers_of_any_order_are_read(tmp_path):
    path = tmp_path / "big.wav"
    soundfile.write(path, tone(8000, 1.0), 8000, endian="BIG")
    assert len(read_audio(path)[0]) == 8000
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(JaxherdError, match="is cut off after 0.99 s of the 1.00 s"):
        read_audio(path)
