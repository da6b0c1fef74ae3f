"""`jaxherd evaluate` as a user meets it, on a tiny model."""

import json
import sys

import jax
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.models import presets

TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}<|bos|>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = presets.llama(
        vocab_size=259, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=16,
        max_length=512, init_std=0.3,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("evaluate") / "tiny"
    jaxherd.save(config.build(jax.random.key(0)), place, tokenizer=ByteTokenizer())
    return place


def call(capsys, *arguments):
    status = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_published_figures(capsys):
    status, out, _ = call(capsys, "published", "--kind", "pretrained")
    assert status == 0 and "Llama 4 Scout" in out and "MMLU-Pro" in out and "58.2" in out
    assert "experimental chat variant" in out and "LiveCodeBench" not in out
    status, out, _ = call(capsys, "published", "--json")
    assert status == 0 and {"model", "shots", "source"} <= json.loads(out)[0].keys()


def test_needles(capsys, folder, tmp_path):
    out_folder = tmp_path / "needle"
    arguments = ("needle", folder, "--lengths", "256", "--depths", "0", "1", "--needles", "1",
                 "--max-new-tokens", "4", "--out", out_folder)  # fmt: skip
    status, out, _ = call(capsys, *arguments)
    assert status == 0 and "needle.png" in out and (out_folder / "needle.csv").exists()
    assert "0.00" in out, "a random model finds nothing"
    assert call(capsys, *arguments)[0] == 0
    status, _, err = call(capsys, "needle", folder, "--lengths", "1024")
    assert status == 2 and "more than the model's 512" in err


def test_without_the_harness(capsys, folder, monkeypatch):
    """SOURCE may follow the verb at once."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = call(capsys, folder, "--tasks", "local_addition")
    assert status == 2 and "jaxherd[eval]" in err and err.count("\n") == 1


def test_safety_needs_a_model_that_talks(capsys, folder, tmp_path):
    status, _, err = call(capsys, "safety", folder, "--out", tmp_path / "safety")
    assert status == 2 and "no chat template" in err and not (tmp_path / "safety").exists()
    status, _, err = call(capsys, "safety", folder, "--strategies", "plane")
    assert status == 2 and "did you mean 'plain'" in err
    status, _, err = call(capsys, "safety", folder, "--turns", "0")
    assert status == 2 and "--turns" in err


class Chatting(ByteTokenizer):
    chat_template = TEMPLATE


def test_safety(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxherd, "load_tokenizer", lambda source: Chatting(), raising=False)
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[[rule]]\nid = "r"\nhazard = "own"\npatterns = ["balloon"]\non = ["prompt"]\n'
    )
    out_folder = tmp_path / "safety"
    status, out, err = call(
        capsys, "safety", folder, "--limit", "2", "--turns", "1", "--max-new-tokens", "8",
        "--strategies", "plain", "--guard", rules, "--out", out_folder,
    )  # fmt: skip
    assert status == 0, err
    figures = json.loads((out_folder / "safety.json").read_text())
    assert figures["attacks"]["conversations"] == 2 and figures["guard"] == "rules"
    assert (
        figures["harmless"]["vetoed"]["hits"] == 1 and figures["harmless"]["vetoed"]["trials"] == 2
    )
    assert "harmless prompts vetoed" in out and "1 of 2" in out
    assert len((out_folder / "transcripts.jsonl").read_text().splitlines()) == 2


@pytest.mark.harness
def test_tasks_end_to_end(capsys, folder, tmp_path):
    pytest.importorskip("lm_eval")
    out_file = tmp_path / "results.json"
    status, out, _ = call(
        capsys, folder, "--tasks", "local_addition", "local_copy", "--limit", "3", "--shots", "2",
        "--out", out_file, "--cache", tmp_path / "cache.jsonl",
    )  # fmt: skip
    assert status == 0 and "local_addition" in out and "this run" in out
    found = json.loads(out_file.read_text())
    assert (
        "acc,none" in found["results"]["local_addition"] and found["n-shot"]["local_addition"] == 2
    )
