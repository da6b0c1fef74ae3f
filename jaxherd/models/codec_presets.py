"""Autoencoders by name, all from one dataclass."""

from jaxherd.layers.averaged_quantiser import AveragedQuantiserConfig
from jaxherd.layers.vector_quantiser import QuantiserConfig
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig


def melodyflow_codec() -> AudioAutoencoderConfig:
    """Return MelodyFlow's 48 kHz stereo codec at 25 Hz (melodyflow.md 2.1).

    Published: rate, channels, frame rate (so a total stride of 1920), 128 latents, snake, weight
    norm, no quantiser.  Not public, and chosen here: `ratios` and `n_filters`.  Audiocraft's
    defaults where nothing is stated: kernels, LSTM, padding, dilation, compress, no causality.
    """
    seanet = SeanetConfig(
        channels=2,
        dimension=128,
        n_filters=64,  # not public; audiocraft's large codecs have 64
        ratios=(8, 6, 5, 4, 2),  # not public; a product of 1920 is
    )
    return AudioAutoencoderConfig(seanet, sample_rate=48_000)


def quantised(
    config: AudioAutoencoderConfig, *, stages: int, codes: int = 1024, code_dim: int = 8
) -> AudioAutoencoderConfig:
    """Return the same networks with a residual quantiser of stages log2(codes) bits a frame."""
    quantiser = QuantiserConfig(config.seanet.dimension, stages, codes, code_dim)
    return AudioAutoencoderConfig(
        config.seanet, config.sample_rate, bottleneck="rvq", quantiser=quantiser
    )


def averaged(
    config: AudioAutoencoderConfig, *, stages: int, codes: int = 1024
) -> AudioAutoencoderConfig:
    """Return the same networks with EnCodec's residual quantiser of stages log2(codes) bits."""
    quantiser = AveragedQuantiserConfig(config.seanet.dimension, stages, codes)
    return AudioAutoencoderConfig(
        config.seanet, config.sample_rate, bottleneck="rvq", quantiser=quantiser
    )


def tiny_codec(
    *, sample_rate: int = 16_000, channels: int = 1, dimension: int = 16, n_filters: int = 8
) -> AudioAutoencoderConfig:
    """Return a codec that trains on a laptop's CPU: stride 320, one LSTM layer."""
    seanet = SeanetConfig(channels, dimension, n_filters, ratios=(8, 5, 4, 2), lstm=1)
    return AudioAutoencoderConfig(seanet, sample_rate)
