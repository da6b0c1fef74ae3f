"""Pieces of a recording give what the whole gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.models import seanet_streaming
from jaxherd.models.codec_presets import quantised
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.seanet_streaming import decode_chunks, encode_chunks

SMALL = SeanetConfig(2, 6, 4, ratios=(6, 4), lstm=1)
VARIANTS = {
    "as_published": {},
    "causal": {"causal": True, "trim_right_ratio": 0.5, "ratios": (3, 2)},
    "reflect": {"pad_mode": "reflect", "n_residual_layers": 2, "ratios": (4,)},
    "no_lstm": {"lstm": 0, "true_skip": False, "activation": "elu", "ratios": (3, 2)},
}


def model_of(name: str):
    config = AudioAutoencoderConfig(dataclasses.replace(SMALL, **VARIANTS[name]), 8000)
    return jax.jit(config.build)(jax.random.key(0))


def pieces(x: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(x, range(size, x.shape[1], size), axis=1)


def wave_of(samples: int) -> np.ndarray:
    return np.random.RandomState(samples).normal(size=(2, samples, 2)).astype(np.float32)


whole_encode = jax.jit(lambda model, wave: model.encode(wave))
whole_decode = jax.jit(lambda model, latents: model.decode(latents))


# Ends on a frame, and within one.
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("extra", [0, 5])
def test_no_seams(name, extra):
    model = model_of(name)
    samples = 31 * model.config.seanet.hop + extra
    wave = wave_of(samples)
    whole = whole_encode(model, wave)
    # Uneven pieces through windows, and (once is enough) a window longer than the recording.
    for frames_per_chunk, size in ((10, 57), (64, 10_000))[: 1 + (name == "reflect")]:
        found = list(encode_chunks(model, pieces(wave, size), frames_per_chunk=frames_per_chunk))
        for field in ("mean_BTL", "std_BTL"):
            joined = np.concatenate([getattr(p, field) for p in found], axis=1)
            np.testing.assert_allclose(joined, getattr(whole, field), atol=1e-5)
        latents = np.asarray(whole.mean_BTL)
        waves = decode_chunks(model, pieces(latents, 3), frames_per_chunk=frames_per_chunk)
        joined = np.concatenate(list(waves), axis=1)
        np.testing.assert_allclose(joined, whole_decode(model, latents), atol=1e-5)


def test_less_context_would_show(monkeypatch):
    """The margins are needed: cutting one by half leaves a seam."""
    model, wave = model_of("as_published"), wave_of(31 * 24)
    whole = whole_encode(model, wave)
    real = seanet_streaming.parts

    def poorer(network, layers):
        return [dataclasses.replace(p, after=p.after // 2, before=0) for p in real(network, layers)]

    monkeypatch.setattr(seanet_streaming, "parts", poorer)
    found = [p.mean_BTL for p in encode_chunks(model, [wave], frames_per_chunk=10)]
    assert np.abs(np.concatenate(found, axis=1) - whole.mean_BTL).max() > 1e-4


def test_windows_are_bounded_and_few_shapes_are_compiled(monkeypatch):
    model, hop = model_of("as_published"), 24
    sizes: dict = {}
    real = seanet_streaming._run

    def watched(model, network, first, last, x, state):
        sizes.setdefault((network, first), []).append(x.shape[1])
        return real(model, network, first, last, x, state)

    monkeypatch.setattr(seanet_streaming, "_run", watched)
    wave = wave_of(200 * hop + 5)
    frames = 0
    for posterior in encode_chunks(model, pieces(wave, 100), frames_per_chunk=20):
        frames += posterior.mean_BTL.shape[1]
        list(decode_chunks(model, [posterior.mean_BTL], frames_per_chunk=20))
    assert frames == 201
    first = seanet_streaming.parts("encoder", model.config.encoder_layers())[0]
    assert max(sizes["encoder", 0]) <= 20 * hop + first.before + first.after
    for part in seanet_streaming.parts("encoder", model.config.encoder_layers()):
        assert len(set(sizes["encoder", part.first])) <= 3
        assert len(sizes["encoder", part.first]) >= 10


def test_a_quantised_codec_streams_too():
    config = quantised(AudioAutoencoderConfig(SMALL, 8000), stages=2, codes=8, code_dim=2)
    model, wave = jax.jit(config.build)(jax.random.key(0)), wave_of(301)
    whole = model.quantise(whole_encode(model, wave).mean_BTL).codes_BTQ
    found = [
        model.quantise(jnp.asarray(p.mean_BTL)).codes_BTQ
        for p in encode_chunks(model, [wave], frames_per_chunk=12)
    ]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)
