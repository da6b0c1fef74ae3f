"""Llama 4's claim of length generalisation: its arms and its rule."""

import dataclasses

import pytest

from jaxherd.claims import ledger
from jaxherd.core import catalog, resources

CLAIM = ledger.discover()["llama4/irope-length"]
MODULE = catalog.load_file(resources.folder("experiments") / "llama4" / "claims.py")


def numbers(short: float, long: float, harm: float = 0.0) -> dict[str, float]:
    return {"accuracy/64": short, "accuracy/512": long, "loss_harm": harm}


def results(**changes):
    good = {
        "irope": numbers(0.99, 0.95),
        "all_rope": numbers(0.99, 0.2, 0.1),
        "all_rope_slow": numbers(0.99, 0.9),
        "local": numbers(0.12, 0.12),
    }
    return {arm: dict.fromkeys(CLAIM.seeds, value) for arm, value in (good | changes).items()}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"irope": numbers(0.99, 0.7)}, "does not hold"),
        ({"irope": numbers(0.99, 0.95, 0.2)}, "does not hold"),
        ({"all_rope": numbers(0.99, 0.9)}, "does not hold"),
        ({"all_rope": numbers(0.5, 0.2)}, "inconclusive"),
        ({"local": numbers(0.9, 0.12)}, "inconclusive"),
    ],
)
def test_every_condition_can_fail(changes, verdict):
    assert CLAIM.decide(results(**changes), CLAIM.threshold).verdict == verdict


def test_one_bad_seed_is_enough():
    found = results()
    found["irope"][CLAIM.seeds[-1]] = numbers(0.99, 0.3)
    decision = CLAIM.decide(found, CLAIM.threshold)
    assert decision.verdict == "does not hold"
    assert any(reason.startswith("NOT met: iRoPE retrieves") for reason in decision.reasons)


def test_arms_differ_in_attention_alone():
    models = {arm: MODULE.irope_model(arm) for arm in CLAIM.arms}
    assert len({m.num_params() for m in models.values()}) == 1
    irope = models["irope"]
    for arm, model in models.items():
        assert dataclasses.replace(model, layers=()) == dataclasses.replace(irope, layers=())
        assert model.layers[:3] == irope.layers[:3]
        assert {layer.feed_forward for layer in model.layers} == {irope.layers[0].feed_forward}
        last = model.layers[3].attention
        if arm == "local":
            assert last == irope.layers[0].attention
        else:
            assert dataclasses.replace(last, rope=None) == irope.layers[3].attention
            assert (last.rope is None) == (arm == "irope")


def test_tuning_seed_is_not_among_the_seeds():
    assert 100 not in CLAIM.seeds
    assert "seed 100" in CLAIM.protocol
