"""Measurements beyond the trained length, with models whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.data.packed_text import Bytes, PackedText
from jaxherd.data.retrieval import RetrievalText
from jaxherd.methods import long_context
from jaxherd.methods.long_context import LengthSweep
from jaxherd.models import presets


@pytest.fixture
def data(tmp_path, monkeypatch) -> RetrievalText:
    monkeypatch.setenv("JAXHERD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(12):
        (folder / f"{n}.txt").write_text("".join(rng.choice(list("abcd "), 400)))
    text = PackedText(
        corpus=str(folder),
        tokenizer_config=Bytes(),
        sequence_length=32,
        batch_size=4,
        heldout_fraction=0.5,
    )
    return RetrievalText(text, pairs=3, keys=8, values=8)


@dataclasses.dataclass(frozen=True)
class Output:
    hidden_BTD: jax.Array


class Recall:
    """Looks a key's value up if the key came less than `reach` tokens ago."""

    def __init__(self, data, reach):
        self.data, self.reach = data, reach

    def forward(self, tokens, *, positions, segment_ids):
        d = self.data
        place = jnp.arange(tokens.shape[1])
        apart = place[:, None] - place[None, :]
        same = (tokens[:, :, None] == tokens[:, None, :]) & (apart > 0) & (apart < self.reach)
        is_key = (tokens >= d.first_key) & (tokens < d.first_value)
        found = (same & is_key[:, :, None]).any(axis=2)
        value = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), same.argmax(axis=2), axis=1)
        # Before position 32 every id is equally likely; later, id 0 is much likelier than others.
        late = (positions >= 32)[..., None] * jax.nn.one_hot(0, d.vocab_size) * 5.0
        return Output(10.0 * found[..., None] * jax.nn.one_hot(value, d.vocab_size) + late)

    def unembed(self, hidden):
        return hidden


jax.tree_util.register_pytree_node(
    Recall, lambda m: ((), (m.data, m.reach)), lambda aux, _: Recall(*aux)
)


def sweep(data) -> LengthSweep:
    return LengthSweep(data, (32, 64, 128), tokens=2048, batch_tokens=512)


def test_accuracy_falls_where_the_model_cannot_reach(data):
    numbers = sweep(data).measure(Recall(data, reach=1000))
    assert all(numbers[f"accuracy/{length}"] == 1.0 for length in (32, 64, 128))
    numbers = sweep(data).measure(Recall(data, reach=40))
    assert numbers["accuracy/32"] == 1.0
    assert np.isfinite(list(numbers.values())).all()
    assert numbers["accuracy/128/depth 1 of 4"] == 0.0
    assert numbers["accuracy/128/depth 4 of 4"] == 1.0
    assert 0.0 < numbers["accuracy/128"] < numbers["accuracy/64"] < 1.0


def test_loss_harm_is_that_of_the_length_alone(data):
    numbers = sweep(data).measure(Recall(data, reach=40))
    flat = np.log(data.vocab_size)
    late = np.log(data.vocab_size - 1 + np.exp(5.0))
    assert numbers["loss/bucket 1"] == pytest.approx(flat, rel=1e-5)
    for bucket in (2, 3, 4):
        assert numbers[f"loss/bucket {bucket}"] == pytest.approx(late, rel=1e-5)
        assert numbers[f"loss_in_windows/bucket {bucket}"] == pytest.approx(flat, rel=1e-5)
    assert numbers["loss_harm"] == pytest.approx(late - flat, rel=1e-4)


def test_scores_of_a_decoder_are_those_of_its_logits(data):
    config = presets.llama4_text(
        vocab_size=data.vocab_size, embed_dim=16, num_layers=4, num_heads=2, num_kv_heads=1,
        head_dim=8, moe_layers=(), dense_dim=16, chunk_size=8,
    )  # fmt: skip
    model = config.build(jax.random.key(0))
    rows = data.build(split="train", seed=0)
    batch = next(rows)
    rows.close()
    nll, hits = long_context.score_tokens(model, batch)
    log_p = jax.nn.log_softmax(model(jnp.asarray(batch["tokens"])))
    wanted = -np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, wanted, rtol=1e-4)
    np.testing.assert_array_equal(hits, np.asarray(log_p).argmax(-1) == batch["targets"])


def test_windows_start_anew(data):
    rows = data.build(split="train", seed=0)
    batch = next(rows)
    rows.close()
    cut = long_context.windows(batch, 8)
    assert cut["tokens"].shape == (16, 8)
    assert (cut["positions"] == np.arange(8)).all()
    assert (cut["tokens"][1] == batch["tokens"][0, 8:16]).all()
