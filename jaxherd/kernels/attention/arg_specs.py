"""The shapes that the models put through attention.

Sources: llama4.md 2.3 and 4 (40 query heads on 8, head 128, chunk 8,192; vision 16 heads of 88),
mobilellm-pro.md (20 heads on 4, head 64, window 512), melodyflow.md and videoauto-r1.md for heads of
64 to 128.  Every entry is compiled by Mosaic as it stands and compared with the definition as its
`shrunk` self, on CPU.
"""

import dataclasses

from jaxherd.kernels.attention.mask import MaskKind


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One call of `attention`.

    Attributes:
      name: unique.
      length, keys: queries and keys of a row; more keys than queries means that the queries are the
        last ones of a long row whose earlier keys, those in sight, are cached in order of position.
      heads, kv_heads, head_dim: N, K, H.
      kind, size: the rule.
      packed: several documents a row, with padding at its end.
      scattered: keys are neither the queries' tokens nor in an order; some of them are empty.
      dtype: of the arrays.
      trained: also the gradients run.
    """

    name: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: MaskKind = "causal"
    size: int | None = None
    keys: int | None = None
    packed: bool = False
    scattered: bool = False
    dtype: str = "bfloat16"
    trained: bool = False
    batch: int = 1

    def shrunk(self) -> "ArgSpec":
        """Return the same call with a length and heads that a CPU interprets in no time."""
        groups = self.heads // self.kv_heads
        length = 256 + (self.length % 128)
        factor = length / self.length
        return dataclasses.replace(
            self,
            length=length,
            heads=groups * min(self.kv_heads, 2 if groups < 4 else 1),
            kv_heads=min(self.kv_heads, 2 if groups < 4 else 1),
            size=None if self.size is None else max(1, int(self.size * factor)),
            keys=self._shrunk_keys(length),
        )

    def _shrunk_keys(self, length: int) -> int | None:
        if self.keys is None or self.scattered:
            return self.keys and min(self.keys, length + 1)
        return length + 256


_LLAMA4 = (
    ArgSpec("llama4_train_full", 8192, 40, 8, 128, packed=True, trained=True),
    ArgSpec("llama4_train_chunked", 8192, 40, 8, 128, "chunked", 8192, packed=True, trained=True),
    ArgSpec("llama4_long_chunked", 131072, 40, 8, 128, "chunked", 8192, trained=True),
    ArgSpec("llama4_long_packed", 32768, 40, 8, 128, "chunked", 8192, packed=True, trained=True),
    # The last piece of a 262,144-token prompt, in a layer that sees all of it.
    ArgSpec("llama4_prefill", 8192, 40, 8, 128, keys=262144),
    # A piece of it that starts within a chunk: pages of 128 from its first one in sight on.
    ArgSpec("llama4_prefill_chunked", 8192, 40, 8, 128, "chunked", 8192, keys=16512),
    ArgSpec("llama4_vision", 577, 16, 16, 88, "bidirectional", batch=2, trained=True),
)
_OTHERS = (
    ArgSpec("mobilellm_pro_local", 2048, 20, 4, 64, "sliding_window", 512, trained=True),
    ArgSpec(
        "mobilellm_pro_packed", 2048, 20, 4, 64, "sliding_window", 512, packed=True, trained=True
    ),
    # Frames of MelodyFlow's 1B and 400M models that see themselves, or a text, and the zero slot.
    ArgSpec(
        "velocity_slot",
        752,
        24,
        24,
        64,
        "bidirectional",
        keys=753,
        scattered=True,
        trained=True,
        batch=4,
    ),
    ArgSpec(
        "velocity_cross",
        752,
        16,
        16,
        64,
        "bidirectional",
        keys=33,
        scattered=True,
        trained=True,
        batch=4,
    ),
    # Clips of several lengths, without the zero slot: padding at the end of every row.
    ArgSpec(
        "velocity_padded", 752, 24, 24, 64, "bidirectional", packed=True, trained=True, batch=4
    ),
    ArgSpec("head_72", 1024, 16, 16, 72, "bidirectional", trained=True),
    ArgSpec("head_80", 1024, 32, 8, 80, "prefix", packed=True, trained=True),
    ArgSpec("odd_float32", 1000, 8, 1, 64, "prefix", dtype="float32", trained=True),
)
ARG_SPECS: dict[str, ArgSpec] = {spec.name: spec for spec in _LLAMA4 + _OTHERS}
