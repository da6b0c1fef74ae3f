"""Preference optimisation against the formula on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.methods.preference_optimization import PreferenceOptimization
from tests.methods.tiny_decoder import batch, decoder, log_probs

KEY = jax.random.key(0)


def test_at_the_reference_the_loss_is_ln_2():
    loss, metrics = PreferenceOptimization()(
        decoder(), batch(), KEY, frozen={"reference": decoder()}
    )
    assert float(loss) == pytest.approx(np.log(2.0), abs=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_formula(normalized):
    objective = PreferenceOptimization(
        beta=0.3, label_smoothing=0.1, nll_weight=0.2, length_normalized=normalized
    )
    given = batch()
    loss, metrics = objective(decoder(0), given, KEY, frozen={"reference": decoder(1)})
    weights = np.asarray(given["loss_weights"])
    own = log_probs(decoder(0), given)
    ratio = (weights * (own - log_probs(decoder(1), given))).sum(1)
    if normalized:
        ratio = ratio / weights.sum(1)
    margin = 0.3 * (ratio[0::2] - ratio[1::2])
    wanted = 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))
    wanted = wanted - 0.2 * ((weights * own).sum(1) / weights.sum(1))[0::2]
    assert float(loss) == pytest.approx(wanted.mean(), abs=1e-5)
    assert float(metrics["accuracy"][0] / metrics["accuracy"][1]) == (margin > 0).mean()


def test_a_step_prefers_the_better_answer():
    definition, params, buffers = split(decoder())
    given = batch()

    def loss(params):
        return PreferenceOptimization(beta=1.0)(
            definition.merge(params, buffers), given, KEY, frozen={"reference": decoder()}
        )

    gradient, _ = jax.grad(loss, has_aux=True)(params)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert float(loss(moved)[0]) < np.log(2.0) and float(loss(moved)[1]["margin"][0]) > 0


def test_pairs_without_an_answer_do_not_count():
    given = batch()
    emptied = {**given, "loss_weights": given["loss_weights"].at[2].set(0.0)}
    one, _ = PreferenceOptimization()(decoder(0), emptied, KEY, frozen={"reference": decoder(1)})
    alone = jax.tree.map(lambda x: x[:2], given)
    wanted, _ = PreferenceOptimization()(decoder(0), alone, KEY, frozen={"reference": decoder(1)})
    assert float(one) == pytest.approx(float(wanted), abs=1e-6)


def test_what_is_missing_is_told():
    with pytest.raises(JaxherdError, match="frozen model called 'reference'"):
        PreferenceOptimization()(decoder(), batch(), KEY)
    with pytest.raises(JaxherdError, match="even number"):
        odd = jax.tree.map(lambda x: jnp.asarray(x)[:3], batch())
        PreferenceOptimization()(decoder(), odd, KEY, frozen={"reference": decoder()})
    with pytest.raises(JaxherdError, match="beta"):
        PreferenceOptimization(beta=0.0)
