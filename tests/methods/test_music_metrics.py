"""Scores of features, chroma, onsets and the clip classifier against what they must say."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

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


def test_divergence_of_one_class_of_many():
    # By hand: 1 ln(1 / 0.5), and 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5) = 0.25 ln 2; mean of both.
    reference = np.array([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    made = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
    found = metrics.posterior_divergence(reference, made)
    assert found == pytest.approx((1 + 0.25) * math.log(2) / 2)
    # What the other never thinks of costs as much as the floor says.
    sure = np.array([[1.0, 0.0]])
    found = metrics.posterior_divergence(sure, sure[:, ::-1], floor=1e-4)
    assert found == pytest.approx(-math.log(1e-4))
    chance = np.random.default_rng(0)
    p, q = (scipy.special.softmax(2 * chance.normal(size=(9, 527)), axis=1) for _ in range(2))
    assert metrics.posterior_divergence(p, q, floor=1e-12) == pytest.approx(
        scipy.special.rel_entr(p, q).sum(axis=1).mean(), rel=1e-9
    )
    assert metrics.posterior_divergence(p, p) == 0.0
    assert metrics.posterior_divergence(p, q) != pytest.approx(metrics.posterior_divergence(q, p))


def test_divergence_of_many_tags():
    # By hand: ln 2 where the tag is sure, and 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) of the other.
    reference, made = np.array([[1.0, 0.5]]), np.array([[0.5, 0.25]])
    found = metrics.posterior_divergence(reference, made, classes="many")
    assert found == pytest.approx(math.log(2) + 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    chance = np.random.default_rng(0)
    p, q = (scipy.special.expit(2 * chance.normal(size=(9, 50))) for _ in range(2))
    wanted = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)
    found = metrics.posterior_divergence(p, q, classes="many", floor=1e-12)
    assert found == pytest.approx(wanted.sum(axis=1).mean(), rel=1e-9)


def test_clap_score_is_the_mean_cosine_of_pairs():
    # By hand: 24 / 25 for (3, 4) and (4, 3), 0 for a right angle, -1 for opposite directions.
    text = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    audio = np.array([[4.0, 3.0], [0.0, 5.0], [-7.0, 0.0]])
    assert metrics.clap_score(text, audio) == pytest.approx((0.96 + 0.0 - 1.0) / 3)
    chance = np.random.default_rng(0)
    text, audio = chance.normal(size=(2, 6, 512)).astype(np.float32)
    wanted = [1 - scipy.spatial.distance.cosine(*pair) for pair in zip(text, audio)]
    assert metrics.clap_score(text, audio) == pytest.approx(np.mean(wanted), rel=1e-5)
    assert metrics.clap_score(3 * text, audio) == pytest.approx(metrics.clap_score(text, audio))
    assert metrics.clap_score(text, text) == pytest.approx(1.0)


def test_lpaps_is_the_distance_of_directions_layer_by_layer():
    # By hand: one position of (3, 4) and (0, 2): (0.6 - 0)^2 + (0.8 - 1)^2 = 0.4; the second layer's
    # two positions are 2 (a right angle) and 0 (one direction, other sizes) apart: mean 1.
    source = [np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])]
    edit = [np.array([[0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])]
    assert metrics.lpaps(source, edit) == pytest.approx(1.4)
    weights = [np.array([1.0, 0.0]), np.array([0.5, 2.0])]
    assert metrics.lpaps(source, edit, weights) == pytest.approx(0.36 + (0.5 + 2.0) / 2)
    # Of unit vectors the squared distance is twice 1 less their cosine.
    chance = np.random.default_rng(0)
    sizes = ((7, 5, 16), (3, 2, 64))
    a, b = ([chance.normal(size=size) for size in sizes] for _ in range(2))
    wanted = 0.0
    for x, y in zip(a, b):
        pairs = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
        wanted += 2 * np.mean([scipy.spatial.distance.cosine(*pair) for pair in pairs])
    assert metrics.lpaps(a, b) == pytest.approx(wanted, rel=1e-9)
    assert metrics.lpaps(a, [5 * x for x in a]) == pytest.approx(0.0, abs=1e-12)
    silent = [np.zeros((2, 4))]
    assert metrics.lpaps(silent, [np.eye(4)[:2]]) == pytest.approx(1.0)


def test_scores_of_what_cannot_be_compared_are_told():
    half = np.full((2, 2), 0.5)
    with pytest.raises(JaxherdError, match="pair by pair"):
        metrics.posterior_divergence(half, half[:1])
    with pytest.raises(JaxherdError, match="pair by pair"):
        metrics.clap_score(half[:0], half[:0])
    with pytest.raises(JaxherdError, match="softmax or sigmoid first"):
        metrics.posterior_divergence(half, 4 * half)
    with pytest.raises(JaxherdError, match="sum to 1"):
        metrics.posterior_divergence(half, 0.8 * half)
    assert metrics.posterior_divergence(half, 0.8 * half, classes="many") > 0
    with pytest.raises(JaxherdError, match="no direction"):
        metrics.clap_score(half, 0 * half)
    with pytest.raises(JaxherdError, match="finite"):
        metrics.clap_score(half, half * np.nan)
    with pytest.raises(JaxherdError, match="one by one"):
        metrics.lpaps([half], [half, half])
    with pytest.raises(JaxherdError, match="one by one"):
        metrics.lpaps([], [])
    with pytest.raises(JaxherdError, match="maps of layer 0"):
        metrics.lpaps([half], [half[:1]])
    with pytest.raises(JaxherdError, match="2 features and 3 weights"):
        metrics.lpaps([half], [half], [np.ones(3)])


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
