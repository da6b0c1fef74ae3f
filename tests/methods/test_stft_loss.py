"""The multi-scale STFT loss against auraloss (committed goldens, and live) and its definition."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.spectral import StftConfig, stereo_views
from jaxherd.methods.stft_loss import MultiScaleStft, multi_scale_stft, stft_distance

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "auraloss_cases.json").read_text())

_spec = importlib.util.spec_from_file_location("random_weights", GOLDEN / "random_weights.py")
random_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_weights)


def config_of(case: dict) -> MultiScaleStft:
    convergence, logarithm, linear = case.get("factors", (1.0, 1.0, 0.0))
    return MultiScaleStft(
        tuple(StftConfig(*sizes) for sizes in zip(case["n_ffts"], case["hops"], case["windows"])),
        convergence,
        logarithm,
        linear,
        case.get("floor", 1e-8),
        per_view=case["kind"] == "sum_difference",
    )


def check(case: dict, golden) -> None:
    """The loss to 1e-5, and its gradient to 1e-5 of the gradient's largest value.

    Or to twice what torch's own float32 gradient is off, where nearly empty bins make that more.
    """
    config = config_of(case)

    def loss(output, target):
        if case["kind"] == "resolutions":
            return stft_distance(jnp.swapaxes(output, 1, 2), jnp.swapaxes(target, 1, 2), config)
        # Sum and difference are twice the mid and side.
        return stft_distance(
            2 * stereo_views(output)[:, 2:], 2 * stereo_views(target)[:, 2:], config
        )

    pair = random_weights.wave_pair(2, case["length"], case["channels"])
    value, gradient = jax.jit(jax.value_and_grad(loss))(*map(jnp.asarray, pair))
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    wanted = golden["gradient"]
    tolerance = max(1e-5, 2 * float(golden["float32_error"])) * np.abs(wanted).max()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check(CASES[name], np.load(GOLDEN / "auraloss" / f"{name}.npz"))


@pytest.mark.parametrize(
    "name, change",
    [
        ("odd_sizes", {"windows": [50, 77, 127]}),
        ("odd_sizes", {"hops": [10, 33, 31]}),
        ("all_terms", {"factors": [0.5, 2.0, 2.9]}),
        ("high_floor", {"floor": 3.9}),
        ("sum_difference", {"kind": "resolutions"}),
    ],
)
def test_goldens_are_sensitive_to_what_they_should_catch(name, change):
    with pytest.raises(AssertionError):
        check({**CASES[name], **change}, np.load(GOLDEN / "auraloss" / f"{name}.npz"))


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    python = os.environ.get("JAXHERD_ORACLE_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import auraloss, torch"], capture_output=True).returncode:
        pytest.skip("needs torch and auraloss: set JAXHERD_ORACLE_PYTHON")
    folder = tmp_path_factory.mktemp("live")
    script = GOLDEN / "make_auraloss_goldens.py"
    subprocess.run([python, str(script), "--live", str(folder)], check=True)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_live_parity(live, name):
    check(CASES[name], np.load(live / f"{name}.npz"))


SMALL = MultiScaleStft((StftConfig(64), StftConfig(32, 8)), magnitude=0.5)


def waves() -> tuple[jax.Array, jax.Array]:
    output, target = random_weights.wave_pair(2, 190, 2)
    return jnp.asarray(output), jnp.asarray(target)


def test_a_stereo_signal_is_four_views():
    output, target = waves()
    views = [np.asarray(stereo_views(w), np.float64) for w in (output, target)]
    total = 0.0
    for scale in SMALL.scales:
        sides = []
        for x in views:
            x = np.pad(x, ((0, 0), (0, 0), (scale.n_fft // 2,) * 2), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(x, scale.n_fft, axis=-1)
            sides.append(np.abs(np.fft.rfft(frames[:, :, :: scale.hop] * scale.window())))
        s, r = (np.maximum(side, 1e-4) for side in sides)
        total += np.linalg.norm((r - s).ravel()) / np.linalg.norm(r.ravel())
        total += np.abs(np.log(r / s)).mean() + 0.5 * np.abs(r - s).mean()
    np.testing.assert_allclose(multi_scale_stft(output, target, SMALL), total / 2, rtol=1e-5)


def test_it_sees_what_channels_alone_do_not_show():
    output, _ = waves()
    assert float(multi_scale_stft(output, output, SMALL)) < 1e-9
    turned = output * jnp.array([1.0, -1.0])
    channels = [jnp.swapaxes(w, 1, 2) for w in (turned, output)]
    assert float(stft_distance(*channels, SMALL)) < 1e-9
    assert float(multi_scale_stft(turned, output, SMALL)) > 0.1


@pytest.mark.parametrize("per_view", [False, True])
def test_slopes_are_finite_where_signals_are_equal_or_silent(per_view):
    output, target = waves()
    config = dataclasses.replace(SMALL, per_view=per_view)
    slope = jax.jit(jax.grad(lambda y, x: multi_scale_stft(y, x, config)))
    silence, mono = jnp.zeros_like(output), output.at[..., 1].set(output[..., 0])
    for y, x in ((output, output), (silence, target), (output, silence), (silence, silence),
                 (output, mono)):  # fmt: skip
        assert np.isfinite(slope(y, x)).all()


def test_a_silent_side_does_not_outweigh_the_rest_unless_asked_to():
    output, _ = waves()
    mono = output.at[..., 1].set(output[..., 0])
    only = dataclasses.replace(SMALL, log_magnitude=0.0, magnitude=0.0)
    assert float(multi_scale_stft(output, mono, only)) < 2
    assert float(multi_scale_stft(output, mono, dataclasses.replace(only, per_view=True))) > 100


def test_what_cannot_be_is_told():
    for wrong in ({"scales": ()}, {"convergence": -1.0}, {"floor": 0.0},
                  {"convergence": 0.0, "log_magnitude": 0.0}):  # fmt: skip
        with pytest.raises(JaxherdError, match="multi-scale STFT loss needs"):
            MultiScaleStft(**wrong)
    with pytest.raises(JaxherdError, match="longer signal or a smaller n_fft"):
        multi_scale_stft(jnp.zeros((1, 500, 2)), jnp.zeros((1, 500, 2)), MultiScaleStft())
