"""The shapes that the models put through the grouped products.

Widths are of Llama 4 Scout and Maverick (llama4.md section 2: D = 5120, F = 8192, 16 and 128
experts).  Every entry is compiled by Mosaic as it stands and compared with the definition as its
`shrunk` self, on CPU.
"""

import dataclasses
from typing import Literal

import numpy as np

Code = Literal["int8", "int4", "packed_int4", "float8_e4m3fn"]


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One call.

    Attributes:
      name: unique.
      rows, inner, columns, groups: M, K, N, G.
      form: "matmul", or "swiglu" with a score per row.
      dtype: of x, and of the weights where they are no code.
      code: of the weights; None for plain ones.
      group: rows of K that share a scale of the code; None for one scale per column.
      trained: also the gradients run.
    """

    name: str
    rows: int
    inner: int
    columns: int
    groups: int
    form: Literal["matmul", "swiglu"] = "matmul"
    dtype: str = "bfloat16"
    code: Code | None = None
    group: int | None = None
    trained: bool = False

    def shrunk(self) -> "ArgSpec":
        """Return the same call with sides that a CPU multiplies in no time."""
        return dataclasses.replace(
            self,
            rows=max(2, self.rows // 128) if self.rows > 64 else self.rows,
            inner=self.inner // 32,
            columns=self.columns // 32,
            groups=min(self.groups, 8),
            group=None if self.group is None else self.group // 8,
        )

    def group_sizes(self, seed: int = 0, used: float = 1.0) -> np.ndarray:
        """Return the sizes of a skewed routing that fills a share of the rows."""
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet(np.full(self.groups, 0.5))
        return rng.multinomial(int(self.rows * used), shares).astype(np.int32)


_D, _F = 5120, 8192
_SCOUT = (
    ArgSpec("scout_train_up", 8192, _D, _F, 16, trained=True),
    ArgSpec("scout_train_down", 8192, _F, _D, 16, trained=True),
    ArgSpec("scout_train_swiglu", 8192, _D, _F, 16, "swiglu", trained=True),
    # One expert a device, and a receive buffer of which half is tail.
    ArgSpec("scout_expert_parallel", 16384, _D, _F, 1, "swiglu", trained=True),
    ArgSpec("scout_decode_1", 1, _D, _F, 16, "swiglu"),
    ArgSpec("scout_decode_64", 64, _F, _D, 16),
    ArgSpec("scout_decode_int4", 64, _D, _F, 16, "swiglu", code="packed_int4", group=None),
    ArgSpec("scout_decode_int4_groups", 16, _F, _D, 16, code="packed_int4", group=128),
    ArgSpec("scout_prefill_int4", 2048, _D, _F, 16, "swiglu", code="packed_int4"),
)
_MAVERICK = (
    ArgSpec("maverick_train_swiglu", 8192, _D, _F, 128, "swiglu", trained=True),
    ArgSpec("maverick_train_down", 8192, _F, _D, 128, trained=True),
    ArgSpec("maverick_decode_2", 2, _D, _F, 128, "swiglu"),
    ArgSpec("maverick_decode_fp8", 64, _D, _F, 128, "swiglu", code="float8_e4m3fn"),
    ArgSpec("maverick_decode_int8", 8, _F, _D, 128, code="int8"),
)
_SMALL = (
    # The cpu scale's widths, in its dtype, and an inner axis that no tile divides.
    ArgSpec("small_float32", 256, 512, 1024, 8, "swiglu", "float32", trained=True),
    ArgSpec("odd_float32", 300, 1000, 1320, 8, "matmul", "float32", trained=True),
    ArgSpec("odd_bfloat16", 300, 1320, 1000, 8, "swiglu", trained=True),
)
ARG_SPECS: dict[str, ArgSpec] = {spec.name: spec for spec in _SCOUT + _MAVERICK + _SMALL}
