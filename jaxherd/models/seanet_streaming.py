"""Long recordings in pieces, in bounded memory, with the result of one pass over the whole.

A network is cut at its LSTM.  The LSTM hands its state on; the convolutions before and after it
run over windows that overlap by what they can see (from the layers' own reach), of which only the
part that no window edge has touched is kept.  The first and last window have the recording's own
edges, so padding happens there and nowhere else.

Where a chunk is at least as long as the overlap, three window shapes are compiled for each part:
first, middle, last.

Axis letters: B batch, T time, C channels.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Literal

import jax
import numpy as np

from jaxherd.layers.conv import ConvConfig, TransposedConvConfig
from jaxherd.layers.lstm import LstmConfig
from jaxherd.models.seanet import AudioAutoencoder, LayerConfig, Posterior, ResidualConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers first..last-1 of a network, which are convolutions or one LSTM.

    Attributes:
      network: "encoder" or "decoder".
      rate: output positions for one input position.
      before, after: inputs that an output block needs beyond its own, with room for reflection
        at the recording's end; multiples of the total stride.
      recurrent: the part is the LSTM.
    """

    network: Literal["encoder", "decoder"]
    first: int
    last: int
    rate: Fraction = Fraction(1)
    before: int = 0
    after: int = 0
    recurrent: bool = False


def parts(network: Literal["encoder", "decoder"], layers: tuple[LayerConfig, ...]) -> list[Part]:
    """Return the network's parts in order."""
    cuts = [i for i, layer in enumerate(layers) if isinstance(layer, LstmConfig)]
    found, start = [], 0
    for cut in cuts:
        found.append(_convolutions(network, layers, start, cut))
        found.append(Part(network, cut, cut + 1, recurrent=True))
        start = cut + 1
    found.append(_convolutions(network, layers, start, len(layers)))
    return [part for part in found if part.last > part.first]


def _convolutions(network, layers, first: int, last: int) -> Part:
    rate, before, after = _seen(layers[first:last])
    unit = rate.denominator  # windows begin where every strided convolution has a window
    round_up = lambda reach: math.ceil(reach / unit) * unit  # noqa: E731
    # Reflection at the end looks back over the right padding and what fills the last window.
    return Part(network, first, last, rate, round_up(before + after) + 2 * unit, round_up(after))


def _seen(layers: tuple[LayerConfig, ...]) -> tuple[Fraction, Fraction, Fraction]:
    """Return the layers' rate, and how far an output sees before and after it, in input positions."""
    rate, before, after = Fraction(1), Fraction(0), Fraction(0)
    for layer in layers:
        if isinstance(layer, ConvConfig | TransposedConvConfig | ResidualConfig):
            before += layer.reach[0] / rate
            after += layer.reach[1] / rate
        if isinstance(layer, ConvConfig):
            rate /= layer.stride
        elif isinstance(layer, TransposedConvConfig):
            rate *= layer.stride
    return rate, before, after


def decoder_reach(layers: tuple[LayerConfig, ...]) -> int:
    """Return how many frames to either side of its own a sample of the decoder's output sees.

    An LSTM, which sees all frames before, is not counted.
    """
    return math.ceil(max(_seen(layers)[1:]))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(model: AudioAutoencoder, network: str, first: int, last: int, x_BTC, state):
    seanet = model.encoder if network == "encoder" else model.decoder
    return seanet.run(x_BTC.astype(seanet.dtype), first, last, state)


def _stream(model: Any, part: Part, pieces: Iterable, step: int) -> Iterator[np.ndarray]:
    """Yield the part's output; `pieces` are arrays [B, any T, C] and `step` inputs go at a time."""
    if part.recurrent:
        state = None
        for x_BTC in pieces:
            if state is None:
                seanet = model.encoder if part.network == "encoder" else model.decoder
                state = seanet.layers[part.first].config.initial_state(x_BTC.shape[0])
            y_BTC, state = _run(model, part.network, part.first, part.last, x_BTC, state)
            yield np.asarray(y_BTC)
        return

    def window(held: np.ndarray, skip: int, size: int) -> np.ndarray:
        y_BTC, _ = _run(model, part.network, part.first, part.last, held, None)
        start = int(skip * part.rate)
        return np.asarray(y_BTC)[:, start : start + math.ceil(size * part.rate)]

    held: np.ndarray | None = None  # from `before` inputs before the next output on, or fewer
    done = 0  # inputs at the front of `held` whose output was yielded
    for piece in pieces:
        piece = np.asarray(piece)
        held = piece if held is None else np.concatenate([held, piece], axis=1)
        # One input more than is needed must be there, or this could be the recording's end.
        while held.shape[1] - done > step + part.after:
            yield window(held[:, : done + step + part.after], done, step)
            drop = max(0, done + step - part.before)
            held, done = held[:, drop:], done + step - drop
    if held is not None and held.shape[1] > done:
        yield window(held, done, held.shape[1] - done)


def encode_chunks(
    model: AudioAutoencoder, chunks: Iterable[np.ndarray], *, frames_per_chunk: int = 64
) -> Iterator[Posterior]:
    """Yield the posterior of a recording piece by piece: `model.encode` of the whole, without seams.

    Args:
      model: any configuration, causal or not.
      chunks: consecutive float arrays [B, any T, C] of one recording.
      frames_per_chunk: latent frames computed at a time; memory grows with it.
    Yields:
      posteriors of NumPy arrays [B, T, L]; joined in time they are that of the whole.
    """
    hop = model.config.seanet.hop
    stream: Iterable = chunks
    step = frames_per_chunk * hop
    for part in parts("encoder", model.config.encoder_layers()):
        stream = _stream(model, part, stream, step)
        step = int(step * part.rate)
    for encoded in stream:
        yield jax.tree.map(np.asarray, _posterior(model, encoded))


@jax.jit
def _posterior(model: AudioAutoencoder, encoded_BTE: jax.Array) -> Posterior:
    return model.posterior(encoded_BTE)


def decode_chunks(
    model: AudioAutoencoder, chunks: Iterable[np.ndarray], *, frames_per_chunk: int = 64
) -> Iterator[np.ndarray]:
    """Yield the float32 waveform of latents piece by piece: `model.decode` of the whole.

    Args:
      model: any configuration, causal or not.
      chunks: consecutive latents [B, any T, L] (not standardised).
      frames_per_chunk: latent frames computed at a time.
    Yields:
      waveforms [B, T, C].
    """
    stream: Iterable = chunks
    step = frames_per_chunk
    for part in parts("decoder", model.config.decoder_layers()):
        stream = _stream(model, part, stream, step)
        step = int(step * part.rate)
    for wave in stream:
        yield np.asarray(wave, np.float32)
