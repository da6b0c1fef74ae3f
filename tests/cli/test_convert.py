"""`jaxherd convert` takes along what is needed to use a model, and `generate` what it says."""

import json

import jax
import numpy as np
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.data.tokenizers import train_bpe
from jaxherd.inference import generate
from jaxherd.models import presets
from jaxherd.weights.generation import GenerationDefaults, generation_defaults

TEXTS = ["the king sees a dark sea and sings of old stone", "trees and 42 kings in the sea"]
DEFAULTS = GenerationDefaults((2, 5), 1, 0, temperature=0.7, top_k=7, top_p=0.9)
TEMPLATE = "{{ messages[0]['content'] }}!"


@pytest.fixture
def source(tmp_path):
    """A Hugging Face folder with a tokenizer, a chat template and generation defaults."""
    tokenizer = train_bpe(TEXTS, 300, cache_dir=tmp_path / "cache")
    tokenizer.chat_template = TEMPLATE
    model = presets.llama(
        vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
        hidden_dim=24,
    )  # fmt: skip
    module = model.build(jax.random.key(0))
    folder = tmp_path / "source"
    jaxherd.save(module, folder, format="hf", tokenizer=tokenizer, generation=DEFAULTS)
    # An entry that jaxherd knows nothing of is not lost either.
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1}))
    return folder


@pytest.mark.parametrize("form", ["hf", "jaxherd"])
def test_tokenizer_template_and_defaults_come_along(source, tmp_path, capsys, form):
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--to", form]) == 0
    assert "and the tokenizer" in capsys.readouterr().out
    before, after = jaxherd.load_tokenizer(source), jaxherd.load_tokenizer(target)
    for text in [*TEXTS, "Ünïcödé <|eos|> 🙂"]:
        assert before.encode(text) == after.encode(text)
        assert before.encode(text, parse_special=True) == after.encode(text, parse_special=True)
    assert after.chat_template == TEMPLATE and after.stop_ids == before.stop_ids
    assert generation_defaults(target) == generation_defaults(source) == DEFAULTS
    written = json.loads((target / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.1
    assert main(["generate", str(target), "--prompt", "the king", "--max-new-tokens", "2"]) == 0


def test_generate_uses_the_models_defaults(source, monkeypatch, capsys):
    seen = []

    class Fake:
        def __init__(self, *arguments, **named):
            pass

        def stream(self, request):
            seen.append(request.sampling)
            return []

    monkeypatch.setattr(generate, "Generator", Fake)
    assert main(["generate", str(source), "--prompt", "x"]) == 0
    assert main(["generate", str(source), "--prompt", "x", "--top-k", "0"]) == 0
    assert [(s.temperature, s.top_k, s.top_p) for s in seen] == [(0.7, 7, 0.9), (0.7, 0, 0.9)]


def test_weights_without_a_tokenizer(source, tmp_path, capsys):
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    captured = capsys.readouterr()
    assert "no tokenizer is written" in captured.err and "tokenizer" not in captured.out
    assert not list((tmp_path / "target").glob("tokenizer*"))


@pytest.mark.parametrize("what", ["below a file", "full", "no such place"])
def test_a_bad_target_is_told_before_anything_is_loaded(
    source, tmp_path, capsys, monkeypatch, what
):
    monkeypatch.setattr("jaxherd.weights.load.load", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    place = {
        "below a file": tmp_path / "file" / "x",
        "full": source,
        "no such place": "/proc/no-such-folder/x",
    }[what]
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(source), str(place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxherd: ") and err.count("\n") == 1 and str(place) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_gets_full_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxherd.weights.save.write_shards", full)
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(source), str(tmp_path / "target")]) == 74
    err = capsys.readouterr().err
    assert "No space left" in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_real_model(tmp_path, capsys):
    """From a GGUF file, whose tokenizer is inside."""
    alias, target = "smollm2-135m-instruct", tmp_path / "smollm2"
    assert main(["convert", alias, str(target), "--to", "hf", "--dtype", "bfloat16"]) == 0
    before, after = jaxherd.load_tokenizer(alias), jaxherd.load_tokenizer(target)
    text = "Ünïcödé 日本語 🙂 <|im_end|>\n\n  def f(x): return 42  "
    assert before.encode(text) == after.encode(text)
    assert before.encode(text, parse_special=True) == after.encode(text, parse_special=True)
    assert before.fingerprint() == after.fingerprint()
    assert after.chat_template == before.chat_template is not None
    assert generation_defaults(target).eos_ids == (2,)
    capsys.readouterr()
    question = ["--prompt", "What is the capital of France?", "--max-new-tokens", "8"]
    assert main(["generate", str(target), *question]) == 0
    assert "Paris" in capsys.readouterr().out
    assert np.dtype(jaxherd.load(target).embedding.table.dtype).name == "bfloat16"
