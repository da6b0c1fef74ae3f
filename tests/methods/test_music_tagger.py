"""The tagger's bands against librosa's, its outputs against the package's, and what is told."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError, MissingExtraError
from jaxherd.methods import music_embeddings as embeddings
from jaxherd.methods import music_tagger as tagger

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)

WAVE = random_weights.plucked()


def test_bands_are_those_that_the_network_was_trained_on():
    """Two whole pieces of seven seconds, every sixteenth frame of them, as librosa gives them."""
    golden = np.load(GOLDEN / "mtt_musicnn.npz")["bands"]
    pieces = tagger.MusicTagger.pieces(WAVE, 16_000)
    assert pieces.shape == (2, 187, 96) and pieces.dtype == np.float32
    np.testing.assert_allclose(pieces[:, ::16], golden, atol=1e-4)
    assert np.abs(tagger.MusicTagger.pieces(1.02 * WAVE, 16_000)[:, ::16] - golden).max() > 1e-3


def test_short_recordings_are_repeated_and_loud_ones_stay_finite():
    second = WAVE[:16_000]
    pieces = tagger.MusicTagger.pieces(second, 16_000)
    assert pieces.shape == (1, 187, 96)
    np.testing.assert_array_equal(pieces[0, 63:126], pieces[0, :63])
    # The package's float16 is infinite here.
    loud = second / np.abs(second).max()
    assert 5 < tagger.MusicTagger.pieces(loud, 16_000).max() < 8
    two = tagger.MusicTagger.pieces(np.repeat(WAVE, 2, axis=0), 32_000)
    assert two.shape == (2, 187, 96)


def test_an_absent_tensorflow_is_told(monkeypatch):
    tagger._network.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match=r"jaxherd\[music-tags\]"):
        embeddings.embedding("tagger")(WAVE, 16_000)


@pytest.mark.slow
class TestNetwork:
    """With TensorFlow and the published weights."""

    @pytest.fixture(autouse=True)
    def runtime(self):
        pytest.importorskip("tensorflow")

    @pytest.mark.parametrize("name", ["MTT_musicnn", "MSD_musicnn"])
    def test_it_says_what_the_package_says(self, name):
        golden = np.load(GOLDEN / f"{name.lower()}.npz")
        source = f"pypi://musicnn==0.1.0/musicnn/{name}"
        for head, width in (("features", 200), ("tags", 50)):
            found = tagger.MusicTagger(head, source)(WAVE, 16_000)
            assert found.shape == (2, width)
            np.testing.assert_allclose(found, golden[head], atol=1e-4)

    def test_tags_tell_a_tune_from_noise(self):
        chance = np.random.RandomState(0)
        noise = (0.1 * chance.normal(size=WAVE.shape)).astype(np.float32)
        fainter = (0.8 * WAVE).astype(np.float32)
        assert tagger.tag_divergence([WAVE], [WAVE], 16_000) == 0.0
        like = tagger.tag_divergence([WAVE, noise], [fainter, noise], 16_000)
        unlike = tagger.tag_divergence([WAVE, noise], [noise, fainter], 16_000)
        assert 0 < 5 * like < unlike
        assert tagger.tag_posteriors([WAVE, noise], 16_000).shape == (2, 50)

    def test_frechet_tells_tunes_from_noise(self):
        chance = np.random.RandomState(1)
        tunes = [WAVE[start : start + 48_000] for start in range(0, 64_000, 4_000)]
        noise = [(0.1 * chance.normal(size=(48_000, 2))).astype(np.float32) for _ in range(16)]
        embed = embeddings.embedding("tagger")
        like = embeddings.frechet_of_clips(tunes[::2], tunes[1::2], 16_000, embed)
        assert 5 * like < embeddings.frechet_of_clips(tunes[::2], noise, 16_000, embed)

    def test_what_cannot_be_is_told(self, tmp_path):
        with pytest.raises(JaxherdError, match="finite numbers"):
            tagger.MusicTagger()(np.full((100, 2), np.nan, np.float32), 16_000)
        with pytest.raises(JaxherdError, match="some samples"):
            tagger.MusicTagger()(np.zeros((0, 2), np.float32), 16_000)
        with pytest.raises(JaxherdError, match="no clips"):
            tagger.tag_posteriors([], 16_000)
        with pytest.raises(JaxherdError, match="no musicnn network"):
            tagger.MusicTagger(source=str(tmp_path))(WAVE, 16_000)
        (tmp_path / ".meta").write_bytes(b"no graph")
        with pytest.raises(JaxherdError, match="no musicnn network"):
            tagger.MusicTagger(source=str(tmp_path))(WAVE, 16_000)
