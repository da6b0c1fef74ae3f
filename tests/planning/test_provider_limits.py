import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.models import presets
from jaxherd.planning import provider_limits
from jaxherd.planning.provider_limits import (
    ARCHITECTURE,
    PROVIDER_LIMITS,
    cache_bytes,
    check_context,
)


def test_every_limit_has_a_source_and_is_within_the_architecture():
    for limit in PROVIDER_LIMITS:
        assert limit.source and 4_000 <= limit.tokens <= ARCHITECTURE[limit.model], limit
        assert limit.date is None or limit.date.startswith("2025-04")
    assert len(set(PROVIDER_LIMITS)) == len(PROVIDER_LIMITS)


@pytest.mark.parametrize(
    "provider, model, kind, hardware, tokens",
    [
        ("Groq", "scout", "context", None, [128_000]),
        ("Together", "scout", "context", None, [328_000]),
        ("vLLM", "scout", "context", "8 x H100", [1_000_000]),
        ("vLLM", "maverick", "context", "8 x H100", [430_000]),
        ("vLLM", "scout", "context", "8 x H200", [3_600_000]),
        ("Oracle OCI", "maverick", "context", None, [512_000, 512_000]),
        ("Oracle OCI", "maverick", "response", None, [4_000]),
        ("Vercel AI gateway", "scout", "context", None, [131_100]),
        ("Amazon Bedrock", "maverick", "response", None, [8_000]),
        ("Amazon Bedrock", "scout", "context", None, [3_500_000, 10_000_000]),
    ],
)
def test_limits_of_the_spec(provider, model, kind, hardware, tokens):
    found = [
        limit.tokens
        for limit in PROVIDER_LIMITS
        if (limit.provider, limit.model, limit.kind, limit.hardware)
        == (provider, model, kind, hardware)
    ]
    assert found == tokens


@pytest.mark.parametrize(
    "tokens, full, aware",
    [(131_072, 25.8e9, 7.65e9), (1_048_576, 206e9, 52.7e9), (10_485_760, 2062e9, 517e9)],
)
def test_cache_of_the_spec(tokens, full, aware):
    assert cache_bytes(tokens, chunk_aware=False) == pytest.approx(full, rel=3e-3)
    assert cache_bytes(tokens) == pytest.approx(aware, rel=3e-3)
    assert cache_bytes(100) == cache_bytes(100, chunk_aware=False) == 48 * 100 * 4096


def test_the_layers_are_those_of_the_presets():
    for build in (presets.llama4_scout, presets.llama4_maverick):
        attentions = [layer.attention for layer in build().layers]
        chunked = [a for a in attentions if a.kind == "chunked"]
        assert len(chunked) == provider_limits._CHUNKED_LAYERS
        assert len(attentions) - len(chunked) == provider_limits._FULL_LAYERS
        assert {a.size for a in chunked} == {provider_limits._CHUNK}
        numbers = {2 * a.num_kv_heads * a.head_dim for a in attentions}
        assert numbers == {provider_limits._NUMBERS_PER_TOKEN}


def test_lengths_that_do_not_fit():
    assert check_context("scout", 131_072, 8 * 10**9) == cache_bytes(131_072)
    with pytest.raises(JaxherdError, match=r"takes 7.65 GB of 7.00: (\d+) tokens fit") as caught:
        check_context("scout", 131_072, 7 * 10**9)
    fits = int(str(caught.value).split(": ")[1].split()[0])
    assert cache_bytes(fits) <= 7 * 10**9 < cache_bytes(fits + 1)
    with pytest.raises(JaxherdError, match="more than the 1048576 of maverick"):
        check_context("maverick", 1_048_577, 10**15)
