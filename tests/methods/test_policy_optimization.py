"""Group-relative policy optimisation against its formula, and what must not count."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import split
from jaxherd.methods.policy_optimization import GroupPolicyOptimization, group_advantages
from tests.methods.tiny_decoder import batch, decoder, log_probs

KEY = jax.random.key(0)


def rollouts(advantages=(1.0, -0.5, 0.25, -1.5), drift=0.4):
    given = batch()
    noise = np.random.default_rng(3).normal(0, drift, given["tokens"].shape)
    return {
        **given,
        "sampled_log_probs": jnp.asarray(log_probs(decoder(), given) + noise, jnp.float32),
        "advantages": jnp.asarray(advantages, jnp.float32),
        "rewards": jnp.asarray([1.0, 0.0, 0.5, 0.0]),
    }


def gradient_of(objective, given, frozen=None):
    definition, params, buffers = split(decoder())

    def loss(params):
        return objective(definition.merge(params, buffers), given, KEY, frozen=frozen)

    return jax.grad(loss, has_aux=True)(params)


def test_advantages_of_groups():
    rewards = np.asarray([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    found = group_advantages(rewards)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1], atol=1e-5)
    assert not found[1:].any()
    np.testing.assert_allclose(
        group_advantages(rewards, normalize=False)[0], [0.5, -0.5, -0.5, 0.5]
    )


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_the_formula(average):
    objective = GroupPolicyOptimization(
        clip_low=0.2, clip_high=0.3, kl_weight=0.1, average=average, constant_length=20
    )
    given = rollouts()
    loss, metrics = objective(decoder(0), given, KEY, frozen={"reference": decoder(1)})
    own, reference = log_probs(decoder(0), given), log_probs(decoder(1), given)
    w = np.exp(own - np.asarray(given["sampled_log_probs"]))
    a = np.asarray(given["advantages"])[:, None]
    k = np.exp(reference - own) - (reference - own) - 1
    token = -np.minimum(w * a, np.clip(w, 0.8, 1.3) * a) + 0.1 * k
    mask = np.asarray(given["loss_weights"])
    wanted = {
        "token": (token * mask).sum() / mask.sum(),
        "sequence": ((token * mask).sum(1) / mask.sum(1)).mean(),
        "constant": (token * mask).sum() / 20 / len(mask),
    }[average]
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    assert float(metrics["kl"][0] / metrics["kl"][1]) == pytest.approx(
        (k * mask).sum() / mask.sum(), rel=1e-4
    )


def test_groups_of_equal_rewards_give_exactly_nothing():
    gradient, _ = gradient_of(GroupPolicyOptimization(), rollouts((0.0, 0.0, 0.0, 0.0)))
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))
    # Beside others they leave the denominator as well.
    some, _ = gradient_of(GroupPolicyOptimization(), rollouts((1.0, -1.0, 0.0, 0.0)))
    alone, _ = gradient_of(
        GroupPolicyOptimization(), jax.tree.map(lambda x: x[:2], rollouts((1.0, -1.0, 0.0, 0.0)))
    )
    chex.assert_trees_all_close(some, alone, atol=1e-5)


def test_beyond_the_bound_there_is_no_gradient():
    given = rollouts((1.0, 1.0, 1.0, 1.0), drift=0.0)
    far = {**given, "sampled_log_probs": given["sampled_log_probs"] - 1.0}
    gradient, metrics = gradient_of(GroupPolicyOptimization(), far)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))
    assert float(metrics["clipped"][0] / metrics["clipped"][1]) == 1.0


def test_microbatches_share_the_denominator():
    given = rollouts()
    objective = GroupPolicyOptimization(average="token")
    whole, _ = gradient_of(objective, given)
    rows = [jax.tree.map(lambda x, i=i: x[i::2], given) for i in range(2)]
    parts = [gradient_of(objective, part) for part in rows]
    weights = [float(metrics["loss"][1]) for _, metrics in parts]
    together = jax.tree.map(
        lambda a, b: (weights[0] * a + weights[1] * b) / sum(weights), parts[0][0], parts[1][0]
    )
    chex.assert_trees_all_close(together, whole, atol=1e-5)


def test_what_is_missing_is_told():
    with pytest.raises(JaxherdError, match="'reference'"):
        GroupPolicyOptimization(kl_weight=0.1)(decoder(), rollouts(), KEY)
    with pytest.raises(JaxherdError, match="temperature"):
        GroupPolicyOptimization(temperature=0.0)
