"""Released weights as a stage: a checkpoint that training starts from, and a source of its own."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import Experiment
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import flatten, split
from jaxherd.core.runner import run_experiment
from jaxherd.data.conversations import AnswerRows
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.methods.verifiable_tasks import VerifiableTasks
from jaxherd.training.objectives import NextToken
from jaxherd.training.optimizers import Optimizer, Schedule
from jaxherd.training.stage import RunConfig, TrainStage
from jaxherd.weights.load_stage import LoadWeights
from tests.methods.tiny_policy import CONFIG, policy


def run(workdir, *stages, count=1):
    thing = Experiment("tests/load", "cpu", "cpu", tuple(stages))
    devices = tuple(jax.devices()[:count])
    said: list[str] = []
    run_experiment(thing, workdir, target="cpu", devices=devices, say=said.append, quiet=True)
    return said


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    jaxherd.save(policy(), folder, tokenizer=ByteTokenizer())
    return folder


def assert_same_values(module):
    found, wanted = (flatten(split(m)[1]) for m in (module, policy()))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(wanted[name]))


@pytest.mark.parametrize("count", [1, 4])
def test_training_starts_from_the_weights(source, tmp_path, count):
    layout = Layout()
    tune = TrainStage(
        name="tune",
        model=CONFIG,
        data=AnswerRows(VerifiableTasks((("addition", 1),)), sequence_length=48, batch_size=4),
        objective=NextToken(),
        optimizer=Optimizer("sgd", Schedule(1e-30, "constant", 0), weight_decay=0.0),
        layout=layout,
        run_config=RunConfig(steps=1, loggers=("jsonl",)),
        initial="load",
        reads=("load",),
    )
    run(tmp_path, LoadWeights("load", str(source), CONFIG, layout), tune, count=count)
    assert_same_values(jaxherd.load(tmp_path / "load"))
    assert_same_values(jaxherd.load(tmp_path / "tune"))  # after a step of no length
    assert jaxherd.load_tokenizer(tmp_path / "load").fingerprint() == ByteTokenizer().fingerprint()
    # A second run has nothing to do; without its mark the checkpoint stays as it is.
    (tmp_path / "load" / "done.json").unlink()
    run(tmp_path, LoadWeights("load", str(source), CONFIG, layout), tune, count=count)
    assert_same_values(jaxherd.load(tmp_path / "load"))


def test_another_model_is_refused_before_anything_is_written(source, tmp_path):
    other = dataclasses.replace(CONFIG, vocab_size=300)
    with pytest.raises(
        JaxherdError, match=r"embedding/table is \(259, 16\) and not \(300, 16\), a"
    ):
        run(tmp_path / "a", LoadWeights("load", str(source), other))
    with pytest.raises(JaxherdError, match="no-such-folder"):
        run(tmp_path / "b", LoadWeights("load", str(tmp_path / "no-such-folder"), CONFIG))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_weights_without_a_tokenizer_say_so(tmp_path):
    jaxherd.save(policy(), tmp_path / "bare")
    said = run(tmp_path / "run", LoadWeights("load", str(tmp_path / "bare"), CONFIG))
    assert any("no tokenizer comes with the weights" in line for line in said)
    assert_same_values(jaxherd.load(tmp_path / "run" / "load"))


def test_the_text_part_of_a_multimodal_source(vision_golden, tmp_path):
    folder, _ = vision_golden("two_images_in_a_row")
    text = jaxherd.load(folder, text_only=True)
    run(tmp_path / "run", LoadWeights("load", str(folder), text.config))
    found, wanted = (flatten(split(m)[1]) for m in (jaxherd.load(tmp_path / "run/load"), text))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(wanted[name]))


def test_materials_are_known_through_training(source, tmp_path, capsys):
    """What was fine-tuned from them is a derivative, and its exports say so."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    (folder / "LICENSE").write_text(
        "LLAMA 4 COMMUNITY LICENSE AGREEMENT\n\nA stand-in for tests.\n"
    )
    tune = TrainStage(
        name="tune",
        model=CONFIG,
        data=AnswerRows(VerifiableTasks((("addition", 1),)), sequence_length=48, batch_size=4),
        objective=NextToken(),
        optimizer=Optimizer("sgd", Schedule(1e-3, "constant", 0)),
        run_config=RunConfig(steps=1, loggers=("jsonl",)),
        initial="load",
        reads=("load",),
    )
    said = run(tmp_path / "run", LoadWeights("load", str(folder), CONFIG), tune)
    assert any("Llama Materials (LICENSE is that of Llama 4)" in line for line in said)
    for place in (tmp_path / "run" / "tune", tmp_path / "run"):
        assert main(["convert", str(place), str(tmp_path / "mine")]) == 2
        assert "begin with 'Llama'" in capsys.readouterr().err
    target = tmp_path / "Llama-mine"
    assert main(["convert", str(tmp_path / "run"), str(target)]) == 0
    assert (target / "LICENSE").read_text().startswith("LLAMA 4") and (target / "Notice").exists()
    assert jaxherd.load(target).config == CONFIG
