"""How much context Llama 4 is served with, and what a length costs in cache (llama4.md 9, 2.7).

The architecture reaches further than anybody serves it; the table holds limits as third parties
wrote them down, each with its source.  They drift: nothing in jaxherd depends on them.
"""

import dataclasses
from typing import Literal

from jaxherd.core.errors import JaxherdError

Model = Literal["scout", "maverick"]

# What the instruct models' configs allow (llama4.md 1).
ARCHITECTURE: dict[str, int] = {"scout": 10_485_760, "maverick": 1_048_576}


@dataclasses.dataclass(frozen=True)
class ProviderLimit:
    """One limit as a source gives it.

    Attributes:
      provider: who serves, or whose software.
      model: "scout" or "maverick".
      written: the limit as the source writes it.
      kind: what it counts: all tokens of a request ("context") or those of the answer.
      source: where it was read.
      date: of the source, "YYYY-MM" or longer; None if the source has none.
      hardware: the limit is that of so much memory.
      precision: of the weights, where the source says.
    """

    provider: str
    model: Model
    written: str
    source: str
    date: str | None = None
    kind: Literal["context", "response"] = "context"
    hardware: str | None = None
    precision: str | None = None

    @property
    def tokens(self) -> int:
        """The limit in tokens; K is read as 1,000 and M as 1,000,000, the smaller readings."""
        number = self.written.removeprefix("~").replace(",", "")
        scale = {"K": 1_000, "M": 1_000_000}.get(number[-1], 1)
        return round(float(number.rstrip("KM")) * scale)


_WILLISON = "Simon Willison, in a reprint of thenewspring.net"
_VLLM = "blog.vllm.ai/2025/04/05/llama4.html"
_LAUNCH = "2025-04"

PROVIDER_LIMITS: tuple[ProviderLimit, ...] = (
    ProviderLimit("Groq", "scout", "128K", _WILLISON, _LAUNCH),
    ProviderLimit("Fireworks", "scout", "128K", _WILLISON, _LAUNCH),
    ProviderLimit("Together", "scout", "328K", _WILLISON, _LAUNCH),
    ProviderLimit("Meta's notebook", "scout", "1.4M", _WILLISON, _LAUNCH, hardware="8 x H100"),
    ProviderLimit("vLLM", "scout", "1M", _VLLM, "2025-04-05", hardware="8 x H100"),
    ProviderLimit(
        "vLLM", "maverick", "~430K", _VLLM, "2025-04-05", hardware="8 x H100", precision="fp8"
    ),
    ProviderLimit("vLLM", "scout", "3.6M", _VLLM, "2025-04-05", hardware="8 x H200"),
    ProviderLimit("vLLM", "maverick", "1M", _VLLM, "2025-04-05", hardware="8 x H200"),
    ProviderLimit("Oracle OCI", "scout", "192K", "mastra.ai, OCI page"),
    ProviderLimit("Oracle OCI", "maverick", "512K", "mastra.ai, OCI page", precision="fp8"),
    ProviderLimit("Oracle OCI", "maverick", "512,000", "a mirror of Oracle's documentation"),
    ProviderLimit(
        "Oracle OCI", "maverick", "4,000", "a mirror of Oracle's documentation", kind="response"
    ),
    ProviderLimit("Meta's Llama API", "scout", "128K", "mastra.ai, llama page"),
    ProviderLimit("Meta's Llama API", "maverick", "128K", "mastra.ai, llama page"),
    ProviderLimit("Vercel AI gateway", "scout", "131.1K", "vercel.com"),
    ProviderLimit("OpenRouter-style listing", "scout", "327,680", "qumge.com"),
    ProviderLimit("Amazon Bedrock", "maverick", "1M", "docs.aws.eu, model card"),
    ProviderLimit("Amazon Bedrock", "maverick", "8K", "docs.aws.eu, model card", kind="response"),
    ProviderLimit("Amazon Bedrock", "scout", "3.5M", "recall, unverified", _LAUNCH),
    ProviderLimit("Amazon Bedrock", "scout", "10M", "braintrust-proxy, issue 557"),
)

# Both models: 48 layers, of which every fourth sees everything and the others their chunk of 8,192
# tokens; 8 heads of 128 for keys and for values (llama4.md 1).
_FULL_LAYERS, _CHUNKED_LAYERS, _CHUNK = 12, 36, 8_192
_NUMBERS_PER_TOKEN = 2 * 8 * 128


def cache_bytes(tokens: int, *, chunk_aware: bool = True, bytes_per_number: int = 2) -> int:
    """Return the bytes of keys and values of one sequence of Scout or Maverick (llama4.md 2.7).

    Args:
      tokens: in the cache.
      chunk_aware: chunked layers keep their chunk alone; else every layer keeps everything.
      bytes_per_number: 2 for bfloat16.
    """
    kept = min(tokens, _CHUNK) if chunk_aware else tokens
    rows = _FULL_LAYERS * tokens + _CHUNKED_LAYERS * kept
    return rows * _NUMBERS_PER_TOKEN * bytes_per_number


def check_context(
    model: Model,
    tokens: int,
    budget_bytes: int,
    *,
    chunk_aware: bool = True,
    bytes_per_number: int = 2,
) -> int:
    """Return the bytes of a sequence's cache.

    Args:
      model: "scout" or "maverick".
      tokens: of the sequence.
      budget_bytes: that the cache may take.
      chunk_aware, bytes_per_number: as of `cache_bytes`.
    Raises:
      JaxherdError: the model's config does not reach so far, or the budget does not.
    """
    if tokens > ARCHITECTURE[model]:
        raise JaxherdError(
            f"{tokens} tokens are more than the {ARCHITECTURE[model]} of {model}: shorten them."
        )

    def needs(length: int) -> int:
        return cache_bytes(length, chunk_aware=chunk_aware, bytes_per_number=bytes_per_number)

    if needs(tokens) > budget_bytes:
        low, high = 0, tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needs(middle) <= budget_bytes else (low, middle)
        raise JaxherdError(
            f"the cache of {tokens} tokens takes {needs(tokens) / 1e9:.2f} GB of "
            f"{budget_bytes / 1e9:.2f}: {low} tokens fit."
        )
    return needs(tokens)
