"""Comparing our codecs with what torch computed for them."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.modules import flatten, split, unflatten
from jaxherd.layers.vector_quantiser import QuantiserConfig
from jaxherd.models.seanet import AudioAutoencoder, AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.stft_discriminator import StftDiscriminatorConfig
from jaxherd.weights import melodyflow_codec as names

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "codec_cases.json").read_text())

_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)


def read(path) -> dict:
    return dict(np.load(path))


def state_dict(golden: dict) -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden["shapes"]))
    return {n: random_weights.codec_tensor(n, tuple(s)) for n, s in shapes.items()}


def config_of(case: dict) -> AudioAutoencoderConfig:
    """The encoder of a golden gives `dimension` channels, as a codec with a quantiser has."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in case["config"].items()}
    seanet = SeanetConfig(**fields)
    quantiser = QuantiserConfig(seanet.dimension, stages=1, codes=4, code_dim=2)
    return AudioAutoencoderConfig(seanet, 8000, bottleneck="rvq", quantiser=quantiser)


def style_of(case: dict) -> str:
    return "transformers" if case["kind"] == "encodec" else "audiocraft"


def loaded(case: dict, state: dict, config: AudioAutoencoderConfig | None = None):
    config = config_of(case) if config is None else config
    definition, params, buffers = split(config.build(jax.random.key(0)))
    read_in = jax.tree.map(jnp.asarray, names.codec_params(state, config, style_of(case)))
    params = {**params, **read_in}
    return definition, params, buffers


def close(ours, theirs, what: str, tolerance: float = 1e-4):
    """Relative to the largest value: activations of random networks span several magnitudes."""
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours, theirs, atol=tolerance * scale, err_msg=what)


def check_codec(case: dict, golden: dict, gradients: bool = True) -> None:
    """Latents, output, loss and (which takes longer) the gradient of every parameter agree."""
    definition, params, buffers = loaded(case, state_dict(golden))
    wave = jnp.asarray(random_weights.random_wave(2, case["length"], case["config"]["channels"]))

    def run(params):
        model: AudioAutoencoder = definition.merge(params, buffers)
        latents = model.encode(wave).mean_BTL
        output = model.decode(latents)
        return jnp.mean(output**2) + jnp.mean(latents**2), (latents, output)

    if gradients:
        (loss, (latents, output)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    else:
        (loss, (latents, output)), grads = jax.jit(run)(params), {}
    close(latents, golden["latents"], "latents")
    close(output, golden["output"], "output")
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    grads = flatten(grads)
    for entry in names.name_table(config_of(case), style_of(case)) if gradients else ():
        check_gradient(grads[entry.ours], golden[f"grad/{entry.names[0]}"], entry)


def check_gradient(ours, theirs, entry: names.Entry) -> None:
    name = entry.names[0]
    if theirs.ndim == 0:
        np.testing.assert_allclose(np.linalg.norm(ours), theirs, rtol=1e-3, atol=1e-5, err_msg=name)
        return
    read_back = entry.read(name, theirs)
    assert read_back is not None, name
    close(ours, read_back, name, tolerance=3e-4)


def check_layers(case: dict, golden: dict) -> None:
    from jaxherd.layers.conv import ConvConfig, TransposedConvConfig
    from jaxherd.layers.lstm import LstmConfig
    from jaxherd.layers.snake import Snake

    state = state_dict(golden)
    x = jnp.asarray(random_weights.random_wave(2, case["length"], 3))

    def layer(config, theirs):
        module = config.build(jax.random.key(0))
        definition, params, buffers = split(module)
        table = {
            e.ours.removeprefix("at/"): e
            for e in names._entries(config, "at", theirs, "audiocraft")
        }
        values = {k: e.read(e.names[0], state[e.names[0]]) for k, e in table.items()}
        assert values.keys() == flatten(params).keys()
        return definition.merge(unflatten({k: jnp.asarray(v) for k, v in values.items()}), buffers)

    for i, (kernel, stride, dilation, causal, mode) in enumerate(case["conv"]):
        config = ConvConfig(3, 4, kernel, stride, dilation, causal=causal, pad_mode=mode)
        y = layer(config, f"conv.{i}")(x)
        assert y.shape[1] == config.length(x.shape[1])
        close(y, golden[f"conv/{i}"], str(config), 1e-5)
    for i, (kernel, stride, causal, ratio) in enumerate(case["transposed"]):
        config = TransposedConvConfig(3, 4, kernel, stride, causal=causal, trim_right_ratio=ratio)
        close(layer(config, f"transposed.{i}")(x), golden[f"transposed/{i}"], str(config), 1e-5)
    y, (hidden, cell) = layer(LstmConfig(3, 2), "recurrent")(x)
    close(y, golden["recurrent"], "lstm", 1e-5)
    close(hidden, golden["hidden"], "hidden", 1e-5)
    close(cell, golden["cell"], "cell", 1e-5)
    definition, _, buffers = split(Snake(3))
    snake = definition.merge({"alpha": jnp.asarray(state["snake.alpha"].reshape(-1))}, buffers)
    close(snake(x), golden["snake"], "snake", 1e-5)


def check_discriminator(case: dict, golden: dict) -> None:
    config = StftDiscriminatorConfig(tuple(case["config"]["n_ffts"]), case["config"]["filters"])
    definition, params, buffers = split(config.build(jax.random.key(0)))
    theirs, count = {}, len(config.layers())
    for name in flatten(params):
        _, scale, _, layer, part = name.split("/")
        at = "conv_post" if int(layer) == count - 1 else f"convs.{layer}"
        weights = {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1",
                   "kernel": "weight", "bias": "bias"}  # fmt: skip
        theirs[name] = f"discriminators.{scale}.{at}.conv.{weights[part]}"
    state = state_dict(golden)
    assert sorted(theirs.values()) == sorted(state)

    def ours(name, tensor):
        kernel = name.endswith(("/v", "/kernel"))
        return np.transpose(tensor, (2, 3, 1, 0)) if kernel else tensor.reshape(-1)

    params = unflatten({n: jnp.asarray(ours(n, state[t])) for n, t in theirs.items()})
    wave = jnp.asarray(random_weights.random_wave(2, case["length"], 2))

    def run(params):
        verdict = definition.merge(params, buffers)(wave)
        return sum(jnp.mean(x**2) for x in verdict.logits), verdict

    (loss, verdict), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    for i, logits in enumerate(verdict.logits):
        close(logits, golden[f"logits/{i}"], f"logits {i}")
        for k, features in enumerate(verdict.features[i]):
            close(features[::4], golden[f"features/{i}/{k}"], f"features {i} {k}")
    for name, grad in flatten(grads).items():
        golden_grad = golden[f"grad/{theirs[name]}"]
        if golden_grad.ndim == 0:
            np.testing.assert_allclose(np.linalg.norm(grad), golden_grad, rtol=1e-3, err_msg=name)
        else:
            close(grad, ours(name, golden_grad), name)


def check(case: dict, golden: dict, gradients: bool = True) -> None:
    if case["kind"] == "layers":
        check_layers(case, golden)
    elif case["kind"] == "discriminator":
        check_discriminator(case, golden)
    else:
        check_codec(case, golden, gradients)
