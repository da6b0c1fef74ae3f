"""Rates and scales that follow a matrix's shape: the table, and activations over widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, flatten, split
from jaxherd.models import presets
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.transfer import Transfer, scaled


def model(width: int, **options):
    return presets.llama(
        vocab_size=64, embed_dim=width, num_layers=2, num_heads=width // 16,
        num_kv_heads=width // 16, head_dim=16, hidden_dim=2 * width, tie_embeddings=False,
        init_std=0.25, **options,
    )  # fmt: skip


def parts(config):
    definition, params, buffers = split(abstract(config.build, jax.random.key(0)))
    return definition, params, definition.axes()[0]


def test_the_table():
    _, params, axes = parts(model(64))
    rates, scales = (flatten(tree) for tree in Transfer(model(32)).multipliers(params, axes))
    found = {path: (rates[path], scales[path]) for path in rates}
    for path, (rate, scale) in found.items():
        if path.startswith("embedding") or path.endswith("scale"):
            assert (rate, scale) == (1, 1), path
        elif path.startswith("unembedding"):
            assert (rate, scale) == (0.5, 0.5), path
        else:
            assert (rate, scale) == pytest.approx((0.5, 0.5**0.5)), path
    rates, scales = Transfer(model(32), rule="standard").multipliers(params, axes)
    assert set(flatten(rates).values()) == {1.0}
    assert flatten(scales)["unembedding/kernel"] == pytest.approx(0.5**0.5)


def test_depth_batch_and_tokens():
    _, params, axes = parts(model(32))
    given = Transfer(
        model(32), depth_ratio=4.0, batch_ratio=4.0, token_ratio=8.0, token_exponent=-1 / 3
    )
    rates = flatten(given.multipliers(params, axes)[0])
    assert rates["embedding/table"] == pytest.approx(2 * 0.5)
    layers = [rate for path, rate in rates.items() if path.startswith("segments")]
    assert layers == pytest.approx([2 * 0.5 * 0.5] * len(layers))


def test_another_structure_is_refused():
    _, params, axes = parts(model(32))
    other = presets.llama(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, hidden_dim=64
    )
    with pytest.raises(JaxherdError, match="same structure"):
        Transfer(other).multipliers(params, axes)


def changes_over_widths(rule: str) -> list[float]:
    """Return the root mean square by which five steps change hidden states, for four widths."""
    changes = []
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (16, 33)), jnp.int32)
    for width in (32, 64, 128, 256):
        definition, params, buffers = split(model(width).build(jax.random.key(0)))
        rates, scales = Transfer(model(32), rule=rule).multipliers(params, definition.axes()[0])
        params = scaled(params, scales)
        schedule = Schedule(5e-3, "constant", 0)
        optimizer = Optimizer(schedule=schedule, weight_decay=0.0, clip=None)
        transform = optimizer.build(5, definition.axes()[0], rates)

        def logits(params, definition=definition, buffers=buffers):
            return definition.merge(params, buffers)(tokens[:, :-1])

        def loss(params, logits=logits):
            scores = jax.nn.log_softmax(logits(params))
            return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

        @jax.jit
        def step(params, state, loss=loss, transform=transform):
            updates, state = transform.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        @jax.jit
        def hidden(params, definition=definition, buffers=buffers):
            return definition.merge(params, buffers).forward(tokens[:, :-1]).hidden_BTD

        state, before = transform.init(params), hidden(params)
        for _ in range(5):
            params, state = step(params, state)
        changes.append(float(jnp.sqrt(jnp.square(hidden(params) - before).mean())))
    return changes


def test_what_steps_do_does_not_depend_on_the_width():
    """The coordinate check: with transferred rates and scales within 10 %, and not without."""
    found, usual = changes_over_widths("transfer"), changes_over_widths("standard")
    assert max(found) / min(found) < 1.1, found
    assert max(usual) / min(usual) > 1.3, usual
