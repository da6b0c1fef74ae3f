"""Decoders with weights in few bits: which matrices, what they compute, how they lie on devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating, flatten, split
from jaxherd.core.sharding import Partitioner
from jaxherd.kernels import QuantizedMatrix, quantize
from jaxherd.models import presets
from jaxherd.models.decoder import restack
from jaxherd.models.quantise import (
    RECIPES,
    bytes_by_dtype,
    dequantised,
    quantise,
    recipe_of,
    stored_bytes,
)

VISION = 871_932_416  # parameters of tower, adapter and projection (llama4.md 4)
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 64, (4, 12)), jnp.int32)


def scout(layers: int = 1):
    """Routed layers, every second of which differs in attention."""
    return presets.llama4_text(
        vocab_size=64, embed_dim=128, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8,
        num_experts=4, expert_dim=128, nope_interval=2, chunk_size=6, init_std=0.1,
        max_length=64,
    )  # fmt: skip


def dense():
    """Tied scores."""
    return presets.llama(
        vocab_size=64, embed_dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        hidden_dim=96, init_std=0.2, max_length=64,
    )  # fmt: skip


MODELS = {"scout": scout, "three": lambda: scout(3), "dense": dense}


# One layer is the first and the last: there too all experts count.
OF_ALL_KINDS = dataclasses.replace(
    RECIPES["fp8_mixed"],
    ends=True,
    attention=RECIPES["int8_group32"].attention,
    shared_expert=RECIPES["int4"].shared_expert,
    head=RECIPES["int8"].head,
)


@functools.cache
def module(model: str):
    return jax.jit(MODELS[model]().build)(jax.random.key(0))


@functools.cache
def coded(model: str, recipe: str):
    return quantise(module(model), OF_ALL_KINDS if recipe == "all kinds" else recipe)


@jax.jit
def logits(model, tokens):
    return model(tokens)


def codes(model) -> dict[str, QuantizedMatrix]:
    found = flatten(split(model)[1])
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, QuantizedMatrix)}


def test_int4_mixed_is_scouts_of_the_model_card():
    """66.5 GB in place of 217.3 (llama4.md 9): 102,676,561,920 weights of two kinds of experts."""
    plain = stored_bytes(presets.llama4_scout(), "bfloat16")
    found = stored_bytes(presets.llama4_scout(), "bfloat16", "int4_mixed")
    assert found["int8"] * 2 == 102_676_561_920
    assert found["float32"] == 102_676_561_920 // 128 * 4
    vision = 2 * VISION
    assert sum(plain.values()) + vision == pytest.approx(217.3e9, rel=1e-3)
    assert sum(found.values()) + vision == pytest.approx(66.5e9, rel=1e-3)


def test_fp8_mixed_is_mavericks():
    """432.7 GB in place of 803.2: 23 of the 24 layers that route."""
    config = recipe_of("fp8_mixed").apply(presets.llama4_maverick())
    kept = [i for i, layer in enumerate(config.layers) if layer.formats]
    assert kept == list(range(1, 47, 2))
    vision = 2 * VISION
    found = stored_bytes(presets.llama4_maverick(), "bfloat16", "fp8_mixed")
    assert sum(found.values()) + vision == pytest.approx(432.7e9, rel=1e-3)
    assert found["float8_e4m3fn"] == 23 * 3 * 128 * 5120 * 8192


def test_which_matrices():
    layers = recipe_of("int4_mixed").apply(scout(4)).layers
    routed = {f"feed_forward/{n}" for n in ("gate", "up", "down")}
    shared = {f"feed_forward/shared/{n}/kernel" for n in ("gate", "up", "down")}
    assert all({path for path, _ in layer.formats} == routed | shared for layer in layers)
    for name in ("int4_mixed_offline", "fp8_mixed"):
        layers = recipe_of(name).apply(scout(4)).layers
        assert [{path for path, _ in layer.formats} for layer in layers] == [
            set(),
            routed,
            routed,
            set(),
        ]
    found = recipe_of("int8").apply(scout(4))
    assert [path for path, _ in found.formats] == ["unembedding/kernel"]
    assert len(found.layers[0].formats) == 10
    found = recipe_of("int4").apply(dense())
    assert dict(found.formats)["embedding/table"].code == "int8"
    assert {f.code for _, f in found.layers[0].formats} == {"int4"}


@pytest.mark.parametrize("recipe", ["int4_mixed_offline", "fp8_mixed"])
def test_codes_are_those_of_the_quantiser(recipe):
    """And the rest of the model is untouched, whatever stacks the layers now lie in."""
    old, new = restack(module("three"), scan_layers=False), coded("three", recipe)
    new = restack(new, scan_layers=False)
    old, new = flatten(split(old)[1]), flatten(split(new)[1])
    assert old.keys() == new.keys()
    options: dict[str, Any] = {
        "fp8_mixed": {"dtype": "float8_e4m3fn"},
    }.get(recipe, {"bits": 4, "group": 128, "convention": "absmax/8", "packed": True})
    for path, leaf in new.items():
        if not isinstance(leaf, QuantizedMatrix):
            np.testing.assert_array_equal(leaf, old[path])
            continue
        wanted = quantize(old[path], **options)
        np.testing.assert_array_equal(
            leaf.values.astype(jnp.float32), wanted.values.astype(jnp.float32)
        )
        np.testing.assert_array_equal(leaf.scales, wanted.scales)
        assert leaf.activations == ("float8_e4m3fn" if recipe == "fp8_mixed" else None)
        if recipe != "fp8_mixed":
            error = jnp.abs(leaf.dequantize() - old[path])
            step = jnp.repeat(leaf.scales, leaf.group, axis=-2)
            saturated = leaf.unpack().values.astype(jnp.int8) == 7
            assert bool((error <= jnp.where(saturated, 1.0, 0.5) * step * 1.0001).all())


def test_logits_are_those_of_the_numbers():
    """In float32 the arithmetic is the same but for where the scale multiplies: 1e-4."""
    few = coded("scout", "int4_mixed")
    plain = dequantised(few)
    assert plain.config == scout() and not codes(plain)
    found, wanted = logits(few, TOKENS), logits(plain, TOKENS)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
    assert float(jnp.abs(found - logits(module("scout"), TOKENS)).max()) > 1e-3


def test_greedy_decoding_is_that_of_the_numbers():
    few = coded("dense", "int4_group32")
    prompt = [3, 5, 7, 11, 2]
    found = jaxherd.generate(few, prompt, max_new_tokens=12)
    assert found == jaxherd.generate(dequantised(few), prompt, max_new_tokens=12)


def test_another_implementation_of_the_products():
    few = coded("dense", "int8")
    wanted = logits(few, TOKENS)
    config = dataclasses.replace(few.config, matmul_implementation="reference")
    _, params, buffers = split(few)
    definition = split(abstract(config.build, jax.random.key(1)))[0]
    np.testing.assert_allclose(logits(definition.merge(params, buffers), TOKENS), wanted, atol=1e-5)
    config = dataclasses.replace(few.config, matmul_implementation="pallas_gpu")
    with pytest.raises(JaxherdError, match="this is a cpu, not a gpu"):
        jax.eval_shape(lambda: config.build(jax.random.key(1))(TOKENS))


def test_activations_are_in_the_dtype_of_the_other_weights():
    few = cast_floating(coded("dense", "int8"), jnp.bfloat16)
    assert few.dtype == jnp.bfloat16 and few.embed(TOKENS).dtype == jnp.bfloat16
    kept = {leaf.scales.dtype for leaf in codes(few).values()}
    assert kept == {jnp.dtype(jnp.float32)}
    assert few.init_cache(1, 8)[0][0][0][0].k.dtype == jnp.bfloat16
    # Embeddings are the rows of the table that the head reads.
    table = codes(few)["embedding/table"].dequantize(jnp.bfloat16)
    np.testing.assert_array_equal(few.embed(TOKENS)[0, 3], table[:, TOKENS[0, 3]])
    sizes = bytes_by_dtype(few)
    assert sizes["int8"] == sum(leaf.values.size for leaf in codes(few).values())


LAYOUTS = {
    "tensor2_expert2_fsdp2": Layout("mixed", fsdp=2, expert=2, tensor=2),
    "tensor4_fsdp2": Layout(
        "tensor", fsdp=2, tensor=4, overrides=(("kv_heads", ()), ("act_kv_heads", ()))
    ),
}


@pytest.mark.parametrize(
    "model, recipe, layout",
    [
        ("scout", "all kinds", "tensor2_expert2_fsdp2"),
        ("dense", "int4", "tensor4_fsdp2"),
    ],
)
def test_eight_devices_compute_what_one_does(devices, model, recipe, layout):
    few = coded(model, recipe)
    wanted = logits(few, TOKENS)
    definition, params, buffers = split(few)
    partitioner = Partitioner.create(LAYOUTS[layout], devices)
    axes = definition.axes()
    placed = [
        jax.device_put(tree, partitioner.tree_shardings(names, tree))
        for tree, names in zip((params, buffers), axes)
    ]
    split_leaves = [
        leaf for leaf in codes(definition.merge(*placed)).values()
        if leaf.values.sharding.shard_shape(leaf.values.shape) != leaf.values.shape
    ]  # fmt: skip
    assert split_leaves
    with partitioner.activate():
        found = jax.jit(lambda m, t: m(t))(definition.merge(*placed), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)


def test_a_group_that_a_shard_would_cut_is_told(devices):
    few = coded("dense", "int4_group32")  # 96 hidden units are three groups
    definition, params, _ = split(few)
    partitioner = Partitioner.create(Layout("tensor", data=4, fsdp=1, tensor=2), devices)
    with pytest.raises(JaxherdError, match="down/kernel: 2 shards .* the 3 groups of 32 rows"):
        partitioner.tree_shardings(definition.axes()[0], params)
    with partitioner.activate(), pytest.raises(JaxherdError, match="would cut the 3 groups"):
        jax.eval_shape(lambda: few(TOKENS))


def test_what_does_not_fit_is_told():
    with pytest.raises(JaxherdError, match="did you mean 'int4_mixed'.*fp8_mixed, int4, "):
        quantise(module("dense"), "int4_mixd")
    with pytest.raises(JaxherdError, match="this model has none: choose int8 or int4"):
        quantise(module("dense"), "int4_mixed")
    with pytest.raises(JaxherdError, match="in few bits already"):
        quantise(coded("dense", "int8"), "int4")
    with pytest.raises(JaxherdError, match="groups of 128 do not divide its 64 inputs"):
        recipe_of("int4_mixed").apply(
            presets.llama4_text(
                vocab_size=8,
                embed_dim=64,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_dim=8,
                num_experts=2,
                expert_dim=128,
            )  # fmt: skip
        )
    assert set(RECIPES) >= {"int4_mixed", "fp8_mixed", "int8", "int4"}
