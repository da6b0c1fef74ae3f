"""A music model: a codec, a velocity field in its latents, and words for what is to be played.

    generate: noise -> latents -> wave
    edit:     wave -> latents -> (partial) noise -> latents -> wave

Latents are standardised everywhere in this file: (x - mean) / (std + 1e-5) of what the codec gives.

Axis letters: B batch, T samples, C audio channels, F frames, L latent width, N text tokens.
Source: melodyflow.md 2.1, 5 and 6.1.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.reports import Report
from jaxherd.data.audio.latents import TEXT_LENGTH, text_rows
from jaxherd.methods.codec_latents import cut_notes, text_encoder
from jaxherd.methods.flow_sampling import SamplingPlan, check_guidance, evaluations, transport
from jaxherd.methods.latent_inversion import Inversion
from jaxherd.methods.latent_inversion import edit as edit_latents
from jaxherd.methods.told_network import told
from jaxherd.models.seanet import AudioAutoencoder
from jaxherd.models.seanet_streaming import decode_chunks, decoder_reach, encode_chunks
from jaxherd.models.velocity_transformer import (
    Condition,
    LabelEmbedding,
    TextStates,
    VelocityTransformer,
)

Prompts = str | None | Sequence[str | None]

FRAMES_PER_CHUNK = 250


@dataclasses.dataclass(frozen=True, eq=False)
class Music:
    """What was made.

    Attributes:
      wave_BTC: float32 waveforms.
      latents_BFL: their standardised latents.
      evaluations: of the velocity network for one example; a guided one counts twice.
      latent_std: of all latents: 1 in the training data.
      inverted_std: of the noise that an inversion reached: 1 for noise.  None without inversion.
      notes: what was done to the prompts, see `MusicModel.notes`.
    """

    wave_BTC: np.ndarray
    latents_BFL: np.ndarray
    evaluations: int
    latent_std: float
    inverted_std: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class MusicModel:
    """Codec and velocity network.

    Attributes:
      autoencoder, velocity: the two modules.
      mean, std: [L], by which latents are standardised.
      sample_rate: Hz.
      labels: what prompts may be, where conditions are labels.
      text_encoder: source of the T5 encoder with its tokenizer, where they are text.
      clip_seconds: length of the clips that the velocity network was trained on.
      text_length: tokens of a text that count, as in its training; the rest is cut, with a note.
    """

    autoencoder: AudioAutoencoder
    velocity: VelocityTransformer
    mean: np.ndarray
    std: np.ndarray
    sample_rate: int
    labels: tuple[str, ...] = ()
    text_encoder: str | None = None
    clip_seconds: float = 10.0
    text_length: int = TEXT_LENGTH

    def __post_init__(self):
        codec, flow = self.autoencoder.config, self.velocity.config
        sizes = {codec.seanet.dimension, flow.latent_dim, len(self.mean), len(self.std)}
        if len(sizes) > 1:
            raise JaxherdError(
                f"the codec has {codec.seanet.dimension} latent channels, the velocity network "
                f"{flow.latent_dim} and the statistics {len(self.mean)} and {len(self.std)}: take "
                "parts of one run."
            )
        if self.sample_rate != codec.sample_rate:
            raise JaxherdError(
                f"sample_rate={self.sample_rate} is not the codec's {codec.sample_rate}."
            )
        given = flow.conditioner
        if isinstance(given, LabelEmbedding) and len(self.labels) != given.num_labels:
            raise JaxherdError(
                f"the velocity network knows {given.num_labels} labels and {len(self.labels)} "
                "names are given: take those of the latents it was trained on."
            )

    @property
    def frame_rate(self) -> float:
        """Latent frames a second."""
        return self.autoencoder.config.frame_rate

    @property
    def channels(self) -> int:
        """Audio channels."""
        return self.autoencoder.config.seanet.channels

    def label(self, prompt: str) -> int:
        """Return the label of this name, or the only one that holds all words of the prompt.

        Raises:
          JaxherdError: none or several do; the message lists the labels.
        """
        names = [name.casefold() for name in self.labels]
        wanted = " ".join(prompt.casefold().split())
        if wanted in names:
            return names.index(wanted)
        words = set(wanted.split())
        found = [i for i, name in enumerate(names) if words and words <= set(name.split())]
        if len(found) == 1:
            return found[0]
        why = "fits several labels" if found else "is none of the model's labels"
        raise JaxherdError(f"the prompt {prompt!r} {why}; {nearest(prompt, self.labels)}")

    def condition(self, prompts: Prompts) -> Condition | None:
        """Return the condition of one prompt, or of one a row.

        None and text without a word are the null condition (melodyflow.md 3.4).

        Raises:
          JaxherdError: an unknown label, or a prompt for a model that takes none.
        """
        prompts = [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)
        prompts = [None if prompt is None or not prompt.strip() else prompt for prompt in prompts]
        if all(prompt is None for prompt in prompts):
            return None
        given = self.velocity.config.conditioner
        if isinstance(given, LabelEmbedding):
            labels = [-1 if prompt is None else self.label(prompt) for prompt in prompts]
            return self.velocity.condition({"labels": np.asarray(labels, np.int32)})
        if isinstance(given, TextStates):
            return self.velocity.condition(self.text_batch(prompts, given.dim))
        raise JaxherdError("this model was trained without conditions: leave the prompt away.")

    def notes(self, *prompts: Prompts) -> tuple[str, ...]:
        """Return a sentence about each prompt that is cut."""
        if not isinstance(self.velocity.config.conditioner, TextStates):
            return ()
        rows = [[p] if p is None or isinstance(p, str) else p for p in prompts]
        texts = dict.fromkeys(text for row in rows for text in row if text and text.strip())
        return cut_notes({text: len(self._encoder()(text)) for text in texts}, self.text_length)

    def _encoder(self) -> Callable[[str], np.ndarray]:
        if self.text_encoder is None:
            raise JaxherdError(
                "the model's conditions are text and it names no text encoder: give "
                "text_encoder= (`jaxherd music --text-encoder`), the source of the T5 encoder it was "
                "trained with."
            )
        return text_encoder(self.text_encoder)

    def text_batch(
        self, prompts: Sequence[str | None], width: int, *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return the batch fields of text conditions, one row a prompt; None is an empty text.

        Args:
          prompts: cut after `text_length` tokens.
          width: of the encoder's states.
          length: of the rows; as long as they need to be in steps of 32 when None.
        Raises:
          JaxherdError: no text encoder is known, or its states have another width.
        """
        encode = self._encoder()
        states_ND = [np.zeros((0, width), np.float32) if p is None else encode(p) for p in prompts]
        if any(states.shape[1] != width for states in states_ND):
            raise JaxherdError(
                f"{self.text_encoder!r} gives states of another width than the model's {width}: "
                "name the T5 encoder it was trained with."
            )
        states_ND = [states[: self.text_length] for states in states_ND]
        if length is None:
            length = min(self.text_length, max(1, -(-max(map(len, states_ND)) // 32)) * 32)
        return text_rows(states_ND, width, length)

    def encode(
        self,
        wave_BTC: Float[np.ndarray, "B T C"],
        *,
        key: jax.Array | None = None,
        report: Report | None = None,
    ) -> Float[np.ndarray, "B F L"]:
        """Return latents of ceil(T / hop) frames, in pieces and without seams.

        Args:
          wave_BTC: at the model's rate, with its channels.
          key: samples the posterior; its mean without one.
          report: is told the frames that are done.
        Raises:
          JaxherdError: another number of channels, no sample at all, or values that are no finite
            numbers.
        """
        wave_BTC = np.asarray(wave_BTC, np.float32)
        config = self.autoencoder.config
        frames, length = config.frames(wave_BTC.shape[1]), FRAMES_PER_CHUNK * config.seanet.hop
        pieces = (wave_BTC[:, i : i + length] for i in range(0, wave_BTC.shape[1], length))
        return self.encode_pieces(pieces, key=key, report=report, frames=frames)

    def encode_pieces(
        self,
        pieces: Iterable[np.ndarray],
        *,
        key: jax.Array | None = None,
        report: Report | None = None,
        frames: int = 0,
    ) -> Float[np.ndarray, "B F L"]:
        """Return latents of a wave that comes piece by piece, [B, any T, C] each; see `encode`.

        No more than two pieces are held at a time, beside the latents.

        Args:
          pieces: of one wave, in order.
          key, report: as for `encode`.
          frames: how many there will be, for the report.
        Raises:
          JaxherdError: another number of channels, values that are no finite numbers, or no piece.
        """
        means, stds, done = [], [], 0
        checked = map(self._checked, pieces)
        for part in encode_chunks(self.autoencoder, checked, frames_per_chunk=FRAMES_PER_CHUNK):
            means.append(part.mean_BTL)
            stds.append(part.std_BTL)
            done += part.mean_BTL.shape[1]
            if report is not None:
                report("encoding", done, frames)
        if not means:
            raise JaxherdError("there is no sound to encode.")
        x_BFL = np.concatenate(means, axis=1)
        if key is not None:
            noise = np.asarray(jax.random.normal(key, x_BFL.shape))
            x_BFL = x_BFL + np.concatenate(stds, axis=1) * noise
        return ((x_BFL - self.mean) / (self.std + 1e-5)).astype(np.float32)

    def _checked(self, piece_BTC: np.ndarray) -> np.ndarray:
        if piece_BTC.shape[2] != self.channels:
            raise JaxherdError(
                f"a wave of {piece_BTC.shape[2]} channels; the codec wants {self.channels}."
            )
        if not np.isfinite(piece_BTC).all():
            raise JaxherdError("the wave holds values that are no finite numbers: mend or cut it.")
        return piece_BTC

    def decode(
        self,
        latents_BFL: Float[np.ndarray, "B F L"],
        *,
        held: bool = False,
        report: Report | None = None,
    ) -> Float[np.ndarray, "B T C"]:
        """Return waveforms of F hop samples, in pieces and without seams.

        A quantising codec snaps the latents to its codes first.

        Args:
          latents_BFL: standardised.
          held: let the first and the last frame go on beyond the ends while decoding.  The codec
            itself, and with it False, has zeros there, as in its training on whole clips: right for
            what `encode` gave.  Latents that were drawn know of no end, and zeros behind them are a
            step, heard as a click in the last samples.
          report: is told of decoded frames.
        Raises:
          JaxherdError: another width than the codec's, no frame, or values that are no numbers.
        """
        pieces = self.decode_pieces(latents_BFL, held=held, report=report)
        return np.concatenate(list(pieces), axis=1)

    def decode_pieces(
        self,
        latents_BFL: Float[np.ndarray, "B F L"],
        *,
        held: bool = False,
        report: Report | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the waveforms of `decode` piece by piece, [B, any T, C], in bounded memory."""
        latents_BFL = np.asarray(latents_BFL, np.float32)
        width = self.autoencoder.config.seanet.dimension
        if latents_BFL.shape[2] != width or not latents_BFL.shape[1]:
            raise JaxherdError(
                f"latents of {latents_BFL.shape[1]} frames and {latents_BFL.shape[2]} channels; "
                f"the codec wants some frames and {width} channels."
            )
        if not np.isfinite(latents_BFL).all():
            raise JaxherdError(
                "the latents hold values that are no finite numbers: lower cfg or the edit's "
                "strength, or train the model longer."
            )
        config, frames = self.autoencoder.config, latents_BFL.shape[1]
        x_BFL = (latents_BFL * (self.std + 1e-5) + self.mean).astype(np.float32)
        margin = decoder_reach(config.decoder_layers()) if held else 0
        if margin:
            x_BFL = np.pad(x_BFL, ((0, 0), (margin, margin), (0, 0)), mode="edge")
        starts = range(0, x_BFL.shape[1], FRAMES_PER_CHUNK)
        pieces = (self._snapped(x_BFL[:, i : i + FRAMES_PER_CHUNK]) for i in starts)
        hop = config.seanet.hop
        seen, first, last = 0, margin * hop, (margin + frames) * hop
        for wave_BTC in decode_chunks(self.autoencoder, pieces, frames_per_chunk=FRAMES_PER_CHUNK):
            # Of the samples [seen, seen + length) those from `first` to `last` are kept.
            kept_BTC = wave_BTC[:, max(0, first - seen) : max(0, last - seen)]
            seen += wave_BTC.shape[1]
            if report is not None:
                report("decoding", min(max(0, seen - first) // hop, frames), frames)
            if kept_BTC.shape[1]:
                yield kept_BTC

    def _snapped(self, x_BFL: np.ndarray) -> np.ndarray:
        if self.autoencoder.quantiser is None:
            return x_BFL
        return np.asarray(_quantised(self.autoencoder, x_BFL))

    def generate(
        self,
        prompts: Prompts,
        seconds: float,
        plan: SamplingPlan,
        key: jax.Array,
        *,
        report: Report | None = None,
    ) -> Music:
        """Return music for one prompt, or for one a row.

        Args:
          prompts: labels or texts; None and empty ones are the null condition.
          seconds: length; the last frame is cut.  Beyond `clip_seconds` the network is where it was
            never trained.
          plan: from noise to data.
          key: of the noise.
          report: is told of steps and of decoded frames.
        Raises:
          JaxherdError: an unknown label, a length that is not positive, or a plan that does not
            start at noise and end at data.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise JaxherdError(f"seconds must be positive, got {seconds}.")
        if (plan.source, plan.target) != (0.0, 1.0):
            raise JaxherdError(
                f"generation goes from noise at 0 to data at 1, not from {plan.source:g} to "
                f"{plan.target:g}."
            )
        rows = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
        condition = self.condition(prompts)
        if condition is None:  # both halves of a guided call would be the same
            plan = dataclasses.replace(plan, cfg_coef=0.0)
        samples = max(1, round(seconds * self.sample_rate))
        frames = self.autoencoder.frames(samples)
        noise = jax.random.normal(key, (rows, frames, self.velocity.config.latent_dim))
        with told(self.velocity, report, "generating", plan.steps) as network:
            latents_BFL = np.asarray(transport(network, condition, noise, plan))
        wave_BTC = self.decode(latents_BFL, held=True, report=report)[:, :samples]
        std, notes = float(latents_BFL.std()), self.notes(prompts)
        return Music(wave_BTC, latents_BFL, evaluations(plan), std, notes=notes)

    def edit(
        self,
        wave_BTC: Float[np.ndarray, "B T C"],
        prompts: Prompts,
        plan: Inversion | None,
        key: jax.Array,
        *,
        source_prompts: Prompts = None,
        cfg_coef: float = 4.0,
        sample: bool = True,
        report: Report | None = None,
    ) -> Music:
        """Return the waves changed to what the prompt says, as long as they were.

        Args:
          wave_BTC: the sources.
          prompts: what they should be: one for all, or one a row.
          plan: of the inversion, whose `target_flowstep` is the edit's strength.  None is no edit
            at all (a flow step of 1): the source through the codec.
          key: of the posterior's sample and of the inversion.
          source_prompts: what the sources are; the null condition is the paper's default.
          cfg_coef: guidance of the generation.
          sample: latents of the source are drawn from the posterior, as in the paper; False takes
            its mean.
          report: is told of frames and steps.
        Raises:
          JaxherdError: as for `encode` and `condition`, or a guidance beyond its bounds.
        """
        check_guidance(cfg_coef)
        rows = len(wave_BTC)
        before, after = (
            None if c is None else c.tile(rows // len(c.mask_BL))
            for c in (self.condition(source_prompts), self.condition(prompts))
        )
        posterior_key, edit_key = jax.random.split(key)
        source_BFL = self.encode(wave_BTC, key=posterior_key if sample else None, report=report)
        latents_BFL, count, inverted = source_BFL, 0, None
        if plan is not None:
            source = jnp.asarray(source_BFL)
            with told(self.velocity, report, "editing", plan.edit_calls()) as network:
                edited = edit_latents(
                    network, source, before, after, plan, edit_key, cfg_coef=cfg_coef
                )
                latents_BFL = np.asarray(edited.latents_BTC)
            count = edited.evaluations
            inverted = float(edited.inverted.std)
        # An edit follows its source to within some samples of the ends, not to the codec's zeros.
        wave = self.decode(latents_BFL, held=plan is not None, report=report)
        wave = wave[:, : wave_BTC.shape[1]]
        notes = self.notes(source_prompts, prompts)
        return Music(wave, latents_BFL, count, float(latents_BFL.std()), inverted, notes)


@jax.jit
def _quantised(autoencoder: AudioAutoencoder, x_BFL: jax.Array) -> jax.Array:
    return autoencoder.quantise(x_BFL).latents_BTL
