"""Frechet distance, chroma, onsets and the clip classifier against what they must say."""

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.methods import music_metrics as metrics
from jaxherd.methods.clip_classifier import train_classifier

RATE = 16000


def covariance(size, seed):
    root = np.random.default_rng(seed).normal(size=(size, size + 3))
    return root @ root.T / size


@pytest.mark.parametrize("size", [3, 128, 1024])
def test_frechet_at_real_sizes(size):
    a, mean = covariance(size, 0), np.zeros(size)
    assert abs(metrics.frechet_distance(mean, a, mean, a)) < 1e-7 * np.trace(a)
    shift = np.full(size, 0.5)
    assert metrics.frechet_distance(mean, a, shift, a) == pytest.approx(0.25 * size, rel=1e-6)
    # Commuting covariances: the distance is that of the roots of the eigenvalues.
    found = metrics.frechet_distance(mean, a, mean, 4 * a)
    assert found == pytest.approx(np.trace(a), rel=1e-6)
    b = covariance(size, 1)
    there, back = (metrics.frechet_distance(mean, *pair) for pair in ((a, shift, b), (b, shift, a)))
    assert there == pytest.approx(back, rel=1e-9) and there > 0.25 * size


def test_frechet_of_singular_covariances_is_real():
    flat = np.zeros((4, 4))
    flat[0, 0] = 1.0
    assert metrics.frechet_distance(np.zeros(4), flat, np.zeros(4), np.eye(4)) == pytest.approx(3.0)
    with pytest.raises(JaxherdError, match="at least two rows"):
        metrics.frechet_of(np.zeros((1, 3)), np.zeros((5, 3)))


def tone(hertz, seconds=1.0, every=None):
    t = np.arange(int(RATE * seconds)) / RATE
    wave = np.sin(2 * np.pi * hertz * t)
    if every is not None:
        wave = wave * np.exp(-8 * (t % every) / every)
    return np.stack([wave, wave], axis=1).astype(np.float32)


def test_chroma_tells_the_pitch_class_in_any_octave():
    for hertz, name in ((440.0, 9), (880.0, 9), (261.63, 0), (1046.5, 0), (392.0, 7)):
        assert (metrics.chroma(tone(hertz), RATE).argmax(axis=1) == name).all()
    for midi in range(45, 97):  # A2 to C7, every semitone
        share = metrics.chroma(tone(440.0 * 2 ** ((midi - 69) / 12)), RATE).mean(axis=0)
        assert share.argmax() == midi % 12 and share.max() > 0.4, (midi, share)
    a, octave, fifth = tone(440.0), tone(880.0), tone(659.26)
    assert metrics.chroma_correlation(a, a, sample_rate=RATE) == pytest.approx(1.0)
    assert metrics.chroma_correlation(a, octave, sample_rate=RATE) > 0.95
    assert metrics.chroma_correlation(a, fifth, sample_rate=RATE) < 0.3


def test_onsets_tell_the_rhythm_and_not_the_pitch():
    beat, other_pitch, other_beat = (
        tone(440, every=0.25),
        tone(700, every=0.25),
        tone(440, every=0.17),
    )
    same = metrics.onset_correlation(beat, other_pitch, sample_rate=RATE)
    assert same > 0.5 > metrics.onset_correlation(beat, other_beat, sample_rate=RATE) + 0.2


def test_embedding_is_near_for_like_sounds():
    chance = np.random.default_rng(0)

    def many(make):
        return np.stack([metrics.log_mel_embedding(make(), RATE) for _ in range(30)])

    def noise():
        return chance.normal(size=(RATE // 2, 1)).astype(np.float32)

    def pitched():
        return tone(float(chance.uniform(300, 500)), 0.5) + 0.05 * noise()

    a, b, c = many(pitched), many(pitched), many(noise)
    assert metrics.frechet_of(a, b) * 10 < metrics.frechet_of(a, c)


def test_classifier_tells_kinds_of_clips_apart():
    chance = np.random.default_rng(1)
    labels = np.arange(120) % 3
    clips = chance.normal(size=(120, 20, 4))
    clips[labels == 1] *= 2.0
    clips[labels == 2, :, 0] += 1.5
    judge = train_classifier(clips[:90], labels[:90])
    assert (judge.predict(clips[90:]) == labels[90:]).mean() > 0.9
    again = train_classifier(clips[:90], labels[:90])
    np.testing.assert_array_equal(judge.weights_FK, again.weights_FK)
    # Labels that mean nothing are not learned.
    lost = train_classifier(clips[:90], chance.permutation(labels[:90]))
    assert (lost.predict(clips[90:]) == labels[90:]).mean() < 0.7
