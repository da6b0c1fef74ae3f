"""Exports of Llama Materials: licence and Notice go along, and the name begins with Llama."""

import json

import jax
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.models import presets
from jaxherd.weights.licence import llama_materials

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
