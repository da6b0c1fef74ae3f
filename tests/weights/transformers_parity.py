"""Comparisons with transformers that committed goldens and the live suite share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.modules import flatten, split
from jaxherd.weights.context import with_context_length
from jaxherd.weights.hf_config import write_config
from jaxherd.weights.load import load
from jaxherd.weights.mapping import place

# Tiny programs: compiling them well takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def loaded(folder, case):
    module = load(folder)
    if "context_length" in case:
        module = with_context_length(module, case["context_length"])
    return module


def exported(config, tree) -> dict[str, np.ndarray]:
    """Return a parameter-shaped tree under the names and layouts of Hugging Face."""
    flat = flatten(tree)
    architecture, _ = write_config(config)
    parts: dict[str, list] = {}
    for p in place(config, {k: v.shape for k, v in flat.items()}, architecture):
        value = p.rule.to_theirs(np.asarray(flat[p.path])[p.index], p.head_dim)
        parts.setdefault(p.name, []).append((p.rule.part or (0, 1), value))
    return {
        name: np.concatenate([v for _, v in sorted(found, key=lambda f: f[0])], axis=-1)
        for name, found in parts.items()
    }


def check_logits_and_gradients(module, golden, **inputs) -> None:
    """Compare with what the golden holds; `inputs` are what the module takes beside tokens."""
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    definition, params, buffers = split(module)

    def loss(params):
        logits = definition.merge(params, buffers)(tokens, **inputs)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(
        params
    )
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    ours = exported(module.config, grads)
    wanted = {k.removeprefix("grad/"): v for k, v in golden.items() if k.startswith("grad/")}
    assert wanted
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def check_cached_decode(module, golden, pieces) -> None:
    """Feed the tokens in pieces through a cache; logits equal those of the full forward pass."""
    tokens = np.asarray(golden["tokens"], np.int32)
    length = tokens.shape[1]
    cache = module.init_cache(tokens.shape[0], length)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(module, cache, tokens, positions):
        out = module.forward(tokens, positions=positions, cache=cache)
        return out.cache, module.unembed(out.hidden_BTD)

    at, logits = 0, []
    pieces = [*pieces, *[1] * (length - sum(pieces))]
    for piece in pieces:
        positions = np.broadcast_to(np.arange(at, at + piece, dtype=np.int32), (2, piece))
        cache, out = step(module, cache, tokens[:, at : at + piece], positions)
        logits.append(out)
        at += piece
    np.testing.assert_allclose(np.concatenate(logits, 1), golden["logits"], atol=1e-4, rtol=0)
