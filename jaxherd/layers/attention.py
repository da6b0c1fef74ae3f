"""Grouped-query attention of every kind that our decoders use.

Axis letters: B batch, T tokens, S keys, D width, N query heads, K key/value heads, H head size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Module, parameter
from jaxherd.core.sharding import shard
from jaxherd.kernels.attention import AttentionMask, attention
from jaxherd.kernels.attention.mask import allowed_pairs
from jaxherd.layers import rope as rope_lib
from jaxherd.layers.kv_cache import LayerCache
from jaxherd.layers.linear import Linear, unit_rms
from jaxherd.layers.paged_cache import CacheRule, PagedCache, PageTables
from jaxherd.layers.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class TemperatureTuning:
    """Queries grow with position: s(p) = 1 + attn_scale ln(1 + floor((p + 1) / floor_scale)).

    Source: llama4.md 2.3, step 4 (layers without RoPE only).
    """

    floor_scale: int = 8192
    attn_scale: float = 0.1

    def __call__(self, positions: Int[Array, "..."]) -> Float[Array, "..."]:
        """Return s(p) in float32; positions stay integers, since bfloat16 rounds 8190 to 8192."""
        steps = (jnp.maximum(positions, 0) + 1) // self.floor_scale
        return 1.0 + self.attn_scale * jnp.log1p(steps.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention.

    Attributes:
      num_heads, num_kv_heads, head_dim: query heads share key/value heads in equal runs.
      kind: "causal" sees all earlier tokens; "chunked" those of its own chunk of `size`
        positions; "sliding_window" the last `size` with its own; "bidirectional" all.
      rope: None is a NoPE layer.
      rope_positions: "chunk_relative" rotates by p mod size in chunked layers, which leaves the
        scores unchanged and keeps float32 phases exact beyond a million positions (llama4.md 2.6).
      qk_norm: "unit_after_rope" is Llama 4's weightless RMS norm after RoPE;
        "learned_before_rope" has a weight per head channel and comes before RoPE.
      temperature: Llama 4's growth of queries with position.
      qkv_bias, out_bias: biases of the projections.
      scale: of the scores; head_dim**-0.5 when None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: Literal["causal", "chunked", "sliding_window", "bidirectional"] = "causal"
    size: int | None = None
    rope: RopeConfig | None = RopeConfig()
    rope_positions: Literal["absolute", "chunk_relative"] = "absolute"
    qk_norm: Literal["none", "unit_after_rope", "learned_before_rope"] = "none"
    temperature: TemperatureTuning | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-5
    scale: float | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} kv heads"
            )
        if self.kind in ("chunked", "sliding_window") and (self.size is None or self.size < 1):
            raise ValueError(f"{self.kind} attention needs a size of at least 1, got {self.size}")
        if self.rope is not None and int(self.head_dim * self.rope.partial) % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim {self.head_dim} is odd")

    @property
    def is_local(self) -> bool:
        """Whether a query sees at most `size` keys."""
        return self.kind in ("chunked", "sliding_window")

    def cache_capacity(self, max_length: int) -> int:
        """Return the slots that this layer needs for sequences up to `max_length`."""
        return min(max_length, self.size) if self.is_local and self.size else max_length

    @property
    def cache_rule(self) -> CacheRule:
        """What this layer keeps in sight while a sequence grows.

        Raises:
          JaxherdError: a bidirectional layer, whose earlier tokens would change.
        """
        if self.kind == "bidirectional":
            raise JaxherdError("a bidirectional layer has no cache: use a causal model.")
        return CacheRule(self.kind, self.size if self.is_local else None)

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters for model width `embed_dim`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = embed_dim * (q + 2 * kv) + q * embed_dim
        biases = (q + 2 * kv) * self.qkv_bias + embed_dim * self.out_bias
        norms = 2 * self.head_dim * (self.qk_norm == "learned_before_rope")
        return weights + biases + norms

    def score_flops(self, length: int) -> float:
        """Return FLOPs of q k^T and weights v for one sequence of `length` tokens, forward.

        Counts the keys that the rule lets a query see (half of them under a causal rule), two
        products of N H multiply-adds a pair.
        """
        pairs = allowed_pairs(self.kind, self.size, length)
        return 4.0 * pairs * self.num_heads * self.head_dim


TableKey = tuple[RopeConfig, int | None, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceInfo:
    """What all layers need to know of the tokens, computed once per forward pass.

    Attributes:
      positions_BT: inside the document; negative marks padding.
      segments_BT: document of each token; None when a row is one document.
      tables: (cos, sin) for each entry of `table_keys`.
      table_keys: (rope config, modulus of positions or None, head size).
      contiguous: rows are positions 0..T-1 of one document.
      pages: where the rows' pages are, for layers with a `PagedCache`.
      length_axis: logical axis of T; None where a layout that splits text must not split these
        tokens (the odd number of patches of a tile).
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    table_keys: tuple[TableKey, ...] = dataclasses.field(metadata={"static": True})
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    pages: PageTables | None = None
    length_axis: str | None = dataclasses.field(default="length", metadata={"static": True})

    @classmethod
    def create(
        cls,
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None,
        attentions: tuple[AttentionConfig, ...],
        *,
        contiguous: bool = False,
        pages: PageTables | None = None,
    ) -> "SequenceInfo":
        """Return the record for a forward pass through layers of these attention configs."""
        keys = tuple(dict.fromkeys(_table_key(a) for a in attentions if a.rope is not None))
        tables = []
        for rope, modulus, head_dim in keys:
            p_BT = positions_BT if modulus is None else positions_BT % modulus
            tables.append(rope_lib.angles(rope, head_dim, p_BT))
        return cls(positions_BT, segments_BT, tuple(tables), keys, contiguous, pages)

    @classmethod
    def of_grid(
        cls, config: AttentionConfig, columns: Sequence[int], rows: Sequence[int], batch: int
    ) -> "SequenceInfo":
        """Return the record for the patches of `batch` pictures, rotated by column and row.

        Args:
          config: of all layers; its `rope` gives theta alone.
          columns, rows: where each patch is, see `rope.grid_angles`.
          batch: B.
        """
        assert config.rope is not None
        table = rope_lib.grid_angles(config.rope, config.head_dim, columns, rows)
        shape = (batch, len(columns))
        positions_BT = jnp.broadcast_to(jnp.arange(len(columns), dtype=jnp.int32), shape)
        cos, sin = (jnp.broadcast_to(part, (batch, *part.shape)) for part in table)
        return cls(
            positions_BT,
            None,
            ((cos, sin),),
            (_table_key(config),),
            contiguous=True,
            length_axis=None,
        )

    def table(self, config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
        """Return (cos, sin) for one layer."""
        return self.tables[self.table_keys.index(_table_key(config))]


def _table_key(config: AttentionConfig) -> TableKey:
    assert config.rope is not None
    relative = config.rope_positions == "chunk_relative" and config.kind == "chunked"
    return (config.rope, config.size if relative else None, config.head_dim)


def _tables(info: SequenceInfo) -> PageTables:
    if info.pages is None:
        raise ValueError("a paged cache needs page tables: SequenceInfo.create(..., pages=...)")
    return info.pages


def _heads(x, heads: int, length: str | None, axis: str):
    x_BTNH = rearrange(x, "B T (N H) -> B T N H", N=heads)
    return shard(x_BTNH, "batch", length, axis, "head_dim")


class Attention(Module):
    """Projections, position encoding, attention, output projection; no norm, no residual."""

    def __init__(
        self,
        config: AttentionConfig,
        embed_dim: int,
        *,
        key: jax.Array,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        c = config
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        keys = jax.random.split(key, 4)
        self.config = config
        self.q_proj = Linear(
            embed_dim, q_dim, ("embed", "heads"), key=keys[0], bias=c.qkv_bias, std=std
        )
        self.k_proj = Linear(
            embed_dim, kv_dim, ("embed", "kv_heads"), key=keys[1], bias=c.qkv_bias, std=std
        )
        self.v_proj = Linear(
            embed_dim, kv_dim, ("embed", "kv_heads"), key=keys[2], bias=c.qkv_bias, std=std
        )
        self.o_proj = Linear(
            q_dim,
            embed_dim,
            ("heads", "embed"),
            key=keys[3],
            bias=c.out_bias,
            std=std if out_std is None else out_std,
        )
        learned = c.qk_norm == "learned_before_rope"
        self.q_norm = parameter(jnp.ones(c.head_dim), ("norm",)) if learned else None
        self.k_norm = parameter(jnp.ones(c.head_dim), ("norm",)) if learned else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        info: SequenceInfo,
        cache: LayerCache | PagedCache | None = None,
        *,
        cache_is_empty: bool = False,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | PagedCache | None]:
        """Return the attention output and the cache with the new tokens in it.

        Args:
          x_BTD: normalised input.
          info: positions, segments and rotary tables of these tokens.
          cache: earlier keys and values; None attends among the given tokens alone.  A
            `PagedCache` needs the page tables in `info`.
          cache_is_empty: promises that nothing was written yet, so that the new tokens attend
            among themselves (the first prefill).
          implementation: see `jaxherd.kernels.attention`.
        """
        c = self.config
        length = info.length_axis
        q_BTNH = _heads(self.q_proj(x_BTD), c.num_heads, length, "act_heads")
        k_BTKH = _heads(self.k_proj(x_BTD), c.num_kv_heads, length, "act_kv_heads")
        v_BTKH = _heads(self.v_proj(x_BTD), c.num_kv_heads, length, "act_kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = unit_rms(q_BTNH, c.norm_eps) * self.q_norm[...]
            k_BTKH = unit_rms(k_BTKH, c.norm_eps) * self.k_norm[...]
        if c.rope is not None:
            q_BTNH = rope_lib.rotate(q_BTNH, info.table(c))
            k_BTKH = rope_lib.rotate(k_BTKH, info.table(c))
        if c.qk_norm == "unit_after_rope":
            q_BTNH, k_BTKH = unit_rms(q_BTNH, c.norm_eps), unit_rms(k_BTKH, c.norm_eps)
        growth_BT = None if c.temperature is None else c.temperature(info.positions_BT)
        if isinstance(cache, PagedCache) and x_BTD.shape[1] == 1:
            tables = _tables(info)
            table_BQ = tables.of(c.cache_rule)
            cache = cache.write(k_BTKH, v_BTKH, info.positions_BT, table_BQ)
            out_BTNH = cache.attend(
                q_BTNH, info.positions_BT, tables, c.cache_rule, scale=c.scale,
                temperature_B1=growth_BT,
            )  # fmt: skip
        else:
            k_BSKH, v_BSKH, mask, cache = self._keys(k_BTKH, v_BTKH, info, cache, cache_is_empty)
            out_BTNH = attention(
                q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=c.scale, temperature_BT=growth_BT,
                implementation=implementation,
            )  # fmt: skip
        out_BTNH = shard(out_BTNH, "batch", length, "act_heads", "head_dim")
        return self.o_proj(rearrange(out_BTNH, "B T N H -> B T (N H)")), cache

    def _keys(self, k_BTKH, v_BTKH, info: SequenceInfo, cache, cache_is_empty: bool):
        """Return the keys and values to attend to, their mask, and the new cache."""
        c, positions = self.config, info.positions_BT
        alone = AttentionMask(
            positions,
            positions,
            info.segments_BT,
            info.segments_BT,
            kind=c.kind,
            size=c.size,
            self_attention=True,
            contiguous=info.contiguous,
            finite_padding=True,
        )
        if cache is None:
            return k_BTKH, v_BTKH, alone, None
        if isinstance(cache, PagedCache):
            table_BQ = _tables(info).of(c.cache_rule)
            written = cache.write(k_BTKH, v_BTKH, positions, table_BQ)
            if cache_is_empty:
                return k_BTKH, v_BTKH, alone, written
            rows = written.rows(positions, table_BQ, c.cache_rule, c.head_dim, k_BTKH.dtype)
            return *rows, written
        written = cache.write(k_BTKH, v_BTKH, positions)
        if cache_is_empty:
            return k_BTKH, v_BTKH, alone, written
        if c.is_local and positions.shape[1] > 1:
            # New tokens may overwrite slots that their own first queries still need.
            k_BSKH = jnp.concatenate([cache.k, k_BTKH.astype(cache.k.dtype)], axis=1)
            v_BSKH = jnp.concatenate([cache.v, v_BTKH.astype(cache.v.dtype)], axis=1)
            seen = jnp.concatenate([cache.positions, positions], axis=1)
        else:
            k_BSKH, v_BSKH, seen = written.k, written.v, written.positions
        mask = AttentionMask(
            positions,
            seen,
            kind=c.kind,
            size=c.size,
            # A full layer's cache has a slot for every position.
            keys_by_position=c.kind == "causal",
        )
        return k_BSKH, v_BSKH, mask, written
