"""Real statistics under the Frechet formula; real weights that hear which notes are played."""

import re
import sys

import numpy as np
import pytest
import scipy.linalg

from jaxherd.core.errors import JaxherdError
from jaxherd.data.sources import resolve
from jaxherd.methods import music_embeddings as embeddings
from jaxherd.methods.music_metrics import frechet_distance

RATE = 22_050
# MIDI numbers; key k of the network is MIDI 21 + k.
A3, C4, E4, F4, A4, C5 = 57, 60, 64, 65, 69, 72


def played(notes, seconds=2.0, rate=RATE, gap=0.0):
    """Plucked tones with six partials, one after the other."""
    length = int(seconds * rate / len(notes))
    t = np.arange(length) / rate
    pieces = []
    for midi in notes:
        hertz = 440.0 * 2 ** ((midi - 69) / 12)
        wave = sum(np.sin(2 * np.pi * hertz * n * t) / n for n in range(1, 7))
        pieces.append(wave * np.exp(-2 * t) * (t < t[-1] - gap))
    wave = 0.2 * np.concatenate(pieces)
    return np.stack([wave, wave], axis=1).astype(np.float32)


# Statistics of the same width; the first is one that published scores were computed with.
PAIRS = {
    128: ("encodec-emb-48k", "vggish"),
    512: ("clap-laion-music", "clap-laion-audio"),
    1024: ("dac-44kHz", "clap-2023"),
}


@pytest.fixture(scope="module")
def statistics():
    """Means and covariances of embeddings of real music."""
    with np.load(resolve("pypi://fadtk==1.1.0/fadtk/stats/fma_pop.npz")) as data:
        yield lambda name: (data[f"{name}.mu"], data[f"{name}.cov"])


@pytest.mark.parametrize("size", PAIRS)
def test_frechet_of_real_statistics(statistics, size):
    (a, cov_a), (b, cov_b) = map(statistics, PAIRS[size])
    assert a.shape == (size,) and cov_b.shape == (size, size)
    scale = np.trace(cov_a)
    # The root of an almost singular covariance is good to half the digits.
    assert abs(frechet_distance(a, cov_a, a, cov_a)) < 1e-6 * scale
    shift = np.random.default_rng(0).normal(size=size) * np.sqrt(scale / size)
    moved = frechet_distance(a, cov_a, a + shift, cov_a)
    assert moved == pytest.approx(shift @ shift, rel=1e-6)
    there, back = frechet_distance(a, cov_a, b, cov_b), frechet_distance(b, cov_b, a, cov_a)
    assert there == pytest.approx(back, rel=1e-7) and there > 0
    # By the general matrix root and, as that takes long for large matrices, by the eigenvalues of
    # the product; neither knows that the covariances are symmetric.
    if size == 128:
        cross = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    else:
        cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    wanted = (a - b) @ (a - b) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert there == pytest.approx(wanted, rel=1e-5)


def test_log_mel_statistics_are_one_row_a_clip():
    clips = [played([A4]), played([C5]), played([E4])]
    rows = embeddings.embed_all(clips, RATE, embeddings.embedding("log-mel"))
    assert rows.shape == (3, 24) and np.isfinite(rows).all()
    with pytest.raises(JaxherdError, match="did you mean 'notes'"):
        embeddings.embedding("note")


def test_windows_are_what_the_network_takes():
    """The package feeds 43,844 samples at 22,050 Hz after 15 frames of silence."""
    wave = np.random.default_rng(0).normal(size=(3 * RATE, 2)).astype(np.float32)
    windows, frames = embeddings.BasicPitch.windows(wave, RATE)
    assert frames == 3 * RATE // 256 and len(windows) == 2
    assert all(w.shape == (1, 43_844, 1) and w.dtype == np.float32 for w in windows)
    first = windows[0][0, :, 0]
    assert not first[:3840].any()
    np.testing.assert_allclose(first[3840:], wave.mean(axis=1)[: 43_844 - 3840], atol=1e-6)
    # 142 frames are kept of each, so the next one begins 142 frames later.
    np.testing.assert_array_equal(windows[1][0, :256, 0], first[142 * 256 : 143 * 256])
    windows, frames = embeddings.BasicPitch.windows(wave[:100], RATE)
    assert len(windows) == 1 and frames == 1


def test_sizes_are_the_package_s_own():
    """Its constants are read from the wheel, of which no code is run."""
    package = resolve("pypi://basic-pitch==0.4.0/basic_pitch")
    files = [(package / name).read_text() for name in ("constants.py", "inference.py")]
    found = {k: int(v) for k, v in re.findall(r"^ *(\w+) = (\d+)\b", "\n".join(files), re.M)}
    assert found["AUDIO_SAMPLE_RATE"] == embeddings.RATE and found["FFT_HOP"] == embeddings.HOP
    window = found["AUDIO_SAMPLE_RATE"] * found["AUDIO_WINDOW_LENGTH"] - found["FFT_HOP"]
    assert window == embeddings.WINDOW
    assert found["n_overlapping_frames"] == 2 * embeddings.MARGIN


def test_without_onnxruntime_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    embeddings._session.cache_clear()
    with pytest.raises(JaxherdError, match=r"'jaxherd\[music-metrics\]'"):
        embeddings.BasicPitch()(played([A4]), RATE)


class TestBasicPitch:
    @pytest.fixture(autouse=True)
    def runtime(self):
        pytest.importorskip("onnxruntime")

    def test_it_hears_the_keys_that_are_played(self):
        notes = [A3, C4, F4, A4, C5]
        found = embeddings.BasicPitch()(played(notes, 5.0), RATE)
        assert found.shape == (5 * RATE // 256, 88) and 0 <= found.min() <= found.max() <= 1
        # The frame in the middle of each second, in windows that are joined without seams.
        middles = found[((np.arange(5) + 0.5) * RATE / 256).astype(int)]
        assert (middles.argmax(axis=1) + 21).tolist() == notes
        contours = embeddings.BasicPitch("contour")(played(notes, 5.0), RATE)
        assert contours.shape == (len(found), 264)
        onsets = embeddings.BasicPitch("onset")(played(notes, 5.0, gap=0.1), RATE).max(axis=1)
        begins = (np.arange(1, 5) * RATE / 256).astype(int)
        near = np.concatenate([onsets[b - 3 : b + 4] for b in begins])
        away = np.concatenate([onsets[b + 20 : b + 60] for b in begins])
        assert near.max() > 0.5 > away.max()

    def test_other_rates_and_channels_are_heard_alike(self):
        one = embeddings.BasicPitch()(played([A4], 1.0)[:, :1], RATE)
        two = embeddings.BasicPitch()(played([A4], 1.0, rate=48_000), 48_000)
        assert one.shape == two.shape and np.abs(one - two).max() < 0.1

    def test_notes_kept(self):
        tune, other = played([A3, C4, E4, A4]), played([F4, C5, F4, C5])
        hiss = 0.02 * np.random.default_rng(0).normal(size=tune.shape).astype(np.float32)
        for measure, least in (
            (embeddings.note_correlation, 0.7),
            (embeddings.note_f_measure, 0.7),
        ):
            assert measure(tune, tune, sample_rate=RATE) == pytest.approx(1.0)
            assert measure(tune, tune + hiss, sample_rate=RATE) > least
            assert measure(tune, other, sample_rate=RATE) < 0.2
        silence = np.zeros_like(tune)
        assert embeddings.note_f_measure(silence, silence, sample_rate=RATE) == 1.0
        assert embeddings.note_f_measure(tune, silence, sample_rate=RATE) == 0.0
        with pytest.raises(JaxherdError, match="cut one of them"):
            embeddings.note_f_measure(tune, tune[:-1], sample_rate=RATE)

    @pytest.mark.parametrize("name", [n for n in embeddings.EMBEDDINGS if n != "tagger"])
    def test_frechet_tells_music_from_noise(self, name):
        chance = np.random.default_rng(1)
        scale = [A3, C4, E4, A4, C5]

        def tunes():
            return [played(chance.choice(scale, 4)) for _ in range(8)]

        noise = [0.2 * chance.normal(size=(2 * RATE, 2)).astype(np.float32) for _ in range(8)]
        embed = embeddings.embedding(name)
        reference = tunes()
        like = embeddings.frechet_of_clips(reference, tunes(), RATE, embed)
        unlike = embeddings.frechet_of_clips(reference, noise, RATE, embed)
        assert 3 * like < unlike

    def test_what_cannot_be_is_told(self, tmp_path):
        with pytest.raises(JaxherdError, match="finite numbers"):
            embeddings.BasicPitch()(np.full((100, 2), np.nan, np.float32), RATE)
        with pytest.raises(JaxherdError, match="some samples"):
            embeddings.BasicPitch()(np.zeros((0, 2), np.float32), RATE)
        broken = tmp_path / "a.onnx"
        broken.write_bytes(b"no network")
        with pytest.raises(JaxherdError, match="no network that can be opened"):
            embeddings.BasicPitch(source=str(broken))(played([A4]), RATE)
