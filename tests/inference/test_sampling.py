import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.generate import row_keys
from jaxherd.inference.sampling import RowSampling, Sampling, filtered, sample

LOGITS = jnp.log(jnp.asarray([0.4, 0.05, 0.25, 0.2, 0.1]))
run = jax.jit(sample)


def kept(sampling: Sampling) -> list[int]:
    rows = RowSampling.create([sampling], row_keys(None, [0]))
    return np.flatnonzero(np.isfinite(np.asarray(filtered(LOGITS[None], rows)[0]))).tolist()


@pytest.mark.parametrize(
    "sampling, tokens",
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_k=1), [0]),
        (Sampling(1.0, top_k=3), [0, 2, 3]),
        (Sampling(1.0, top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_p=0.3), [0]),
        (Sampling(1.0, top_p=1e-6), [0]),
        (Sampling(1.0, top_p=0.5), [0, 2]),
        (Sampling(1.0, top_p=0.8), [0, 2, 3]),
        (Sampling(1.0, min_p=0.5), [0, 2, 3]),
        (Sampling(1.0, min_p=1.0), [0]),
        # Of the three likeliest, the first has 0.4 / 0.85 = 0.47 of the share.
        (Sampling(1.0, top_k=3, top_p=0.46), [0]),
        (Sampling(1.0, top_k=3, top_p=0.48), [0, 2]),
        (Sampling(1.0, top_k=4, min_p=0.6), [0, 2]),
        # A low temperature sharpens before top-p looks.
        (Sampling(0.25, top_p=0.5), [0]),
    ],
)
def test_filters_keep_the_right_tokens(sampling, tokens):
    assert kept(sampling) == tokens


def test_sampled_frequencies_follow_the_softmax():
    n, temperature = 20_000, 0.7
    rows = RowSampling.create([Sampling(temperature)] * n, row_keys(None, range(n)))
    tokens = np.asarray(run(jnp.tile(LOGITS, (n, 1)), rows, jnp.zeros(n, jnp.int32)))
    expected = np.asarray(jax.nn.softmax(LOGITS / temperature))
    found = np.bincount(tokens, minlength=5) / n
    # Five standard deviations of a frequency.
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / n**0.5)


def test_greedy_and_random_rows_in_one_batch():
    settings = [Sampling(), Sampling(5.0), Sampling(1.0, top_k=1), Sampling(2.0, top_p=0.01)]
    rows = RowSampling.create(settings, row_keys(None, range(4)))
    for position in range(5):
        tokens = run(jnp.tile(LOGITS, (4, 1)), rows, jnp.full(4, position, jnp.int32))
        assert tokens[0] == tokens[2] == tokens[3] == 0


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    settings = [Sampling(1.0), Sampling(0.5, top_k=7), Sampling(), Sampling(1.5, min_p=0.1)]
    rows = RowSampling.create(settings, row_keys(jax.random.key(4), [9, 8, 7, 6]))
    together = run(logits, rows, jnp.arange(4))
    for i in range(4):
        one = RowSampling.create(settings[i : i + 1], row_keys(jax.random.key(4), [9 - i]))
        assert run(logits[i : i + 1], one, jnp.asarray([i]))[0] == together[i]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
    ],
)
def test_impossible_settings(values):
    with pytest.raises(JaxherdError, match=next(iter(values))):
        Sampling(**values)
