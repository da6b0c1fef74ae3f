"""Co-distillation: its ends, its schedule, and stored targets against a teacher at hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.methods.distillation import CoDistillation, SoftWeight, top_k_targets
from tests.methods.tiny_decoder import VOCABULARY, batch, decoder, log_probs

KEY = jax.random.key(0)


def run(objective, given, teacher, progress=0.5):
    definition, params, buffers = split(decoder())

    def loss(params):
        frozen = None if teacher is None else {"teacher": teacher}
        return objective(
            definition.merge(params, buffers), given, KEY, frozen=frozen, progress=progress
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return float(value), {k: float(a / b) for k, (a, b) in metrics.items()}, gradient


def test_without_soft_targets_it_is_cross_entropy():
    given = batch()
    value, _, _ = run(CoDistillation(SoftWeight(0.0, 0.0)), given, decoder(1))
    mask = np.asarray(given["loss_weights"])
    assert value == pytest.approx(
        -(log_probs(decoder(), given) * mask).sum() / mask.sum(), rel=1e-5
    )


def test_a_student_that_is_its_teacher_has_no_gradient():
    value, _, gradient = run(CoDistillation(SoftWeight(1.0, 1.0), 2.0), batch(), decoder())
    assert value == pytest.approx(0.0, abs=1e-6)
    chex.assert_trees_all_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-5)


def test_the_formula_at_a_temperature():
    given, t = batch(), 3.0
    value, metrics, _ = run(CoDistillation(SoftWeight(0.2, 0.6), t), given, decoder(1), 0.25)
    own, theirs = (
        jax.nn.log_softmax(decoder(s)(given["tokens"], positions=given["positions"]) / t)
        for s in (0, 1)
    )
    soft = np.asarray(t**2 * (jnp.exp(theirs) * (theirs - own)).sum(-1))
    mask, hard = np.asarray(given["loss_weights"]), -log_probs(decoder(), given)
    assert metrics["soft_weight"] == pytest.approx(0.3, abs=1e-6)
    assert value == pytest.approx(((0.3 * soft + 0.7 * hard) * mask).sum() / mask.sum(), rel=1e-4)


def test_agreement_weighs_by_the_teachers_probability_of_what_came():
    given = batch()
    _, metrics, _ = run(CoDistillation(SoftWeight(0.8, 0.8, rule="agreement")), given, decoder(1))
    mask = np.asarray(given["loss_weights"])
    wanted = (0.8 * np.exp(log_probs(decoder(1), given)) * mask).sum() / mask.sum()
    assert metrics["soft_weight"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("k", [5, VOCABULARY])
def test_stored_targets_stand_for_the_teacher(k):
    given = batch()
    stored = {**given, **top_k_targets(decoder(1), given, k, temperature=2.0)}
    objective = CoDistillation(SoftWeight(0.7, 0.7), 2.0)
    value, metrics, gradient = run(objective, given, decoder(1))
    found, kept, close = run(objective, stored, None)
    if k == VOCABULARY:
        assert found == pytest.approx(value, rel=1e-4)
        chex.assert_trees_all_close(close, gradient, atol=1e-4)
    else:
        assert 0 < kept["soft"] < metrics["soft"]


def test_schedules():
    assert float(SoftWeight(1.0, 0.0).at(0.25)) == pytest.approx(0.75)
    assert float(SoftWeight(1.0, 0.0, "cosine").at(0.5)) == pytest.approx(0.5)
    assert float(SoftWeight(1.0, 0.0, "cosine").at(2.0)) == pytest.approx(0.0, abs=1e-6)


def test_what_does_not_fit_is_told():
    with pytest.raises(JaxherdError, match="'teacher'"):
        CoDistillation()(decoder(), batch(), KEY)
    with pytest.raises(JaxherdError, match="from 0 to 1"):
        SoftWeight(start=1.5)
