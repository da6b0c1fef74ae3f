"""`jaxherd generate --guard`: what is vetoed is not shown, and the exit status tells."""

import jax
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.models import presets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = presets.llama(
        vocab_size=259, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8
    )
    place = tmp_path_factory.mktemp("guarded") / "tiny"
    jaxherd.save(config.build(jax.random.key(0)), place, tokenizer=ByteTokenizer())
    return place


def test_a_vetoed_prompt(folder, tmp_path, capsys):
    rules = tmp_path / "house.json"
    rules.write_text('{"rule": [{"id": "r", "hazard": "S7", "patterns": ["bluebird"]}]}')
    arguments = ["generate", str(folder), "--max-new-tokens", "3", "--guard", str(rules)]
    assert main([*arguments, "--prompt", "What is Project ＢＬＵＥＢＩＲＤ?"]) == 3
    out, err = capsys.readouterr()
    assert err == "jaxherd: the prompt was vetoed by the guard 'house' (S7 Privacy).\n"
    assert out == "What is Project ＢＬＵＥＢＩＲＤ?\n", (
        "the prompt is the user's own, and nothing follows it"
    )
    assert main([*arguments, "--prompt", "What is a blue bird of prey?"]) == 0


def test_a_guard_that_is_none_is_told_before_the_model_is_read(tmp_path, capsys):
    assert (
        main(["generate", str(tmp_path), "--prompt", "x", "--guard", str(tmp_path / "no.toml")])
        == 2
    )
    assert "no.toml" in capsys.readouterr().err
