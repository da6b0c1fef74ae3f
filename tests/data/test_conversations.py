"""Rows of prompts and answers: what counts, how they are packed, and exact positions."""

import dataclasses

import numpy as np
import pytest

from jaxherd.core import batch as batch_lib
from jaxherd.core.errors import JaxherdError
from jaxherd.data.conversations import AnswerRows, PreferencePairs, next_fit
from jaxherd.data.examples import Example
from jaxherd.data.prompt_format import PromptFormat
from jaxherd.data.tokenizers import ByteTokenizer
from tests.data.test_chat import TEMPLATE


@dataclasses.dataclass(frozen=True)
class Sums:
    """Additions of different lengths; every fifth is held out."""

    count: int = 40
    rejected: bool = False

    def examples(self, split, folder=None):
        wanted = [n for n in range(self.count) if (n % 5 == 0) == (split == "heldout")]
        return [
            Example(
                f"{n}+{10 ** (n % 4)}=",
                str(n + 10 ** (n % 4)),
                "no" * (1 + n % 3) if self.rejected else None,
                float(n % 4),
            )
            for n in wanted
        ]


def text_of(row, weights=None):
    ids = row["targets"] if weights is None else row["targets"][weights > 0]
    return ByteTokenizer().decode(ids.tolist(), skip_special=False)


def segments(batch):
    """Yield every document of a batch as its own row."""
    for r in range(len(batch["tokens"])):
        for s in range(1, batch["segment_ids"][r].max() + 1):
            inside = batch["segment_ids"][r] == s
            yield {name: value[r][inside] for name, value in batch.items()}


@pytest.mark.parametrize("packing", ["none", "first_fit"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answers_alone_count(packing, split):
    data = AnswerRows(Sums(), sequence_length=48, batch_size=4, packing=packing)
    rows = data.build(split=split, seed=0)
    batch = next(rows)
    rows.close()
    batch_lib.check(batch, data.batch_spec(split))
    found = list(segments(batch))
    assert len(found) >= 4 if packing == "none" else len(found) > 4
    for row in found:
        prompt, answer = ByteTokenizer().decode(row["tokens"].tolist()).split("=")
        assert row["tokens"][0] == 257 and row["tokens"][-1] == 258
        assert answer == str(eval(prompt))
        assert text_of(row, row["loss_weights"]) == answer + "<|eos|>"
        assert row["positions"].tolist() == list(range(len(row["tokens"])))
        assert row["target_bytes"][row["loss_weights"] > 0].sum() == len(answer)
    learned = dataclasses.replace(data, learn_prompts=True).build(split=split, seed=0)
    for row in segments(next(learned)):
        assert row["loss_weights"].tolist() == [1.0] * (len(row["tokens"]) - 1) + [0.0]
    learned.close()
    assert "=⟦" in data.preview(batch) and "<|eos|>⟧" in data.preview(batch)


def test_an_evaluation_shows_every_example_once():
    data = AnswerRows(Sums(), sequence_length=32, batch_size=3, packing="first_fit")
    rows = data.build(split="heldout", seed=0)
    shown = [text_of(row, row["loss_weights"]) for batch in rows for row in segments(batch)]
    assert sorted(shown) == sorted(e.answer + "<|eos|>" for e in Sums().examples("heldout"))
    assert next_fit([3, 3, 4, 10, 1], 10) == [[0, 1, 2], [3], [4]]


def test_the_hardest_of_the_training_examples():
    data = AnswerRows(
        Sums(), sequence_length=16, batch_size=16, packing="none", keep_hardest=0.5, shuffle=False
    )
    rows = data.build(split="train", seed=0)
    shown = [text_of(row, row["loss_weights"]) for row in segments(next(rows))]
    examples = Sums().examples("train")
    wanted = sorted(sorted(range(32), key=lambda n: -(examples[n].difficulty or 0))[:16])
    assert shown == [examples[n].answer + "<|eos|>" for n in wanted]
    assert rows.describe()["filtered_out"] == 16
    rows.close()


def test_pairs_stand_together():
    data = PreferencePairs(Sums(rejected=True), sequence_length=16, batch_size=6)
    rows = data.build(split="train", seed=0)
    batch = next(rows)
    rows.close()
    batch_lib.check(batch, data.batch_spec())
    for better, worse in zip(*(list(segments(batch))[side::2] for side in (0, 1))):
        prompt = text_of(better).split("=")[0]
        assert text_of(worse).split("=")[0] == prompt
        assert text_of(better, better["loss_weights"]) == f"{eval(prompt)}<|eos|>"
        assert set(text_of(worse, worse["loss_weights"]).removesuffix("<|eos|>")) == {"n", "o"}


@pytest.mark.parametrize("kind", ["packed", "alone", "pairs"])
def test_positions_are_exact(kind):
    if kind == "pairs":
        data = PreferencePairs(Sums(rejected=True), sequence_length=24, batch_size=4)
    else:
        packing = "none" if kind == "alone" else "first_fit"
        data = AnswerRows(Sums(), sequence_length=24, batch_size=4, packing=packing)
    rows = data.build(split="train", seed=3)
    batches = [next(rows) for _ in range(4)]
    state = rows.get_state()
    wanted = [next(rows)["tokens"] for _ in range(12)]  # into the next epoch
    rows.close()
    again = data.build(split="train", seed=3)
    again.set_state(state)
    for expected in wanted:
        np.testing.assert_array_equal(next(again)["tokens"], expected)
    again.close()
    other = data.build(split="train", seed=4)
    with pytest.raises(JaxherdError, match="belongs to other data"):
        other.set_state(state)
    other.close()
    two = [data.build(split="train", seed=3, process_index=i, process_count=2) for i in range(2)]
    parts = [next(one)["tokens"] for one in two]
    np.testing.assert_array_equal(np.concatenate(parts), batches[0]["tokens"])
    for one in two:
        one.close()


def test_what_does_not_fit_is_left_out_and_told():
    data = AnswerRows(Sums(), sequence_length=8, batch_size=2, packing="none")
    rows = data.build(split="train", seed=0)
    (note,) = rows.describe()["notes"]
    assert "of 32 examples have more than 8 tokens" in note
    rows.close()
    with pytest.raises(JaxherdError, match="No example of 'Sums' fits into 4 tokens"):
        dataclasses.replace(data, sequence_length=4).build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="no rejected answer"):
        PreferencePairs(Sums(), sequence_length=16).build(split="train", seed=0)
    with pytest.raises(JaxherdError, match="batch_size=5 must be even"):
        PreferencePairs(Sums(), batch_size=5)
    with pytest.raises(JaxherdError, match="'heldout' split of 'Sums' has no examples"):
        AnswerRows(Sums(count=0)).build(split="heldout", seed=0)


def test_chat_answers_end_with_the_template_s_stop_token():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    form = PromptFormat("chat", system="Be brief.")
    prompt = [{"role": "user", "content": "Hi"}]
    assert form.prompt_ids(tokenizer, "Hi") == form.prompt_ids(tokenizer, prompt)
    ids = form.answer_ids(tokenizer, "Hi", "Ho<|eos|>!")
    # A control token's name in an answer is text; the turn ends with the template's own.
    assert ids.count(258) == 1 and ids[-1] == 258
    assert tokenizer.decode(ids) == "Ho<|eos|>!"
    whole = tokenizer.decode([*form.prompt_ids(tokenizer, "Hi"), *ids], skip_special=False)
    assert whole == (
        "<|bos|>system:Be brief.<|eos|>\n<|bos|>user:Hi<|eos|>\n<|bos|>assistant:Ho<|eos|>!<|eos|>"
    )


def test_templates_that_teach_nothing_are_refused():
    tokenizer = ByteTokenizer()
    form = PromptFormat("chat")
    with pytest.raises(JaxherdError, match="no chat template"):
        form.answer_ids(tokenizer, "Hi", "Ho")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(JaxherdError, match="holds no stop token"):
        form.answer_ids(tokenizer, "Hi", "Ho")
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}<|eos|>"
    with pytest.raises(JaxherdError, match="otherwise once they are answered"):
        form.answer_ids(tokenizer, "Hi", "Ho")
    with pytest.raises(JaxherdError, match="kind='chat'"):
        PromptFormat().prompt_ids(ByteTokenizer(), [{"role": "user", "content": "Hi"}])
