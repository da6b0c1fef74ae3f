"""Objectives: what a step minimises.  `objective(model, batch, key, *, frozen)`.

An objective is a frozen dataclass that maps (model, batch, key) to (mean loss, metrics).  The mean
is taken over the weight of `metrics["loss"]`; the trainer weighs microbatches with it.  One with a
true attribute `uses_progress` is also given `progress`, the share of the steps that is done.  One
with an attribute `rows_together` looks at so many successive rows as one (a pair has two), which
microbatches then keep together.  An objective may define `update_buffers(buffers, metrics)`, which runs once after each optimiser step.
A metric called `buffers/<path>` is the new value of that buffer after a training step, for layers
that learn by averages; it is not reported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import Tree, flatten, split, unflatten
from jaxherd.training import balance
from jaxherd.training.losses import chunked_cross_entropy
from jaxherd.training.metrics import Metrics, pair


@runtime_checkable
class Objective(Protocol):
    """Anything that gives a scalar to minimise and metrics to log."""

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return (mean loss, metrics); `frozen` carries teachers and reference policies."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of packed documents, with options for routed experts.

    Batch fields: tokens, targets, positions, segment_ids (int32), loss_weights (float32),
    target_bytes (int32, UTF-8 bytes of each target), all [B, T].

    Attributes:
      z_loss: weight of the squared log-normaliser of the output softmax.
      balancing: "none", "auxiliary_loss" or "bias_update" (needs `selection_bias` in the model).
      balancing_weight: weight of the auxiliary loss; rate of the bias update.
      router_z_loss: weight of the squared log-normaliser of the router.
      remat: what the forward pass keeps (`jaxherd.core.remat`).
    """

    z_loss: float = 0.0
    balancing: balance.Balancing = "none"
    balancing_weight: float = 1e-3
    router_z_loss: float = 0.0
    remat: str = "none"

    def __call__(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, frozen: Any = None
    ) -> tuple[jax.Array, Metrics]:
        """Return the mean loss over weighted tokens, and its metrics."""
        output = model.forward(
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            remat=self.remat,
        )
        score, head = model.head()
        definition, head, _ = split(head)
        weights = batch["loss_weights"]
        loss_sum, nll_sum, weight = chunked_cross_entropy(
            lambda arrays, hidden: score(definition.merge(arrays), hidden),
            head,
            output.hidden_BTD,
            batch["targets"],
            weights,
            vocab_size=model.config.vocab_size,
            z_loss=self.z_loss,
            head_axes=definition.axes()[0],
        )
        loss = loss_sum / jnp.maximum(weight, 1.0)
        target_bytes = (batch["target_bytes"] * (weights > 0)).sum()
        metrics: Metrics = {
            "nll": pair(nll_sum, weight),
            "bits_per_byte": pair(nll_sum / jnp.log(2.0), target_bytes),
        }
        if output.router:
            loss, routing = self._routing(loss, output.router)
            metrics |= routing
        metrics["loss"] = pair(loss * weight, weight)
        return loss, metrics

    def _routing(self, loss, router):
        auxiliary, z, layers = 0.0, 0.0, 0
        metrics: Metrics = {}
        for index, stats in enumerate(router):
            # Each entry is a stack of layers: all layers weigh the same, however they are stacked.
            count = stats.tokens.size
            layers += count
            auxiliary += count * balance.auxiliary_loss(
                stats.load_E, stats.probability_E, stats.tokens
            )
            z += (stats.z / jnp.maximum(stats.tokens, 1.0)).sum()
            rows = jnp.broadcast_to(stats.load_E.sum(axis=-1, keepdims=True), stats.load_E.shape)
            metrics[f"expert_load/{index}"] = pair(stats.load_E, rows)
        auxiliary, z = auxiliary / layers, z / layers
        if self.balancing == "auxiliary_loss":
            loss = loss + self.balancing_weight * auxiliary
        if self.router_z_loss:
            loss = loss + self.router_z_loss * z
        metrics["balance"] = pair(auxiliary, 1.0)
        metrics["router_z"] = pair(z, 1.0)
        return loss, metrics

    def update_buffers(self, buffers: Tree, metrics: Metrics) -> Tree:
        """Return the buffers after an optimiser step: the routers' selection biases moved."""
        if self.balancing != "bias_update":
            return buffers
        flat = flatten(buffers)
        # Routed blocks appear in the statistics in the order of the model's segments and blocks.
        names = sorted(
            (name for name in flat if name.endswith("selection_bias")),
            key=lambda name: [int(part) for part in name.split("/") if part.isdigit()],
        )
        routers = [name for name in metrics if name.startswith("expert_load/")]
        if len(names) != len(routers):
            raise JaxherdError(
                f"balancing 'bias_update' found {len(names)} selection biases for {len(routers)} "
                "uses of routers: set selection_bias=True in every routed layer, and repeats=1."
            )
        for index, name in enumerate(names):
            load = metrics[f"expert_load/{index}"][0]
            flat[name] = balance.bias_step(flat[name], load, self.balancing_weight)
        return unflatten(flat)
