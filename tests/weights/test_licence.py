"""Exports of Llama Materials: licence and Notice go along, and the name begins with Llama."""

import json

import jax
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.core.errors import JaxherdError
from jaxherd.models import presets
from jaxherd.weights.licence import joined, llama_materials, remembered

# A stand-in with the agreement's title; the agreement itself is Meta's.
AGREEMENT = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\n\nA stand-in for tests.\n"


@pytest.fixture
def source(tmp_path):
    model = presets.llama(
        vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=24
    )
    folder = tmp_path / "source"
    jaxherd.save(model.build(jax.random.key(0)), folder, format="hf")
    return folder


def name_it(folder, name):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": name}))


def test_nothing_is_asked_of_other_models(source, tmp_path):
    (source / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    name_it(source, "someone/own-model")
    assert main(["convert", str(source), str(tmp_path / "any")]) == 0
    assert not (tmp_path / "any" / "Notice").exists()


@pytest.mark.parametrize("form", ["hf", "jaxherd"])
def test_the_licence_goes_along_and_the_name_is_asked_for(source, tmp_path, capsys, form):
    (source / "LICENSE.txt").write_text(AGREEMENT)
    assert main(["convert", str(source), str(tmp_path / "tiny"), "--to", form]) == 2
    told = capsys.readouterr().err
    assert "Llama-tiny" in told and "LICENSE.txt" in told and not (tmp_path / "tiny").exists()
    target = tmp_path / "Llama-tiny"
    assert main(["convert", str(source), str(target), "--to", form]) == 0
    assert (target / "LICENSE.txt").read_text() == AGREEMENT
    notice = (target / "Notice").read_text()
    assert notice.count("\n") == 1 and "Llama 4 Community License" in notice
    # What was exported is known again, and its Notice is kept.
    (target / "Notice").write_text(notice + "and more\n")
    again = tmp_path / "again"
    assert main(["convert", str(target), str(again)]) == 2
    assert main(["convert", str(target), str(tmp_path / "Llama-again")]) == 0
    assert (tmp_path / "Llama-again" / "Notice").read_text().endswith("and more\n")


def test_a_copy_of_the_licence_is_asked_for(source, tmp_path, capsys):
    name_it(source, "meta-llama/Llama-3.2-1B")
    assert main(["convert", str(source), str(tmp_path / "llama-tiny")]) == 2
    told = capsys.readouterr().err
    assert "meta-llama/Llama-3.2" in told and "LICENSE" in told


def test_a_notice_alone_tells(tmp_path):
    (tmp_path / "Notice").write_text("Llama 3.1 is licensed under the Llama 3.1 Community License")
    found = llama_materials(tmp_path)
    assert found is not None and found.version == "3.1" and found.licence is None
    assert llama_materials(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "card, version",
    [
        ("---\nlicense: llama4\n---\n", "4"),
        ("---\nlicense: other\nlicense_name: llama-3.2\n---\n", "3.2"),
        ("---\nbase_model: meta-llama/Meta-Llama-3.1-8B\n---\n", "3.1"),
        ("---\nbase_model:\n- meta-llama/Llama-Guard-4-12B\n---\n", "4"),
        (
            "---\nlicense: apache-2.0\n---\nBetter than meta-llama/Llama-3.2-1B, license: llama4\n",
            None,
        ),
        ("license: llama4\n", None),
    ],
)
def test_a_model_card_tells(tmp_path, card, version):
    (tmp_path / "README.md").write_text(card)
    found = llama_materials(tmp_path)
    assert (found and found.version) == version


@pytest.mark.parametrize(
    "metadata, version",
    [
        ({"general.license": "llama3.2"}, "3.2"),
        (
            {"general.base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3.2-1B"},
            "3.2",
        ),
        ({"general.architecture": "llama", "general.license": "apache-2.0"}, None),
    ],
)
def test_a_gguf_file_tells(tmp_path, metadata, version):
    found = llama_materials(tmp_path, metadata)
    assert (found and found.version) == version


def test_a_loaded_model_is_known_when_it_is_saved(source, tmp_path):
    (source / "LICENSE").write_text(AGREEMENT)
    module = jaxherd.load(source)
    known = remembered(module)
    assert known is not None and known.version == "4"
    with pytest.raises(JaxherdError, match="Llama-mine"):
        jaxherd.save(module, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    jaxherd.save(module, tmp_path / "Llama-mine", format="hf")
    assert (tmp_path / "Llama-mine" / "LICENSE").read_text() == AGREEMENT
    assert "Llama 4 Community License" in (tmp_path / "Llama-mine" / "Notice").read_text()
    # Another module is another one, unless the caller says what it was made from.
    other = module.config.build(jax.random.key(3))
    jaxherd.save(other, tmp_path / "free")
    with pytest.raises(JaxherdError, match="begin with 'Llama'"):
        jaxherd.save(other, tmp_path / "not-free", derived_from=[source])


def test_materials_of_two_versions(source, tmp_path):
    (source / "LICENSE").write_text(AGREEMENT)
    (source / "LICENSE-Llama-3.2").write_text(AGREEMENT.replace("4", "3.2"))
    found = llama_materials(source)
    assert found is not None and [found.version, *(o.version for o in found.others)] == ["4", "3.2"]
    assert joined([found, None, found]) == found
    assert main(["convert", str(source), str(tmp_path / "Llama-both")]) == 0
    names = {path.name for path in (tmp_path / "Llama-both").iterdir()}
    assert {"LICENSE", "Notice", "LICENSE-Llama-3.2", "Notice-Llama-3.2"} <= names
    assert llama_materials(tmp_path / "Llama-both").others[0].version == "3.2"  # type: ignore[union-attr]
    (source / "LICENSE-Llama-3.2").unlink()
    (source / "Notice").write_text("Llama 3.2 is licensed under the Llama 3.2 Community License")
    with pytest.raises(JaxherdError, match="a copy of their licence must go along"):
        jaxherd.save(jaxherd.load(source), tmp_path / "Llama-half")
