"""The decoder family: one architecture whose config describes every layer.

Llama, SmolLM2, MobileLLM (with block sharing), MobileLLM-Pro and the Llama 4 text models are
configs of it (`jaxherd.models.presets`).

    h = embed(tokens);  for each layer: h += attention(norm(h)); h += feed_forward(norm(h))
    logits = unembed(norm(h))

Layers of one pattern are stacked and scanned over; a pattern of several different layers is
scanned over its period, so that 48 layers compile as four.

Axis letters: B batch, T tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxherd.core.coded import is_coded
from jaxherd.core.matmul_format import matmul_format
from jaxherd.core.modules import (
    Module,
    ModuleList,
    abstract,
    flatten,
    map_parameters,
    split,
    stacked,
    unflatten,
)
from jaxherd.core.remat import checkpointed
from jaxherd.core.sharding import active, gather_rows, gather_whole
from jaxherd.kernels.paged_attention import PagePool
from jaxherd.layers.attention import Attention, AttentionConfig, SequenceInfo
from jaxherd.layers.coded_product import coded_products
from jaxherd.layers.feed_forward import FeedForward, FeedForwardConfig
from jaxherd.layers.kv_cache import LayerCache
from jaxherd.layers.linear import Embedding, Linear, RMSNorm, residual
from jaxherd.layers.moe import Moe, MoeConfig, RouterStats
from jaxherd.layers.paged_cache import CacheRule, PagedCache, PageTables
from jaxherd.layers.weight_format import Formats, WeightFormat, inner_first, use_formats
from jaxherd.models.periods import Run, Segment, find_segments, locate, stacked_layers


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One block: its attention and its feed-forward part.

    Attributes:
      attention, feed_forward: the two parts.
      formats: the weights that are kept in few bits, (path inside the block, how) in order of paths
        (`jaxherd.models.quantise` has recipes).
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig | MoeConfig
    formats: Formats = ()

    def num_params(self, embed_dim: int) -> int:
        """Return the parameters of the block, its two norms included."""
        parts = self.attention.num_params(embed_dim) + self.feed_forward.num_params(embed_dim)
        return parts + 2 * embed_dim

    def active_params(self, embed_dim: int) -> int:
        """Return the parameters that one token meets."""
        attention = self.attention.num_params(embed_dim)
        return attention + self.feed_forward.active_params(embed_dim) + 2 * embed_dim


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size, embed_dim: V and D.
      layers: one entry a layer, in order.
      norm_eps: of the RMS norms.
      tie_embeddings: score tokens with the embedding table.
      repeats, repeat_order: block sharing (mobilellm.md section 3): each block runs `repeats`
        times; "immediate" B1 B1 B2 B2, "all_over" B1 B2 B1 B2, "reverse" B1 B2 B2 B1.  Every use
        has its own cache entry.
      init_std: of all weight matrices; `scale_residual_init` divides that of output projections
        by sqrt(2 L).
      max_length: longest sequence the published model was made for.
      scan_layers: stack layers and scan over their period (quick to compile); False keeps every
        layer's arrays apart, which decodes faster where XLA would copy a layer out of its stack.
      attention_implementation, moe_implementation: see `jaxherd.kernels`; None picks by platform.
      matmul_implementation: of products with weights in few bits (`kernels.quantized_matmul`);
        those of routed experts go by `moe_implementation`.
      formats: as of a layer, for "embedding/table" and "unembedding/kernel".
    """

    vocab_size: int
    embed_dim: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    repeats: int = 1
    repeat_order: Literal["immediate", "all_over", "reverse"] = "immediate"
    init_std: float = 0.02
    scale_residual_init: bool = False
    max_length: int = 8192
    scan_layers: bool = True
    attention_implementation: str | None = None
    moe_implementation: str | None = None
    matmul_implementation: str | None = None
    formats: Formats = ()

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def build(self, key: jax.Array) -> "Decoder":
        """Return the module with freshly drawn parameters."""
        return Decoder(self, key=key)

    def num_params(self) -> int:
        """Return the exact number of parameters; a shared table or block counts once."""
        tables = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return tables + self.embed_dim + sum(x.num_params(self.embed_dim) for x in self.layers)

    def active_params(self) -> int:
        """Return the parameters that one token meets, both embedding tables included."""
        tables = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return tables + self.embed_dim + sum(x.active_params(self.embed_dim) for x in self.layers)

    def forward_flops(self, batch: int, length: int) -> float:
        """Return FLOPs of one forward pass over `batch` sequences of `length` tokens.

        Two per multiply-add; matrices by their active parameters (norm weights and the lookup of
        tokens do no products), attention by the pairs its rule lets through.
        """
        d = self.embed_dim
        weights = sum(layer.active_params(d) - 2 * d for layer in self.layers) * self.repeats
        scores = sum(x.attention.score_flops(length) for x in self.layers) * self.repeats
        return batch * (2.0 * length * (weights + d * self.vocab_size) + scores)

    def train_flops(self, batch: int, length: int) -> float:
        """Return FLOPs of one training step: forward, and twice that for the gradient.

        What remat computes again is no useful work and does not count.
        """
        return 3.0 * self.forward_flops(batch, length)

    def segments(self) -> tuple[Segment, ...]:
        """Return the runs of periodic layers that are scanned."""
        if not self.scan_layers:
            return tuple(Segment((Run(layer, 1),), 1) for layer in self.layers)
        return find_segments(self.layers)

    def weight_formats(self) -> dict[str, WeightFormat]:
        """Return the format of every variable in few bits, by its path in the module."""
        found = dict(self.formats)
        for s, segment in enumerate(self.segments()):
            for r, run in enumerate(segment.runs):
                found |= {f"segments/{s}/{r}/{path}": f for path, f in run.layer.formats}
        return found

    def routed_layers(self) -> list[list[int]]:
        """Return the layers behind each entry of `DecoderOutput.router`, in stack order."""
        segments, found = self.segments(), []
        for s, segment in enumerate(segments):
            for r, run in enumerate(segment.runs):
                if isinstance(run.layer.feed_forward, MoeConfig):
                    found += [stacked_layers(segments, s, r)] * self.uses
        return found * self.passes

    @property
    def passes(self) -> int:
        """How often the whole stack runs."""
        return 1 if self.repeat_order == "immediate" else self.repeats

    @property
    def uses(self) -> int:
        """How often a block runs in a row."""
        return self.repeats if self.repeat_order == "immediate" else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass gives.

    Attributes:
      hidden_BTD: after the final norm.
      cache: with the new tokens, when one was given.
      router: one `RouterStats` for each run that routes (and each use), stacked over its layers.
    """

    hidden_BTD: jax.Array
    cache: "DecoderCache | DecoderPages | None"
    router: tuple[RouterStats, ...]


# cache[pass][segment][run][use]: a `LayerCache` stacked over the run's layers.
DecoderCache = tuple[tuple[tuple[tuple[LayerCache, ...], ...], ...], ...]
# The same with a pool that holds the pages of all layers of the run.
DecoderPages = tuple[tuple[tuple[tuple[PagePool, ...], ...], ...], ...]


class Block(Module):
    """One pre-norm layer."""

    def __init__(self, config: LayerConfig, model: DecoderConfig, *, key: jax.Array):
        a, f = jax.random.split(key)
        d, std = model.embed_dim, model.init_std
        out_std = std
        if model.scale_residual_init:
            out_std = std / (2 * len(model.layers) * model.repeats) ** 0.5
        self.attention_norm = RMSNorm(d, model.norm_eps)
        self.attention = Attention(config.attention, d, key=a, std=std, out_std=out_std)
        self.feed_forward_norm = RMSNorm(d, model.norm_eps)
        part = config.feed_forward
        self.feed_forward = (
            Moe(part, d, key=f, std=std, out_std=out_std)
            if isinstance(part, MoeConfig)
            else FeedForward(part, d, key=f, std=std, out_std=out_std)
        )
        use_formats(self, config.formats)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        info: SequenceInfo,
        cache: LayerCache | PagedCache | None,
        model: DecoderConfig,
        cache_is_empty: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | PagedCache | None, RouterStats | None]:
        """Return the residual stream, the cache and the router's statistics."""
        attended_BTD, cache = self.attention(
            self.attention_norm(x_BTD),
            info,
            cache,
            cache_is_empty=cache_is_empty,
            implementation=model.attention_implementation,
        )
        x_BTD = residual(x_BTD + checkpoint_name(attended_BTD, "attention_out"))
        normed_BTD, stats = self.feed_forward_norm(x_BTD), None
        if isinstance(self.feed_forward, Moe):
            counted_BT = info.positions_BT >= 0
            if info.segments_BT is not None:
                counted_BT &= info.segments_BT > 0
            x_BTD, stats = self.feed_forward(
                normed_BTD, counted_BT, onto_BTD=x_BTD, implementation=model.moe_implementation
            )
        else:
            x_BTD = x_BTD + self.feed_forward(normed_BTD)
        return residual(x_BTD), cache, stats


F = TypeVar("F", bound=Callable[..., Any])


def _as_configured(method: F) -> F:
    """Let the products of a method run as the config says."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with coded_products(self.config.matmul_implementation):
            return method(self, *args, **kwargs)

    return cast(F, run)


class Decoder(Module):
    """The model; call it for logits, or `forward` for hidden states, cache and statistics."""

    def __init__(self, config: DecoderConfig, *, key: jax.Array):
        e, u, b = jax.random.split(key, 3)
        d = config.embed_dim
        self.config = config
        self.embedding = Embedding(config.vocab_size, d, key=e, std=config.init_std)
        segments = []
        for index, segment in enumerate(config.segments()):
            keys = jax.random.split(jax.random.fold_in(b, index), len(segment.runs))
            segments.append(
                ModuleList(
                    stacked(
                        lambda k, c=run.layer: Block(c, config, key=k),
                        key_of,
                        segment.count * run.length,
                    )
                    for run, key_of in zip(segment.runs, keys)
                )
            )
        self.segments = ModuleList(segments)
        self.final_norm = RMSNorm(d, config.norm_eps)
        self.unembedding = (
            None
            if config.tie_embeddings
            else Linear(d, config.vocab_size, ("head_embed", "vocab"), key=u, std=config.init_std)
        )
        use_formats(self, config.formats)

    @property
    def dtype(self) -> Any:
        """Of activations: that of the weights which are never in few bits."""
        return self.final_norm.scale[...].dtype

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits.

        Args:
          tokens_BT: token ids.
          positions: inside each document, from 0; negative marks padding.  Without them every row
            is one document.
          segment_ids: document of each token when rows are packed; 0 marks padding.
        """
        output = self.forward(tokens_BT, positions=positions, segment_ids=segment_ids)
        return self.unembed(output.hidden_BTD)

    @_as_configured
    def forward(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: DecoderCache | DecoderPages | None = None,
        cache_is_empty: bool = False,
        page_tables: PageTables | None = None,
        remat: str = "none",
        embeddings_BTD: Float[Array, "B T D"] | None = None,
    ) -> DecoderOutput:
        """Return hidden states, the updated cache and router statistics.

        Args:
          tokens_BT, positions, segment_ids: as for `__call__`; with a cache, positions are needed.
          cache: from `init_cache`; the tokens attend to what it holds and to each other.
          cache_is_empty: nothing was written to the cache yet (of the given sequences, where
            pages are shared).
          page_tables: the cache is from `init_pages`, and these are the sequences' pages.
          remat: a policy of `jaxherd.core.remat`.
          embeddings_BTD: stand for the table's rows of these tokens.
        """
        config = self.config
        contiguous = positions is None and segment_ids is None
        if positions is None:
            row = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(row, tokens_BT.shape)
        attentions = tuple(layer.attention for layer in config.layers)
        info = SequenceInfo.create(
            positions, segment_ids, attentions, contiguous=contiguous, pages=page_tables
        )
        x_BTD = self.embed(tokens_BT) if embeddings_BTD is None else embeddings_BTD
        x_BTD = residual(x_BTD)
        new_cache, stats = [], []
        for number in range(config.passes):
            backwards = config.repeat_order == "reverse" and number % 2 == 1
            of_pass = [() for _ in self.segments]
            for index in _ordered(range(len(self.segments)), backwards):
                given = None if cache is None else cache[number][index]
                x_BTD, of_pass[index], seen = self._run_segment(
                    index, x_BTD, info, given, backwards, cache_is_empty, remat
                )
                stats.extend(seen)
            new_cache.append(tuple(of_pass))
        hidden_BTD = self.final_norm(x_BTD)
        return DecoderOutput(hidden_BTD, tuple(new_cache) if cache else None, tuple(stats))

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the table's rows of these tokens."""
        return self.embedding(tokens_BT, self.dtype)

    def _run_segment(self, index, x_BTD, info, cache, backwards, cache_is_empty, remat):
        """Scan over the repetitions of a segment; returns (x, its cache, its statistics).

        Within a repetition each run is a scan of its own, so that every kind of layer compiles
        once; `remat` applies to single layers.
        """
        config, segment = self.config, self.config.segments()[index]
        nothing = ((None,) * config.uses,) * len(segment.runs)
        # Rows of slots are cut into layers; pools are carried whole and a layer knows its number.
        paged = info.pages is not None and cache is not None
        given = pools = nothing
        if cache is not None:
            given, pools = (nothing, cache) if paged else (cache, nothing)
        sizes = [segment.count * run.length for run in segment.runs]

        def layer(carry, scanned, layers):
            (x, pools), (block, caches, number) = carry, scanned
            x, block = _gathered(x, block)
            written, stats, after = [], [], []
            for cached, pool in zip(caches, pools):
                entry = cached if pool is None else PagedCache(pool, number, layers)
                x, new, seen = block(x, info, entry, config, cache_is_empty)
                written.append(new if pool is None else None)
                after.append(None if pool is None else new.pool)
                stats.append(seen)
            return (x, tuple(after)), (tuple(written), tuple(s for s in stats if s is not None))

        def repetition(carry, scanned):
            (x, pools), outputs = carry, {}
            after = list(pools)
            for number in _ordered(range(len(segment.runs)), backwards):
                (x, after[number]), outputs[number] = _scan(
                    checkpointed(functools.partial(layer, layers=sizes[number]), remat),
                    (x, pools[number]),
                    tuple(part[number] for part in scanned),
                    segment.runs[number].length,
                    backwards,
                )
            return (x, tuple(after)), tuple(outputs[n] for n in range(len(segment.runs)))

        # A stack of count * length layers is seen as [count, length, ...].
        numbers = [jnp.arange(size, dtype=jnp.int32) if paged else None for size in sizes]
        folded = tuple(
            tuple(_fold(part, segment, run) for run, part in enumerate(parts))
            for parts in (self.segments[index], given, numbers)
        )
        (x_BTD, pools), outputs = _scan(
            repetition, (x_BTD, tuple(pools)), folded, segment.count, backwards
        )
        flat = [_unfold(output) for output in outputs]
        new_cache = pools if paged else tuple(o[0] for o in flat)
        # Of every layer, over the rows of the batch.
        stats = jax.tree.map(lambda x: x.sum(axis=1), tuple(s for o in flat for s in o[1]))
        return x_BTD, new_cache, stats

    @_as_configured
    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return float32 logits of hidden states."""
        score, head = self.head()
        return score(head, hidden)

    def head(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """Return (score, head): `score(head, hidden)` gives float32 logits.

        The head is the module that owns the output projection, so that a loss can gather its
        arrays once and differentiate through them.
        """
        if self.unembedding is None:
            return _score_tied, self.embedding
        return _score_untied, self.unembedding

    def init_cache(self, batch: int, max_length: int, dtype=None) -> DecoderCache:
        """Return an empty cache for sequences of up to `max_length` tokens.

        Local layers hold `size` positions, full layers `max_length`; every use of a shared block
        has an entry of its own.
        """
        dtype = self.dtype if dtype is None else dtype

        def of_run(run: Run, layers: int) -> LayerCache:
            a = run.layer.attention
            capacity = a.cache_capacity(max_length)
            return LayerCache.empty((layers,), batch, capacity, a.num_kv_heads, a.head_dim, dtype)

        return self._cache(of_run)

    def cache_rules(self) -> tuple[CacheRule, ...]:
        """Return what the layers keep in sight, each rule once, in the layers' order.

        Raises:
          JaxherdError: a layer that has no cache.
        """
        return tuple(dict.fromkeys(layer.attention.cache_rule for layer in self.config.layers))

    def init_pages(
        self, pages: Mapping[CacheRule, int], page_size: int, dtype=None
    ) -> DecoderPages:
        """Return empty pools of pages.

        Args:
          pages: how many, for each of `cache_rules`; each layer has so many.
          page_size: tokens of a page.
          dtype: of keys and values; int8 keeps codes and scales.
        """
        dtype = self.dtype if dtype is None else dtype

        def of_run(run: Run, layers: int) -> PagePool:
            a = run.layer.attention
            return PagedCache.empty(
                layers, pages[a.cache_rule], page_size, a.num_kv_heads, a.head_dim, dtype
            )

        return self._cache(of_run)

    def _cache(self, of_run: Callable[[Run, int], Any]) -> Any:
        """Return `of_run(run, layers of its stack)` for every pass, segment, run and use."""
        return tuple(
            tuple(
                tuple(
                    tuple(of_run(run, segment.count * run.length) for _ in range(self.config.uses))
                    for run in segment.runs
                )
                for segment in self.config.segments()
            )
            for _ in range(self.config.passes)
        )


def _score_tied(head: Embedding, hidden: jax.Array) -> jax.Array:
    return head.attend(hidden).astype(jnp.float32)


def _score_untied(head: Linear, hidden: jax.Array) -> jax.Array:
    with matmul_format("plain"):  # logits are not rounded in any format
        return head(hidden).astype(jnp.float32)


def _gathered(x_BTD: jax.Array, block: Any) -> tuple[jax.Array, Any]:
    """Return x and the block with its parameters gathered (`sharding.gather_rows`).

    The small first steps are done before the layer begins: between the start and the end of a larger
    collective over the same links they would wait for it.
    """
    partitioner = active()
    if partitioner is None or partitioner.mesh.size == 1:
        return x_BTD, block
    rows = map_parameters(block, gather_rows)
    x_BTD, rows = _before(x_BTD, rows)
    return x_BTD, map_parameters(rows, gather_whole)


@jax.custom_vjp
def _before(x, block):
    return jax.lax.optimization_barrier((x, block))


# The gradient of x does not wait for those of the parameters.
_before.defvjp(lambda x, block: (_before(x, block), None), lambda _, gradients: gradients)


def _scan(body, x, stacked_tree, length: int, backwards: bool):
    """Scan over the leading axis; an axis of one needs no loop and leaves its arrays in place."""
    if length > 1:
        return jax.lax.scan(body, x, stacked_tree, reverse=backwards)
    x, output = body(x, jax.tree.map(lambda leaf: leaf[0], stacked_tree))
    return x, jax.tree.map(lambda leaf: leaf[None], output)


def _fold(tree, segment: Segment, run: int):
    shape = (segment.count, segment.runs[run].length)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), tree)


def _unfold(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _ordered(numbers: range, backwards: bool) -> list[int]:
    return list(reversed(numbers)) if backwards else list(numbers)


def restack(module: Decoder, *, scan_layers: bool) -> Decoder:
    """Return the same model with its layers stacked for scanning, or each on its own.

    Values are copied, not changed; logits are the same up to the order of float additions.
    """
    return rebuilt(module, dataclasses.replace(module.config, scan_layers=scan_layers))


def rebuilt(module: Decoder, config: DecoderConfig) -> Decoder:
    """Return the same model under a config of other stacks, or of weights in fewer bits.

    Args:
      module: its variables are copied, layer by layer; quantised where the config has them in few
        bits and the module does not, and made into numbers where it is the other way round.
      config: of the same layers.
    """
    places, formats = locate(module.config.segments()), config.weight_formats()
    definition, params, buffers = split(abstract(config.build, jax.random.key(0)))
    _, old_params, old_buffers = split(module)

    def kept(name: str, target: Any, value: Any) -> Any:
        if is_coded(target) and not is_coded(value):
            return formats[name].quantise(inner_first(name, value))
        if is_coded(value) and not is_coded(target):
            return inner_first(name, value.dequantize(module.dtype))
        return value

    def convert(target: dict, source: dict) -> dict:
        source_of, new = flatten(source), {}
        for name, leaf in flatten(target).items():
            if not name.startswith("segments/"):
                new[name] = kept(name, leaf, source_of[name])
                continue
            _, index, run, rest = name.split("/", 3)
            pieces = []
            for layer in stacked_layers(config.segments(), int(index), int(run)):
                s, r, place = places[layer]
                pieces.append(kept(name, leaf, source_of[f"segments/{s}/{r}/{rest}"][place]))
            new[name] = jax.tree.map(lambda *parts: jnp.stack(parts), *pieces)
        return unflatten(new)

    return definition.merge(convert(params, old_params), convert(buffers, old_buffers))
