"""The three methods that lm-evaluation-harness asks for, without the harness; and with it, where it is."""

import json
import sys

import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError, MissingExtraError
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.methods import local_tasks
from jaxherd.methods.lm_eval_adapter import TextModel, require_harness, run_tasks
from jaxherd.methods.response_cache import ResponseCache, model_fingerprint
from tests.methods.tiny_policy import log_probs, policy


class Words(ByteTokenizer):
    stop_ids = ()
    chat_template = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}"


WORDS = Words()


def by_hand(context, text):
    before, whole = WORDS.encode(context, add_bos=True), WORDS.encode(context + text, add_bos=True)
    table = log_probs(whole)
    return sum(table[i - 1, whole[i]] for i in range(len(before), len(whole)))


@pytest.fixture(scope="module")
def model():
    return TextModel(policy(), WORDS, rows=4, stop_ids=())


def test_likelihoods_equal_a_plain_forward(model):
    pairs = [("The sky is", " blue"), ("a", "b"), ("x" * 30, "yes"), ("2 + 2 =", " 4")]
    found = model.loglikelihood(pairs)
    for (context, text), (log_prob, greedy) in zip(pairs, found):
        assert log_prob == pytest.approx(by_hand(context, text), abs=1e-4)
        assert isinstance(greedy, bool)


def test_spaces_before_a_continuation_belong_to_it(model):
    """As the harness's own models have it."""
    [found] = model.loglikelihood([("The sky is ", "blue")])
    assert found[0] == pytest.approx(by_hand("The sky is", " blue"), abs=1e-4)
    [empty], [blank] = model.loglikelihood([("", "blue")]), model.loglikelihood([(" ", "blue")])
    assert empty[0] == pytest.approx(by_hand("", "blue"), abs=1e-4)
    assert blank[0] == pytest.approx(by_hand("", " blue"), abs=1e-4)


def test_a_long_context_loses_its_beginning(model):
    context = "".join(chr(97 + n % 26) for n in range(200))
    [found] = model.loglikelihood([(context, "end")])
    tokens = WORDS.encode(context + "end")[-64:]
    table = log_probs(tokens)
    assert found[0] == pytest.approx(sum(table[i - 1, tokens[i]] for i in range(61, 64)), abs=1e-4)
    with pytest.raises(JaxherdError, match="shorten it"):
        model.loglikelihood([("a", "b" * 64)])
    with pytest.raises(JaxherdError, match="is empty"):
        model.loglikelihood([("a", "")])


def test_rolling(model):
    short, long = "a text that fits", "and one that does not fit. " * 5
    found = model.loglikelihood_rolling([short, long, ""])
    tokens = [WORDS.bos_id, *WORDS.encode(short)]
    table = log_probs(tokens)
    assert found[0] == pytest.approx(
        sum(table[i - 1, tokens[i]] for i in range(1, len(tokens))), abs=1e-4
    )
    assert found[1] < found[0] and found[2] == 0.0


def greedy(context, count):
    tokens = WORDS.encode(context, add_bos=True)
    for _ in range(count):
        tokens.append(int(log_probs(tokens)[-1].argmax()))
    return WORDS.decode(tokens[-count:])


def test_generation_with_stop_strings(model):
    asked = [("once", {"until": [], "max_gen_toks": 12}), ("upon", {"max_gen_toks": 12})]
    wanted = [greedy(context, 12) for context, _ in asked]
    assert model.generate_until(asked) == wanted
    stop = wanted[0][5:7]
    cut = model.generate_until([("once", {"until": stop, "max_gen_toks": 12, "do_sample": False})])
    assert cut == [wanted[0][: wanted[0].index(stop)]]
    for options, told in [({"beams": 3}, "'beams'"), ({"max_gen_toks": 64}, "64 new tokens")]:
        with pytest.raises(JaxherdError, match=told):
            model.generate_until([("once", options)])


def test_answers_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "kept" / "answers.jsonl"
    pairs = [("a", "b"), ("c", "d"), ("a", "b")]
    first = TextModel(policy(), WORDS, cache=path, stop_ids=()).loglikelihood(pairs)
    assert len(path.read_text().splitlines()) == 2, "asked twice, answered once"
    path.write_bytes(path.read_bytes() + b'{"key": "half a li')
    again = TextModel(policy(), WORDS, cache=path, stop_ids=())
    monkeypatch.setattr("jaxherd.methods.scoring._score", None)
    assert again.loglikelihood(pairs) == first
    # Another model, or another tokenizer's settings, are other answers.
    other = TextModel(policy(1), WORDS, cache=path, stop_ids=())
    with pytest.raises(TypeError):
        other.loglikelihood(pairs)
    path.write_text("no json\n")
    with pytest.raises(JaxherdError, match="line 1"):
        ResponseCache(path, "m")


def test_fingerprints_tell_models_apart():
    assert (
        model_fingerprint(policy()) == model_fingerprint(policy()) != model_fingerprint(policy(1))
    )


def test_chats(model):
    chatting = TextModel(policy(), WORDS, stop_ids=())
    text = chatting.apply_chat_template([{"role": "user", "content": "Hi <|eos|>"}])
    assert text.startswith("<|bos|>Hi") and text.endswith("<|eos|>")
    assert chatting._encode("<|bos|>Hi<|eos|>") == [257, 72, 105, 258]
    assert model._encode("<|bos|>")[1:] == list(b"<|bos|>")
    assert chatting.tokenizer_name == WORDS.fingerprint()


def test_without_the_harness_it_says_so(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"jaxherd\[eval\]"):
        run_tasks(model, ["local_addition"])


def test_local_tasks_have_their_data(tmp_path):
    folder = local_tasks.write_tasks(tmp_path / "tasks")
    for name in local_tasks.TASKS:
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert (
            len(lines) >= 10
            and str(folder / f"{name}.jsonl") in (folder / f"{name}.yaml").read_text()
        )
        assert local_tasks.documents(name) == [json.loads(line) for line in lines]
    for one in local_tasks.documents("local_addition"):
        a, b = map(int, one["question"].removesuffix(" =").split(" + "))
        assert one["choices"][one["answer"]] == str(a + b) and len(set(one["choices"])) == 4
    with pytest.raises(JaxherdError, match="no local task"):
        local_tasks.write_tasks(tmp_path, ["addition"])


@pytest.mark.harness
def test_the_harness_runs_real_tasks(tmp_path):
    """All three kinds of request, offline, through `simple_evaluate`."""
    pytest.importorskip("lm_eval")
    require_harness()
    folder = local_tasks.write_tasks(tmp_path / "tasks")
    model = TextModel(policy(), WORDS, rows=4, stop_ids=(), cache=tmp_path / "cache.jsonl")
    found = run_tasks(model, local_tasks.TASKS, include=[folder], limit=4)
    results = found["results"]
    assert 0 <= results["local_addition"]["acc,none"] <= 1
    # By hand: the sum that the task defines, over its own documents.
    texts = [d["text"] for d in local_tasks.documents("local_reference")[:4]]
    nats = -sum(model.loglikelihood_rolling(texts))
    size = sum(len(text.encode()) for text in texts)
    assert results["local_reference"]["bits_per_byte,none"] == pytest.approx(
        nats / np.log(2) / size
    )
    assert results["local_copy"]["exact_match,strip"] == 0.0
    right = 0
    for one in local_tasks.documents("local_addition")[:4]:
        scores = [model.loglikelihood([(one["question"], f" {c}")])[0][0] for c in one["choices"]]
        right += int(np.argmax(scores)) == one["answer"]
    assert results["local_addition"]["acc,none"] == right / 4
    with pytest.raises(JaxherdError, match="did you mean 'local_addition'"):
        run_tasks(model, ["local_adition"], include=[folder])
