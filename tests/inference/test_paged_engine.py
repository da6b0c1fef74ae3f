"""The engine against the generator, request by request, under mixed load."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference import steps
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.paged_engine import PagedEngine
from jaxherd.inference.sampling import Sampling
from jaxherd.layers.attention import AttentionConfig
from jaxherd.layers.feed_forward import FeedForwardConfig
from jaxherd.models import presets
from jaxherd.models.decoder import DecoderConfig, LayerConfig

VOCAB = 300


def scout() -> DecoderConfig:
    """Chunked and NoPE layers of routed experts, as of Scout."""
    return presets.llama4_text(
        vocab_size=VOCAB, embed_dim=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
        num_experts=3, expert_dim=8, nope_interval=2, chunk_size=12, init_std=0.3, max_length=128,
    )  # fmt: skip


def dense() -> DecoderConfig:
    """Full and sliding layers, a block used twice, tied scores."""
    full = AttentionConfig(2, 1, 8)
    sliding = dataclasses.replace(full, kind="sliding_window", size=5)
    layers = tuple(LayerConfig(a, FeedForwardConfig(16)) for a in (full, full, sliding))
    return DecoderConfig(
        VOCAB, 16, layers, tie_embeddings=True, max_length=128, init_std=0.3, repeats=2
    )


MODELS = {"scout": scout, "dense": dense}


@pytest.fixture(scope="module", params=MODELS)
def module(request):
    return MODELS[request.param]().build(jax.random.key(0))


def engine_of(module, **options) -> PagedEngine:
    """Of the same shapes where a test allows it, since compiling is what takes time."""
    given = dict(
        slots=3, page_size=8, prefill_chunk=32, prefill_rows=2, decode_steps=3, cache_tokens=112,
        prepare=False,
    )  # fmt: skip
    return PagedEngine(module, **(given | options))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.RandomState(seed).randint(0, 256, length).tolist())


def mixed() -> list[Request]:
    """Short and long prompts, some that begin alike, some drawn at random."""
    common = prompt(33, seed=99)
    tokens = [
        prompt(3, 1), common, prompt(20, 2), (*common, *prompt(5, 3)), prompt(1, 4),
        (*common[:24], *prompt(9, 5)), prompt(40, 6), common, (*common, 7),
    ]  # fmt: skip
    counts = itertools.cycle([9, 14, 5, 21, 1])
    ways = itertools.cycle([Sampling(), Sampling(), Sampling(0.9, top_p=0.8)])
    return [
        Request(t, count, way, seed=i)
        for i, (t, count, way) in enumerate(zip(tokens, counts, ways))
    ]


@pytest.fixture(scope="module")
def wanted(module):
    generator = Generator(module, prefill_chunk=64, decode_steps=16, prepare=False)
    return [result.tokens for result in generator.run(mixed())]


def drive(engine, numbers, cancel=()) -> dict[int, list[int]]:
    """Step until idle, checking the books each time; `cancel` maps a step to a request."""
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    cancel = dict(cancel)
    for step in itertools.count():
        if engine.idle:
            return tokens
        for event in engine.step():
            tokens[event.id] += event.tokens
            assert event.result is None or event.result.tokens == tokens[event.id]
        if step in cancel:
            engine.cancel(cancel[step])
        engine.check()


@pytest.mark.parametrize("reuse", [True, False])
def test_mixed_load_equals_the_generator(module, wanted, reuse):
    engine = engine_of(module, reuse_prefixes=reuse)
    numbers = [engine.add(request) for request in mixed()]
    tokens = drive(engine, numbers)
    assert [tokens[number] for number in numbers] == wanted
    counters = engine.counters()
    assert counters.finished == len(wanted) and counters.new_tokens == sum(map(len, wanted))
    prompts = sum(len(request.tokens) for request in mixed())
    assert counters.prompt_tokens + counters.reused_tokens == prompts
    assert (counters.reused_tokens > 0) == reuse == any(counters.pages_cached.values())
    assert not any(counters.pages_held.values()) and counters.running == counters.waiting == 0


def test_late_arrivals_and_cancels(module, wanted):
    """Requests that come one by one into a cache that holds two of them, and some that leave."""
    engine = engine_of(module)
    requests, tokens, numbers = mixed(), {}, []
    gone = {2: "running", 5: "waiting"}
    for i, request in enumerate(requests):
        numbers.append(engine.add(request))
        tokens[numbers[-1]] = []
        for event in engine.step():
            tokens[event.id] += event.tokens
        engine.check()
        if i in gone:
            victim = engine.add(Request(prompt(30, seed=50 + i), 60))
            tokens[victim] = []
            if gone[i] == "running":
                for _ in range(40):
                    for event in engine.step():
                        tokens[event.id] += event.tokens
                    if tokens[victim]:
                        break
                assert len(tokens[victim]) > 0
            before = engine.counters().pages_held
            result = engine.cancel(victim)
            assert result is not None and result.reason == "cancelled"
            assert result.tokens == tokens[victim]
            if gone[i] == "running":
                held = engine.counters().pages_held
                assert all(held[name] < before[name] for name in held), "its pages return at once"
            assert engine.cancel(victim) is None
            engine.check()
    while not engine.idle:
        for event in engine.step():
            tokens[event.id] += event.tokens
        engine.check()
    assert [tokens[number] for number in numbers] == wanted
    assert engine.counters().cancelled == 2
    assert not any(engine.counters().pages_held.values())


def test_a_second_round_reuses_what_the_first_left(module):
    engine = engine_of(module)
    request = Request(prompt(41, 8), 6)
    first = engine.run([request])
    computed = engine.counters().prompt_tokens
    assert engine.run([request]) == first
    assert engine.counters().reused_tokens == 40
    number = engine.add(request)
    with pytest.raises(JaxherdError, match="serves other requests"):
        engine.run([request])
    assert engine.cancel(number) is not None and engine.idle
    assert engine.counters().prompt_tokens == computed + 1


def test_equal_prompts_that_come_together_are_computed_once(module):
    engine = engine_of(module)
    tokens = prompt(41, 8)
    results = engine.run([Request(tokens, 6, Sampling(1.0), seed=i) for i in range(3)])
    assert engine.counters().prompt_tokens == 41 + 1 + 1
    assert len({tuple(result.tokens) for result in results}) == 3
    alone = engine_of(module, reuse_prefixes=False).run([Request(tokens, 6, Sampling(1.0), seed=1)])
    assert results[1] == alone[0]


def test_seeds_do_not_see_the_batch(module):
    request = Request(prompt(6), 12, Sampling(1.5), seed=1)
    alone = engine_of(module).run([request])[0].tokens
    others = [Request(prompt(9, i), 10, Sampling(2.0), seed=i) for i in range(4)]
    assert engine_of(module).run([*others, request, *others])[4].tokens == alone
    other = dataclasses.replace(request, seed=2)
    assert engine_of(module).run([other])[0].tokens != alone
    assert engine_of(module, key=jax.random.key(7)).run([request])[0].tokens != alone


def test_each_program_is_compiled_once_a_bucket():
    # A config of its own, so that nothing is compiled for it yet.
    module = dataclasses.replace(dense(), norm_eps=2e-5).build(jax.random.key(0))
    engine = engine_of(module, slots=5, cache_tokens=640, reuse_prefixes=False)
    before = dict(steps.traces)

    def counts():
        return {name: steps.traces[name] - before[name] for name in before}

    engine.run([Request(prompt(n, n), 4 + n) for n in (3, 9, 16)])
    # Two short prompts together and one alone; decoding of five slots, and of the last one alone.
    assert counts() == {"prefill": 2, "start": 2, "decode": 2}
    engine.run([Request(prompt(n, n), 11) for n in (2, 7, 13, 5, 1, 1, 4)])
    assert counts() == {"prefill": 2, "start": 2, "decode": 2}
    # A first piece of 32 tokens and a later one, which reads pages.
    engine.run([Request(prompt(50, 1), 4)])
    assert counts() == {"prefill": 4, "start": 2, "decode": 2}
    engine.run([Request(prompt(n, n), 5) for n in (49, 60, 17, 3)])
    assert counts() == {"prefill": 4, "start": 2, "decode": 2}


def test_the_kernel_inside_the_engine():
    """Interpreted: heads of 64 fill the lanes that the kernel asks for."""
    config = presets.llama4_text(
        vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        num_experts=2, expert_dim=8, nope_interval=2, chunk_size=12, init_std=0.3, max_length=64,
    )  # fmt: skip
    module = config.build(jax.random.key(2))
    requests = [Request(prompt(5, 1), 6), Request(prompt(11, 2), 9)]
    wanted = [r.tokens for r in Generator(module, prepare=False).run(requests)]
    engine = engine_of(
        module, slots=2, cache_tokens=64, paged_implementation="pallas_tpu", interpret=True
    )
    assert [result.tokens for result in engine.run(requests)] == wanted
    with pytest.raises(JaxherdError, match="pages of 6 float32 tokens are no multiple of 8"):
        engine_of(module, page_size=6, paged_implementation="pallas_tpu").run(requests[:1])


def test_int8_pages_are_near(module, wanted):
    """Codes of eight bits move logits a little, so that only most greedy tokens stay."""
    greedy = [(r, w) for r, w in zip(mixed(), wanted) if r.sampling.temperature == 0]
    engine = engine_of(module, cache_dtype="int8")
    found = [result.tokens for result in engine.run([request for request, _ in greedy])]
    pairs = [p for tokens, (_, want) in zip(found, greedy) for p in zip(tokens, want)]
    same = np.mean([a == b for a, b in pairs])
    assert 0.6 < same < 1.0, "near, and told apart"


def test_stops(module):
    request = Request(prompt(6), 20)
    tokens = engine_of(module).run([request])[0].tokens
    stop = tokens[7]
    stopping = engine_of(module, stop_ids=[stop])
    result = stopping.run([request])[0]
    assert result.tokens == tokens[: tokens.index(stop) + 1] and result.reason == "stop"
    stopping.check()
    first = engine_of(module, stop_ids=[tokens[0]]).run([request])[0]
    assert (first.tokens, first.reason) == (tokens[:1], "stop")


def test_text_and_stop_strings(module):
    class Letters(ByteTokenizer):
        def id_bytes(self, token_id):
            return bytes([97 + token_id % 26, 97 + token_id // 26])

    options = dict(tokenizer=Letters(), stop_ids=())
    request = Request(prompt(6), 20)
    text = engine_of(module, **options).run([request])[0].text
    assert text is not None and len(text) == 40
    stop = text[13:18]
    engine = engine_of(module, **options)
    number = engine.add(dataclasses.replace(request, stop_strings=(stop,)))
    shown, results = "", []
    while not engine.idle:
        for event in engine.step():
            assert event.id == number
            shown += event.text
            results.append(event.result)
        engine.check()
    assert shown == results[-1].text == text[: text.find(stop)]
    assert results[-1].reason == "stop" and len(results[-1].tokens) < 20


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request((), 3), "empty"),
        (Request((1, VOCAB), 3), "outside the vocabulary"),
        (Request((1,), 0), "max_new_tokens"),
        (Request((1,) * 120, 20), "120 tokens and 20 new ones.*128"),
        (Request((1,) * 60, 6), "65 tokens needs 9 pages of 8 and the cache has 8"),
        (Request((1,), 3, stop_strings=("a",)), "tokenizer"),
    ],
)
def test_requests_that_can_never_be_served(module, request_, message):
    engine, before = engine_of(module, cache_tokens=64), dict(steps.traces)
    with pytest.raises(JaxherdError, match=message):
        engine.add(request_)
    assert engine.idle and steps.traces == before


def test_engines_that_cannot_be():
    module = dense().build(jax.random.key(0))
    for name in ("slots", "page_size", "cache_tokens", "max_length", "decode_steps"):
        with pytest.raises(JaxherdError, match=f"{name} must be at least 1"):
            engine_of(module, **{name: 0})
    attention = AttentionConfig(2, 1, 8, kind="bidirectional")
    config = dataclasses.replace(
        dense(), layers=(LayerConfig(attention, FeedForwardConfig(16)),), repeats=1
    )
    with pytest.raises(JaxherdError, match="bidirectional layer has no cache"):
        engine_of(config.build(jax.random.key(0)))
