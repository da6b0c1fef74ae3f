"""Mixture of routed experts with a shared expert, dropless, on one device or many.

Axis letters: B batch, T time, N tokens of one device, D width, E experts, F hidden width,
k experts a token, R = N k rows.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxherd.core import sharding
from jaxherd.core.matmul_format import active_format
from jaxherd.core.modules import Module, axes_of, buffer, parameter
from jaxherd.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxherd.kernels.quantized_matmul import QuantizedMatrix
from jaxherd.layers import fp8
from jaxherd.layers.exchange import exchange_rows
from jaxherd.layers.feed_forward import FeedForward, FeedForwardConfig
from jaxherd.layers.linear import normal
from jaxherd.layers.permute import by_group, permute


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Routed experts.

    Attributes:
      num_experts, top_k: experts, and how many each token meets.
      hidden_dim: F of one routed expert.
      shared_dim: F of the shared expert that every token meets; None for no shared expert.
      score: gate from the router logit: "sigmoid" (Llama 4, no renormalisation) or "softmax"
        over all experts.
      scale: where the gate multiplies: the expert's "input" (Llama 4) or "output".
      renormalize: divide the gates of a token's experts by their sum.
      selection_bias: keep an untrained bias that is added for the choice of experts only; a
        training recipe may update it to balance the load (llama4.md section 3: not Meta's
        disclosed recipe).
      exchange_balance: with experts on several devices, how uneven a load one round of the
        exchange serves (`jaxherd.layers.exchange`); no setting drops a token.

    Source: llama4.md section 3.
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    shared_dim: int | None = None
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    scale: Literal["input", "output"] = "input"
    renormalize: bool = False
    selection_bias: bool = False
    exchange_balance: float = 2.0

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} is not between 1 and {self.num_experts} experts")

    def num_params(self, embed_dim: int) -> int:
        """Return the number of parameters for model width `embed_dim`."""
        routed = 3 * embed_dim * self.hidden_dim * self.num_experts
        return routed + embed_dim * self.num_experts + 3 * embed_dim * (self.shared_dim or 0)

    def active_params(self, embed_dim: int) -> int:
        """Return the parameters that one token meets, the router's included."""
        routed = 3 * embed_dim * self.hidden_dim * self.top_k
        return routed + embed_dim * self.num_experts + 3 * embed_dim * (self.shared_dim or 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over tokens, so that they add up over devices and microbatches.

    A layer leaves them row by row of the batch, [B, ...]: added up over devices there, each layer
    would wait for a collective of a few bytes.

    Attributes:
      load_E: how many rows each expert got.
      probability_E: sum of the softmax of the router logits (for the auxiliary loss; from the
        logits and not the sigmoid scores, llama4.md trap 18).
      z: sum of logsumexp(logits)^2.
      tokens: how many tokens count.
    """

    load_E: jax.Array
    probability_E: jax.Array
    z: jax.Array
    tokens: jax.Array


class Moe(Module):
    """y = shared(x) + sum over chosen experts e of expert_e(gate_e x)  (scale = "input")."""

    def __init__(
        self,
        config: MoeConfig,
        embed_dim: int,
        *,
        key: jax.Array,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        r, a, b, c, s = jax.random.split(key, 5)
        experts, hidden = config.num_experts, config.hidden_dim
        out_std = std if out_std is None else out_std
        inward = ("expert", "embed", "expert_mlp")
        self.config = config
        self.router = parameter(normal(r, (embed_dim, experts), std), ("embed", None))
        self.gate = parameter(normal(a, (experts, embed_dim, hidden), std), inward)
        self.up = parameter(normal(b, (experts, embed_dim, hidden), std), inward)
        self.down = parameter(
            normal(c, (experts, hidden, embed_dim), out_std), ("expert", "expert_mlp", "embed")
        )
        self.selection_bias = buffer(jnp.zeros(experts), (None,)) if config.selection_bias else None
        self.shared = (
            FeedForward(
                FeedForwardConfig(config.shared_dim), embed_dim, key=s, std=std, out_std=out_std
            )
            if config.shared_dim
            else None
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        counted_BT: jax.Array | None = None,
        *,
        onto_BTD: Float[Array, "B T D"] | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the output and the router's statistics, row by row.

        Args:
          x_BTD: normalised input.
          counted_BT: which tokens the statistics count (padding does not); all by default.
          onto_BTD: added to the output: what does not wait for the routed rows is added first.
          implementation: see `jaxherd.kernels.grouped_matmul`.
        """
        if counted_BT is None:
            counted_BT = jnp.ones(x_BTD.shape[:2], bool)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, self.router[...].astype(x_BTD.dtype))
        bias_E = None if self.selection_bias is None else self.selection_bias[...]
        chosen_BTk, gates_BTk = route(logits_BTE, self.config, bias_E)
        stats = _stats(logits_BTE, chosen_BTk, counted_BT, self.config)
        shared = () if self.shared is None else (self.shared.hidden(x_BTD),)
        y_BTD, shared = self._routed(x_BTD, chosen_BTk, gates_BTk, shared, implementation)
        if self.shared is not None:
            shared_BTD = self.shared.down(*shared)
            onto_BTD = shared_BTD if onto_BTD is None else onto_BTD + shared_BTD
            # Fused with the last sum, the product would wait for the rows to come back.
            onto_BTD = jax.lax.optimization_barrier(onto_BTD)
        if onto_BTD is not None:
            y_BTD = onto_BTD + y_BTD
        return y_BTD, stats

    def _routed(self, x_BTD, chosen_BTk, gates_BTk, shared, implementation):
        """Return (the routed experts' output, `shared`), half of which is done as rows travel."""
        weights = (self.gate[...], self.up[...], self.down[...])
        partitioner = sharding.active()
        if partitioner is None or partitioner.mesh.size == 1:
            return _experts_of_device(
                x_BTD, chosen_BTk, gates_BTk, weights, shared, self.config, implementation
            )
        tokens = partitioner.spec(("batch", "length", None))
        hidden = partitioner.spec(("batch", "length", "act_mlp"))
        columns = partitioner.spec((None, None, "expert_mlp"))[2]
        experts = partitioner.spec(("expert",))[0]
        expert_axis, tensor_axes = _axis_names(experts), _axis_names(columns)
        partitioner.check_divisible(
            ("expert",), partitioner.spec(("expert",)), (self.config.num_experts,), "experts"
        )

        specs, cuts = zip(*(
            _spec(partitioner, w, axes_of(variable), name)
            for w, variable, name in zip(
                weights, (self.gate, self.up, self.down), ("gate", "up", "down")
            )
        ))  # fmt: skip

        def local(x, chosen, gates, shared, *weights):
            whole = tuple(_gathered(w, *cut) for w, cut in zip(weights, cuts))
            return _experts_of_device(
                x, chosen, gates, whole, shared, self.config, implementation,
                expert_axis[0] if expert_axis else None, tensor_axes,
            )  # fmt: skip

        return jax.shard_map(
            local,
            mesh=partitioner.mesh,
            in_specs=(tokens, tokens, tokens, hidden, *specs),
            out_specs=(tokens, hidden),
            check_vma=False,
        )(x_BTD, chosen_BTk, gates_BTk, shared, *weights)


def _spec(partitioner: sharding.Partitioner, w, names: tuple[str | None, ...], name: str):
    """Return how the experts' matrices arrive, and (dimension, mesh axes) along which they are cut.

    What is cut along the model width is gathered where it is used (`_gathered`); a code, each part
    of it as its matrix, arrives whole in that.
    """
    spec = partitioner.spec(names)
    if isinstance(w, QuantizedMatrix):
        spec = jax.sharding.PartitionSpec(
            *(None if axis == "embed" else part for axis, part in zip(names, spec))
        )
        w.check_cut(partitioner, spec, f"the experts' {name}")
        return w.specs(spec), (0, ())
    cut = names.index("embed")
    return spec, (cut, _axis_names(spec[cut]))


def _gathered(w, cut: int, axes: tuple[str, ...]):
    """Gather one dimension of the experts' matrices [E, ., .].

    Of a lone expert's the first dimension is left out: to add up gradients the compiler puts the cut
    dimension in front, and [D, 1, F] is another tiling in memory than [1, D, F].
    """
    if not axes:
        return w
    if w.shape[0] > 1:
        return jax.lax.all_gather(w, axes, axis=cut, tiled=True)
    return jax.lax.all_gather(w[0], axes, axis=cut - 1, tiled=True)[None]


def _axis_names(part) -> tuple[str, ...]:
    return () if part is None else ((part,) if isinstance(part, str) else tuple(part))


def route(logits_BTE, config: MoeConfig, bias_E=None):
    """Return (experts [B, T, k] int32, gates [B, T, k] in the logits' dtype).

    sigmoid: g_e = sigmoid(z_e) for the chosen, computed in float32; no softmax, no
    renormalisation unless the config asks for it.
    """
    logits32 = logits_BTE.astype(jnp.float32)
    scores = (
        jax.nn.sigmoid(logits32) if config.score == "sigmoid" else jax.nn.softmax(logits32, axis=-1)
    )
    ranked = logits32 if bias_E is None else scores + jax.lax.stop_gradient(bias_E)
    if config.top_k == 1:  # the same, ties included, without a sort
        chosen_BTk = jnp.argmax(ranked, axis=-1, keepdims=True)
    else:
        _, chosen_BTk = jax.lax.top_k(ranked, config.top_k)
    gates_BTk = jnp.take_along_axis(scores, chosen_BTk, axis=-1)
    if config.renormalize:
        gates_BTk = gates_BTk / gates_BTk.sum(axis=-1, keepdims=True)
    return chosen_BTk.astype(jnp.int32), gates_BTk.astype(logits_BTE.dtype)


def _stats(logits_BTE, chosen_BTk, counted_BT, config: MoeConfig) -> RouterStats:
    logits32 = logits_BTE.astype(jnp.float32)
    counted = counted_BT.astype(jnp.float32)
    rows_BTE = jax.nn.one_hot(chosen_BTk, config.num_experts, dtype=jnp.float32).sum(axis=2)
    z_BT = jax.nn.logsumexp(logits32, axis=-1) ** 2
    return RouterStats(
        load_E=jnp.einsum("BTE,BT->BE", rows_BTE, counted),
        probability_E=jnp.einsum("BTE,BT->BE", jax.nn.softmax(logits32, axis=-1), counted),
        z=(z_BT * counted).sum(axis=1),
        tokens=counted.sum(axis=1),
    )


def _experts_of_device(
    x_BTD,
    chosen_BTk,
    gates_BTk,
    weights,
    shared,
    config: MoeConfig,
    implementation,
    expert_axis: str | None = None,
    tensor_axes: tuple[str, ...] = (),
):
    """Sort rows by expert, send them to the experts' owners, compute, return, sum over k.

    `weights` are gate, up and down; `shared` is handed through (`exchange_rows`).
    """
    batch = x_BTD.shape[0]
    x_ND = rearrange(x_BTD, "B T D -> (B T) D")
    expert_R = rearrange(chosen_BTk, "B T k -> (B T k)")
    gate_R1 = rearrange(gates_BTk, "B T k -> (B T k) 1")
    order_R, back_R, sizes_E = by_group(expert_R, config.num_experts)
    rows_RD = permute(jnp.repeat(x_ND, config.top_k, axis=0), order_R, back_R)
    sorted_gate_R1 = permute(gate_R1, order_R, back_R)

    compute = functools.partial(_swiglu_experts, implementation, tensor_axes=tensor_axes)
    if expert_axis is None:
        # The kernel multiplies by the score, which saves a pass over the rows.
        score_R = sorted_gate_R1[:, 0] if config.scale == "input" else None
        out_RD = compute(rows_RD, sizes_E, weights, score_R)
    else:
        # Rows that travel are written anyway: multiplied before, no score has to go with them.
        if config.scale == "input":
            rows_RD = rows_RD * sorted_gate_R1
        out_RD, shared = exchange_rows(
            compute, rows_RD, sizes_E, weights, expert_axis, balance=config.exchange_balance,
            beside=shared,
        )  # fmt: skip
    if tensor_axes:
        out_RD = jax.lax.psum(out_RD, tensor_axes)
    if config.scale == "output":
        out_RD = out_RD * sorted_gate_R1
    out_NkD = rearrange(permute(out_RD, back_R, order_R), "(N k) D -> N k D", k=config.top_k)
    return rearrange(out_NkD.sum(axis=1), "(B T) D -> B T D", B=batch), shared


def _swiglu_experts(
    implementation, rows_RD, sizes_E, weights, score_R=None, *, expected_rows=None, tensor_axes=()
):  # fmt: skip
    """Return (silu(u W_gate) * u W_up) W_down of each row's expert, u = score x row.

    Rows are sorted by expert; F may be split over `tensor_axes`.
    """
    gate_EDF, up_EDF, down_EFD = weights
    # What is in few bits already stays as it is.
    eight_bits = active_format() == "fp8" and not isinstance(gate_EDF, QuantizedMatrix)
    # Of a `custom_vjp` the type checker knows no result.
    operand: Any = fp8.operand
    if eight_bits:
        rows_RD = operand(rows_RD, -1)
        gate_EDF, up_EDF, down_EFD = (operand(w, 1) for w in weights)
    hidden_RF = grouped_swiglu(
        rows_RD, gate_EDF, up_EDF, sizes_E, row_scale_M=score_R, expected_rows=expected_rows,
        implementation=implementation,
    )  # fmt: skip
    if eight_bits:
        # The fused kernel gives no access to the two products; the gradient of what they make is
        # rounded.
        hidden_RF = operand(fp8.product(hidden_RF), -1)
    out_RD = grouped_matmul(
        hidden_RF, down_EFD, sizes_E, expected_rows=expected_rows, across=tensor_axes,
        implementation=implementation,
    )  # fmt: skip
    return fp8.product(out_RD) if eight_bits else out_RD
