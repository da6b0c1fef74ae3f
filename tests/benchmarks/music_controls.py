"""A trained music model against what it must beat: Gaussian predictors, noise, shuffled frames.

    python tests/benchmarks/music_controls.py RUN [--clips 60] [--seed 0] [--embeddings log-mel ...]

RUN is a folder that `jaxherd run melodyflow/text_to_music` leaves.  Prints one JSON object:

- loss: of the velocity network on held-out latents, beside those of Gaussian predictors fitted to the
  training clips: a covariance of whole clips as it is ("full"), averaged over equal lags
  ("stationary", which has 96 times fewer numbers to fit), the mean of both ("shrunk"), and
  independent values ("white").  "network_told" knows the labels, and so does "told", a stationary
  predictor for each label; the others do not.  Three means over times: "at", each of five times;
  "even", those five; "training", sixteen equal shares of the logit-normal times that the network is
  trained on, which makes it the validation loss of the training objective.  "gaussian" is whichever
  of the predictors without labels is best on the held-out clips themselves, which favours it;
- frechet: a row for each embedding, those of a trained network among them (they need the extra
  `music-metrics`, and "tagger", which is not among the default ones, `music-tags`): distance from real held-out clips through the codec of generated clips, of other
  real clips (the floor), of decoded noise, of real latents with frames shuffled.
"""

import argparse
import json

import numpy as np
from scipy.special import expit, ndtri


def full_covariance(clips):
    """Return (mean, covariance) of whole clips [N, F, C], flattened."""
    flat = clips.reshape(len(clips), -1).astype(np.float64)
    return flat.mean(axis=0), np.cov(flat, rowvar=False)


def stationary_covariance(clips):
    """Return (mean, covariance) in which only the lag between two frames counts."""
    _, frames, channels = clips.shape
    centre = clips.mean(axis=(0, 1), dtype=np.float64)
    x = clips.astype(np.float64) - centre
    whole = np.zeros((frames, channels, frames, channels))
    for lag in range(frames):
        count = len(x) * (frames - lag)
        at = np.einsum("nfc,nfd->cd", x[:, lag:], x[:, : frames - lag], optimize=True) / count
        for f in range(frames - lag):
            whole[f + lag, :, f, :] = at
            whole[f, :, f + lag, :] = at.T
    size = frames * channels
    return np.tile(centre, frames), whole.reshape(size, size)


def spectrum(centre, covariance):
    """Return (mean, eigenvalues, eigenvectors)."""
    values, vectors = np.linalg.eigh(covariance)
    return centre, np.maximum(values, 1e-6), vectors


def best_linear(z, t, centre, values, vectors):
    """Return the best prediction of x1 - x0 from z [N, F, C] at time t under that covariance."""
    gain = (t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2)
    turned = (z.reshape(len(z), -1) - t * centre) @ vectors
    return ((turned * gain) @ vectors.T + centre).reshape(z.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    names = ("log-mel", "notes", "onsets", "contours", "pitch")
    parser.add_argument("--embeddings", nargs="+", choices=(*names, "tagger"), default=names)
    a = parser.parse_args()

    from jaxherd.cli import common

    common.local_devices("cpu")
    import pathlib

    import jax
    import jax.numpy as jnp

    from jaxherd.data.audio.latent_tracks import LatentFolder
    from jaxherd.methods.flow_sampling import SamplingPlan
    from jaxherd.methods.music_embeddings import embed_all, embedding
    from jaxherd.methods.music_files import load_music
    from jaxherd.methods.music_metrics import frechet_of

    embeddings = {name: embedding(name) for name in a.embeddings}
    model = load_music(a.run)
    latents = LatentFolder.open(pathlib.Path(a.run) / "latents")
    frames = round(model.clip_seconds * model.frame_rate)
    chance = np.random.default_rng(a.seed)

    def clips(split: str, count: int) -> np.ndarray:
        """Clips with their posterior noise, labels in turn."""
        tracks, found = latents.load(split), []
        for number in range(count):
            own = [t for t in tracks if t.label == number % len(latents.labels)]
            track = own[int(chance.integers(len(own)))]
            start = int(chance.integers(len(track) - frames + 1))
            mean, std = track.read(start, frames)
            found.append(latents.standardise(mean + std * chance.standard_normal(mean.shape)))
        return np.stack(found).astype(np.float32)

    held, train = clips("heldout", 256), clips("train", 4096)
    noise = chance.standard_normal(held.shape).astype(np.float32)
    kinds = len(latents.labels)
    fitted = {"full": full_covariance(train), "stationary": stationary_covariance(train)}
    fitted["shrunk"] = tuple((a + b) / 2 for a, b in zip(*fitted.values()))
    spectra = {name: spectrum(*parts) for name, parts in fitted.items()}
    of_label = [spectrum(*stationary_covariance(train[label::kinds])) for label in range(kinds)]
    labels = jnp.arange(len(held)) % kinds
    network = jax.jit(lambda z, t, labels: model.velocity(z, t, model.velocity.condition(labels)))
    untold = jax.jit(lambda z, t: model.velocity(z, t, None))

    def losses(t: float) -> dict[str, float]:
        z, target = t * held + (1 - t) * noise, held - noise

        def loss(v: np.ndarray) -> float:
            return float(np.square(v - target).mean())

        parts = [
            (jnp.asarray(z[i : i + 32]), {"labels": labels[i : i + 32]})
            for i in range(0, len(z), 32)
        ]
        at = jnp.full(32, t)
        row = {
            "network": loss(np.concatenate([untold(rows, at) for rows, _ in parts])),
            "network_told": loss(np.concatenate([network(rows, at, told) for rows, told in parts])),
            "white": loss((t - (1 - t)) / (t**2 + (1 - t) ** 2) * z),
        }
        row |= {name: loss(best_linear(z, t, *parts)) for name, parts in spectra.items()}
        told = np.empty_like(z)
        for label, parts in enumerate(of_label):
            told[label::kinds] = best_linear(z[label::kinds], t, *parts)
        return row | {"told": loss(told)}

    even = {t: losses(t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)}
    shares = (np.arange(16) + 0.5) / 16
    training = [losses(float(t)) for t in expit(ndtri(shares))]
    loss = {"at": {str(t): row for t, row in even.items()}}
    for name, rows in (("even", list(even.values())), ("training", training)):
        mean = {kind: float(np.mean([row[kind] for row in rows])) for kind in rows[0]}
        best = min(("white", *spectra), key=lambda kind: mean[kind])
        loss[name] = mean | {"gaussian": mean[best], "best_gaussian": best}
    prompts = [model.labels[i % len(model.labels)] for i in range(a.clips)]
    made = model.generate(
        prompts, model.clip_seconds, SamplingPlan(32, "midpoint", cfg_coef=1.0),
        jax.random.key(a.seed),
    ).latents_BFL  # fmt: skip
    real, other = clips("heldout", a.clips), clips("heldout", a.clips)
    shuffled = np.stack([clip[chance.permutation(frames)] for clip in other])
    compared = {
        "generated": made,
        "real": other,
        "noise": chance.standard_normal(real.shape).astype(np.float32),
        "shuffled": shuffled,
    }

    waves = {name: model.decode(rows) for name, rows in (compared | {"reference": real}).items()}
    frechet = {}
    for name, embed in embeddings.items():
        rows = {kind: embed_all(clips, model.sample_rate, embed) for kind, clips in waves.items()}
        reference = rows.pop("reference")
        frechet[name] = {kind: frechet_of(found, reference) for kind, found in rows.items()}
    print(json.dumps({"frames": frames, "loss": loss, "frechet": frechet}, indent=1))


if __name__ == "__main__":
    main()
