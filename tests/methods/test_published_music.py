"""The two published files as a music model, and what is told of those that do not fit."""

import copy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import published_files as published
import tiny_music

import jaxherd
from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import flatten, split
from jaxherd.methods.flow_sampling import SamplingPlan
from jaxherd.methods.music_files import load_music, save_music
from jaxherd.methods.published_music import load_published


@pytest.fixture(scope="module")
def model():
    return published.music_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "files", model=model)


def same_parameters(ours, theirs):
    for a, b in ((ours.autoencoder, theirs.autoencoder), (ours.velocity, theirs.velocity)):
        mine, other = flatten(split(a)[1]), flatten(split(b)[1])
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            np.testing.assert_array_equal(value, other[name], name)


def test_both_files_are_one_model(model, folder):
    loaded = load_music(folder)
    assert loaded.autoencoder.config == published.CODEC
    assert loaded.velocity.config == published.FLOW  # head count and rounded rotations included
    assert (loaded.text_encoder, loaded.clip_seconds) == ("hf://google-t5/t5-base", 0.05)
    assert loaded.sample_rate == tiny_music.RATE and loaded.labels == ()
    np.testing.assert_array_equal(loaded.mean, model.mean)
    np.testing.assert_array_equal(loaded.std, model.std)
    same_parameters(model, loaded)
    wave = tiny_music.tone()
    latents = loaded.encode(wave)
    np.testing.assert_array_equal(latents, model.encode(wave))
    plan = SamplingPlan(2, "euler")
    one, two = (m.generate(None, 0.02, plan, jax.random.key(0)).wave_BTC for m in (model, loaded))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(loaded.autoencoder.latent_std, 1.0)
    assert load_published(folder, text_encoder="mine").text_encoder == "mine"
    assert load_music(folder, text_encoder="mine").text_encoder == "mine"
    half = load_music(folder, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(split(half.velocity)[1])} == {"bfloat16"}


def test_saved_in_our_format_it_is_the_same(model, folder, tmp_path):
    again = load_music(save_music(load_music(folder), tmp_path / "ours"))
    same_parameters(model, again)
    assert again.velocity.config == published.FLOW and again.text_encoder == model.text_encoder


def test_safetensors_with_the_text_in_their_metadata(model, folder, tmp_path):
    from safetensors.numpy import save_file

    for name, state, config in (
        ("state_dict", published.flow_state(model), published.FLOW_CONFIG),
        ("compression_state_dict", published.codec_state(model), published.CODEC_CONFIG),
    ):
        state = {key: np.ascontiguousarray(value) for key, value in state.items()}
        save_file(state, tmp_path / f"{name}.safetensors", {"xp.cfg": yaml.safe_dump(config)})
    same_parameters(model, load_music(tmp_path))


def changed(config, path, value):
    """A copy of a config with one key set, or taken out for the value `...`."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = config
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("transformer_lm.dim", 32, "embed_dim is 32 by its xp.cfg and 16 by its tensors"),
        ("transformer_lm.latent_dim", 8, "latent_dim is 8 by its xp.cfg and 4 by its tensors"),
        ("transformer_lm.num_layers", 4, "num_layers is 4 by its xp.cfg and 3"),
        ("transformer_lm.bias_ff", ..., "bias_ff is True by its xp.cfg and False"),
        ("transformer_lm.skip_connections", False, "skip_connections is 'none'"),
        ("transformer_lm.layer_scale", 0.1, "layer_scale is True by its xp.cfg and False"),
        ("transformer_lm.num_heads", 2, "frequencies is not that of heads of 8"),
        ("transformer_lm.positional_embedding", "sin", "does not fit a state dict with rope"),
        ("transformer_lm.positional_embedding", "alibi", "'alibi' is none of"),
        ("transformer_lm.norm_first", ..., "missing transformer_lm.norm_first"),
        ("transformer_lm.gated", True, "unknown transformer_lm.gated"),
        ("transformer_lm.kv_repeat", 2, "kv_repeat=2, where 1 alone"),
        ("transformer_lm.num_heads", "four", "num_heads='four' is no int"),
        ("transformer_lm.dim", "${nowhere}", "dim=None is no int"),
        ("width", "${width}", "leads nowhere"),
        ("transformer_lm", ..., "has no section 'transformer_lm'"),
        ("fuser.prepend", ["description"], "cross=\\['description'\\] alone"),
        ("conditioners.description.t5.name", "byt5", "'byt5', none of"),
        ("dataset", ..., "segment_duration is missing"),
    ],
)
def test_configurations_of_the_flow_that_do_not_fit(model, tmp_path, path, value, message):
    config = changed(published.FLOW_CONFIG, path, value)
    published.write(tmp_path, flow_config=config, model=model)
    with pytest.raises(JaxherdError, match=message) as caught:
        load_music(tmp_path)
    assert f"{tmp_path / 'state_dict.bin'}" in str(caught.value)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("seanet.ratios", [2, 4], "of another shape"),
        ("seanet.n_filters", 8, "of another shape .*encoder.model.0.conv.conv.param"),
        ("seanet.lstm", 2, "missing \\['encoder.model.7.lstm.weight_ih_l1'"),
        ("seanet.lstm", ..., "missing seanet.lstm"),
        ("seanet.renorm", 1, "unknown seanet.renorm"),
        ("seanet.encoder", {"dimension": 4}, "dimension=4, where 8 alone"),
        ("seanet.decoder", {"kernel_size": 3}, "unknown seanet.decoder.kernel_size"),
        ("seanet.activation", "GELU", "'GELU' is none of"),
        ("seanet.ratios", "4x2", "no list of whole numbers"),
        ("encodec.quantizer", "rvq", "'rvq', where 'no_quant' alone"),
        ("encodec.channels", 1, "encodec.channels is not seanet.channels"),
        ("encodec", ..., "no section 'encodec'"),
    ],
)
def test_configurations_of_the_codec_that_do_not_fit(model, tmp_path, path, value, message):
    config = changed(published.CODEC_CONFIG, path, value)
    published.write(tmp_path, codec_config=config, model=model)
    with pytest.raises(JaxherdError, match=message) as caught:
        load_music(tmp_path)
    assert f"{tmp_path / 'compression_state_dict.bin'}" in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(model, tmp_path):
    config = changed(published.FLOW_CONFIG, "transformer_lm.gated", True)
    config = changed(config, "transformer_lm.num_heads", ...)
    config = changed(config, "transformer_lm.xpos", True)
    with pytest.raises(JaxherdError) as caught:
        load_music(published.write(tmp_path / "config", flow_config=config, model=model))
    for part in ("missing transformer_lm.num_heads", "unknown transformer_lm.gated", "xpos=True"):
        assert part in str(caught.value)
    flow, codec = published.flow_state(model), published.codec_state(model)
    flow["transformer.layers.0.norm1.gain"] = flow.pop("transformer.layers.0.norm1.weight")
    with pytest.raises(JaxherdError) as caught:
        load_music(published.write(tmp_path / "flow", flow=flow, model=model))
    for part in ("missing: transformer.layers.0.norm1.weight", "unknown: transformer.layers.0."):
        assert part in str(caught.value)
    codec["encoder.model.0.conv.conv.extra"] = codec.pop("encoder.model.0.conv.conv.bias")
    with pytest.raises(JaxherdError) as caught:
        load_music(published.write(tmp_path / "codec", codec=codec, model=model))
    for part in ("missing ['encoder.model.0.conv.conv.bias']", "unknown ['encoder.model.0.conv."):
        assert part in str(caught.value)


def test_no_configuration_or_one_that_would_run_something(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, config, message in (
        ("none", None, "no text of a configuration under 'xp.cfg'"),
        ("tag", "a: !!python/object/apply:os.system ['touch ran']", "no YAML of plain values"),
        ("name", "a: !!python/name:os.system", "no YAML of plain values"),
        ("text", "just words", "its xp.cfg is no mapping"),
        ("broken", "a: [1", "no YAML of plain values"),
        ("deep", "[" * 5000, "no YAML of plain values"),
        ("long", "a: 1\n" * 300_000, "longer than"),
    ):
        for which in ("flow_config", "codec_config"):
            folder = published.write(tmp_path / name / which, model=model, **{which: config})
            with pytest.raises(JaxherdError, match=message):
                load_music(folder)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_pair(model, tmp_path):
    published.write(tmp_path, model=model)
    (tmp_path / "compression_state_dict.bin").rename(tmp_path / "away")
    with pytest.raises(JaxherdError, match="has no compression_state_dict.bin"):
        load_music(tmp_path)
    path = tmp_path / "compression_state_dict.bin"
    for package, message in (
        ({"pretrained": "facebook/encodec_32khz"}, "only names another model, 'facebook/encodec"),
        ({"xp.cfg": "a: 1"}, "no tensors under 'best_state'"),
        ({"xp.cfg": "a: 1", "best_state": {"a": "b"}}, "these are no tensors: \\['a'\\]"),
    ):
        published.write_torch_zip(path, package)
        with pytest.raises(JaxherdError, match=message):
            load_music(tmp_path)


def test_jaxherd_load_names_the_way(folder):
    for source in (folder, folder / "state_dict.bin"):
        with pytest.raises(JaxherdError, match="jaxherd convert --to jaxherd"):
            jaxherd.load(source)


def test_commands_take_the_folder(model, folder, tmp_path, capsys):
    from jaxherd.cli.main import main

    out = tmp_path / "new.wav"
    words = ["--seconds", "0.02", "--steps", "2", "--solver", "euler", "--out", str(out)]
    assert main(["music", "generate", str(folder), *words]) == 0
    assert out.stat().st_size > 100
    assert main(["convert", str(folder), str(tmp_path / "hf")]) != 0
    assert "no Hugging Face form" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--to", "jaxherd"]) == 0
    assert "wrote a music model of" in capsys.readouterr().out
    same_parameters(model, load_music(tmp_path / "ours"))
    for name in ("state_dict.bin", "compression_state_dict.bin"):  # the file stands for its folder
        target = tmp_path / f"of-{name}"
        assert main(["convert", str(folder / name), str(target), "--to", "jaxherd"]) == 0
        same_parameters(model, load_music(target))
