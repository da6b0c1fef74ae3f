"""The decoding shapes that the models put through paged attention (sources: attention/arg_specs)."""

import dataclasses

from jaxherd.kernels.paged_attention.schedule import PagedRule


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One call: `batch` sequences of up to `length` tokens, `new` of them new."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: PagedRule = "causal"
    size: int | None = None
    page_size: int = 128
    new: int = 1
    dtype: str = "bfloat16"
    query_dtype: str = "bfloat16"

    def shrunk(self) -> "ArgSpec":
        """Return the same call with lengths that a CPU interprets in no time."""
        scaled = self.dtype == "int8"
        page = self.page_size if scaled else 32
        return dataclasses.replace(
            self,
            batch=min(self.batch, 3),
            length=4 * page,
            size=None if self.size is None else 3 * page // 2,
            page_size=page,
        )


_SPECS = (
    ArgSpec("scout_full", 64, 131072, 40, 8, 128),
    ArgSpec("scout_full_1", 1, 131072, 40, 8, 128),
    ArgSpec("scout_chunked", 64, 131072, 40, 8, 128, "chunked", 8192),
    ArgSpec("scout_full_int8", 16, 131072, 40, 8, 128, dtype="int8"),
    ArgSpec("scout_draft_4", 16, 32768, 40, 8, 128, "chunked", 8192, new=4),
    ArgSpec("mobilellm_pro_full_int8", 1, 8192, 20, 4, 64, dtype="int8"),
    ArgSpec("mobilellm_pro_local_int8", 1, 8192, 20, 4, 64, "sliding_window", 512, dtype="int8"),
    ArgSpec("mobilellm_pro_local", 8, 8192, 20, 4, 64, "sliding_window", 512, page_size=64),
    ArgSpec("head_80_float32", 4, 2048, 32, 8, 80, dtype="float32", query_dtype="float32"),
)
ARG_SPECS: dict[str, ArgSpec] = {spec.name: spec for spec in _SPECS}
