import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.packed_text import Bytes, PackedText, TokenizerFile
from jaxherd.data.retrieval import RetrievalText, replace_length


@pytest.fixture
def data(cache, text_folder) -> RetrievalText:
    text = PackedText(
        corpus=str(text_folder),
        tokenizer_config=Bytes(),
        sequence_length=96,
        batch_size=8,
        max_eval_batches=2,
        heldout_fraction=0.4,
        add_bos=False,
        add_eos=False,
    )
    return RetrievalText(text, pairs=5, keys=16, values=16)


def take(data, count=4, split="train", seed=0, **place):
    batches = data.build(split=split, seed=seed, **place)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_rows_are_text_with_answerable_pairs(data):
    kinds = set()
    for batch in take(data, 6):
        batch_lib.check(batch, data.batch_spec())
        tokens, targets, weights = batch["tokens"], batch["targets"], batch["loss_weights"]
        assert (tokens[:, 1:] == targets[:, :-1]).all()
        for row in range(len(tokens)):
            ids = [*tokens[row], targets[row, -1]]
            memory = {}
            for place in range(len(ids) - 1):
                token, following = ids[place], ids[place + 1]
                is_key = data.first_key <= token < data.first_value
                assert is_key == (following >= data.first_value)
                if is_key:
                    assert weights[row, place] == (token in memory)
                    assert memory.setdefault(token, following) == following
                elif data.first_key <= following < data.first_value:
                    assert weights[row, place] == 0
                else:
                    assert weights[row, place] == 1
            kinds.add(len(memory))
            # Text without the symbols is a stretch of a document.
            assert batch["target_bytes"][row].sum() == sum(t < 256 for t in ids[1:])
    assert kinds == {0, data.pairs}


def test_fused_symbols_are_asked_for_by_their_key(data):
    data = dataclasses.replace(data, planting="fused", plain_share=0.0)
    for batch in take(data, 4):
        batch_lib.check(batch, data.batch_spec())
        for tokens, targets, weights in zip(
            batch["tokens"], batch["targets"], batch["loss_weights"]
        ):
            seen = {int(tokens[0])}
            for token, following, weight in zip(tokens, targets, weights):
                if following >= data.first_value:
                    key = (following - data.first_value) // data.values
                    # A question comes before each symbol that came already, and only there.
                    assert (token == data.first_key + key) == (following in seen)
                    assert weight == (following in seen)
                else:
                    assert weight == (following < data.first_key)
                seen.add(int(following))
    for row, place, planted in data.answers(batch):
        assert batch["targets"][row, place] == batch["tokens"][row, planted]
        assert planted < place
    assert len(data.answers(batch)) > 0


@pytest.mark.parametrize("planting", ["pair", "fused"])
def test_answers_find_every_asked_value(data, planting):
    data = dataclasses.replace(data, planting=planting)
    asked = replace_length(data, 64, plain_share=0.0, end_share=1.0)
    batch = take(asked, 1)[0]
    answers = asked.answers(batch)
    assert len(answers) == 8 * data.pairs
    for row, place, planted in answers:
        after = data.plant_size - 1
        assert batch["targets"][row, place] == batch["tokens"][row, planted + after]
        assert planted < 64 - 2 * data.pairs <= place + 1
    spread = dataclasses.replace(data, plain_share=0.0, end_share=0.0)
    answers = spread.answers(take(spread, 1)[0])
    assert len(answers) == 8 * data.pairs * (data.occurrences - 1)
    plain = dataclasses.replace(data, plain_share=1.0)
    assert len(plain.answers(take(plain, 1)[0])) == 0


def test_seed_position_and_processes_decide_a_row(data):
    first = take(data, 3)
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(first, take(data, 3)))
    assert (first[0]["tokens"] != take(data, 1, seed=1)[0]["tokens"]).any()
    assert (first[0]["tokens"] != first[1]["tokens"]).any()
    halves = [take(data, 3, process_index=i, process_count=2) for i in range(2)]
    for whole, *parts in zip(first, *halves):
        assert (whole["tokens"] == np.concatenate([p["tokens"] for p in parts])).all()


def test_position_is_restored_exactly(data):
    batches = data.build(split="train", seed=3)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches)["tokens"] for _ in range(2)]
    batches.close()
    again = data.build(split="train", seed=3)
    again.set_state(state)
    assert all((next(again)["tokens"] == w).all() for w in wanted)
    again.close()
    other = dataclasses.replace(data, pairs=4).build(split="train", seed=3)
    with pytest.raises(JaxherdError, match="other data"):
        other.set_state(state)
    other.close()


def test_evaluation_is_one_fixed_pass(data):
    passes = []
    for seed in (0, 1):
        batches = data.build(split="heldout", seed=seed)
        passes.append([batch["tokens"] for batch in batches])
        assert len(batches) == len(passes[-1]) == 2
        batches.close()
    assert all((a == b).all() for a, b in zip(*passes))


@settings(max_examples=20, deadline=None)
@given(pairs=st.integers(1, 6), length=st.integers(40, 200), share=st.floats(0, 1))
def test_shapes_for_any_setting(text_folder, pairs, length, share):
    text = PackedText(
        corpus=str(text_folder), tokenizer_config=Bytes(), sequence_length=length, batch_size=2
    )
    data = RetrievalText(text, pairs=pairs, end_share=share, keys=8, values=1)
    for batch in take(data, 1):
        batch_lib.check(batch, data.batch_spec())
        assert batch["tokens"].max() < data.vocab_size


def test_bad_settings_are_refused(data):
    for change, message in [
        ({"pairs": 17}, "keys=16"),
        ({"occurrences": 1}, "come twice"),
        ({"plain_share": 1.5}, "plain_share"),
        ({"pairs": 16, "occurrences": 3}, "leave no text"),
    ]:
        with pytest.raises(JaxherdError, match=message):
            dataclasses.replace(data, **change)
    with pytest.raises(JaxherdError, match="vocab_size"):
        undeclared = dataclasses.replace(data.text, tokenizer_config=TokenizerFile("none.json"))
        dataclasses.replace(data, text=undeclared)
    with pytest.raises(JaxherdError, match="longest has"):
        replace_length(data, 100_000).build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="max_eval_batches"):
        replace_length(data, 96, max_eval_batches=None).build(split="heldout", seed=0)
    with pytest.raises(JaxherdError, match="did you mean 'heldout'"):
        data.build(split="heldot", seed=0)
