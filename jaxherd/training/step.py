"""The train state and the jitted step: phases, accumulation, mixed precision, guards, averages."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.matmul_format import matmul_format
from jaxherd.core.modules import (
    Definition,
    Tree,
    abstract,
    cast_floating,
    flatten,
    split,
    unflatten,
)
from jaxherd.core.sharding import Partitioner
from jaxherd.training import metrics as metrics_lib
from jaxherd.training.guards import Guards, GuardState
from jaxherd.training.optimizers import Optimizer, state_shardings
from jaxherd.training.phases import Phase, phases_of
from jaxherd.training.transfer import Transfer, scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes and a checkpoint keeps.

    Attributes:
      step: updates so far, skipped ones included.
      params, buffers: nested dictionaries of arrays.
      optimizer: optax state; of several phases a dictionary by their names.
      guard: of the guards.
      key: raw data of the PRNG key of the run; each step folds its number in.
      average: moving average of the parameters, or None where the step keeps none.

    The leaves may also be shapes, shardings or whatever Orbax keeps of them while it saves.
    """

    step: Any
    params: Any
    buffers: Any
    optimizer: Any
    guard: Any
    key: Any
    average: Any = None


# float16 would need loss scaling, which bfloat16 makes unnecessary.
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is computed.

    Attributes:
      compute_dtype: parameters are cast to it for the forward and backward pass; they are stored
        and updated in `param_dtype`.
      matmuls: "plain", products in `compute_dtype`; "fp8", their operands rounded to eight bits where
        the model's layers know how (`jaxherd.core.matmul_format`).
      accumulate: microbatches a step; the batch must divide by it.
      average_decay: keep a moving average of the parameters, a' = d a + (1 - d) p, which
        evaluations, callbacks and later stages use in their place; None keeps none.
      average_every: updates between two steps of the average.
    """

    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    matmuls: Literal["plain", "fp8"] = "plain"
    accumulate: int = 1
    average_decay: float | None = None
    average_every: int = 1

    def __post_init__(self):
        for name in ("accumulate", "average_every"):
            if getattr(self, name) < 1:
                raise JaxherdError(f"step.{name} must be at least 1, got {getattr(self, name)}.")
        if self.average_decay is not None and not 0 <= self.average_decay < 1:
            raise JaxherdError(
                f"step.average_decay must be from 0 to below 1, got {self.average_decay}."
            )
        for name in ("compute_dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise JaxherdError(
                    f"step.{name}={getattr(self, name)!r}: " + nearest(getattr(self, name), DTYPES)
                )


class Program:
    """One training program: initialisation, step and evaluation for a model on a mesh.

    The same object serves training (call its functions) and planning (lower them on abstract
    inputs): there is no second description of the step.
    """

    def __init__(
        self,
        model: Any,
        objective: Any,
        optimizer: Optimizer,
        partitioner: Partitioner,
        *,
        total_steps: int,
        config: StepConfig = StepConfig(),
        guards: Guards = Guards(),
        batch_shardings: Mapping[str, Any],
        frozen: Mapping[str, Any] | None = None,
        transfer: Transfer | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        """Lay the program out.

        Args:
          model: config of the model that is trained, with `build(key)`.
          objective: what a step minimises.
          optimizer: of all phases that name none of their own.
          partitioner: mesh and rules.
          total_steps: of the run, for the schedules.
          config, guards: how a step is computed and when its update is left out.
          batch_shardings: of the fields of a training batch.
          frozen: configs of models that the objective is given and no step changes, by name.
          transfer: the smaller model that learning rates and initial scales come from.
          compiler_options: of XLA.
        """
        self.model_config, self.objective, self.partitioner = model, objective, partitioner
        self.config, self.guards, self.total_steps = config, guards, total_steps
        self.batch_shardings = dict(batch_shardings)
        self.definition, params, buffers = split(abstract(self._build, jax.random.key(0)))
        self.definition: Definition
        self._params, self._buffers = params, buffers
        param_axes, buffer_axes = self.definition.axes()
        self.schedule = optimizer.schedule.build(total_steps)
        self.phases = phases_of(objective, params)
        rates, self._scales = None, None
        if transfer is not None:
            rates, self._scales = transfer.multipliers(params, param_axes)
        self._optimizers = {
            phase.name: (phase.optimizer or optimizer).build(
                total_steps,
                phase.take(param_axes)[0],
                None if rates is None else phase.take(rates)[0],
            )
            for phase in self.phases
        }
        self._replicated = partitioner.replicated()
        self._param_shardings = partitioner.tree_shardings(param_axes, params)
        self._buffer_shardings = partitioner.tree_shardings(buffer_axes, buffers)
        self.frozen_shardings: dict[str, Any] = {}
        self._frozen_definitions, self._frozen_shapes = {}, {}
        for name, other in (frozen or {}).items():
            parts = split(
                abstract(lambda key, c=other: self._cast(c.build(key)), jax.random.key(0))
            )
            self._frozen_definitions[name], *self._frozen_shapes[name] = parts
            self.frozen_shardings[name] = [
                partitioner.tree_shardings(axes, shapes)
                for axes, shapes in zip(parts[0].axes(), parts[1:])
            ]
        self.step = jax.jit(
            self._step,
            in_shardings=(
                self.state_shardings(),
                self.batch_shardings,
                self.frozen_shardings or None,
            ),
            # Every process reads the metrics, so every device holds them whole.
            out_shardings=(self.state_shardings(), self._replicated),
            donate_argnums=(0,),
            compiler_options=dict(compiler_options) if compiler_options else None,
        )
        self._evaluations: dict[Any, Any] = {}

    def _build(self, key: jax.Array) -> Any:
        return self._cast(self.model_config.build(key))

    def _cast(self, module: Any) -> Any:
        return cast_floating(module, jnp.dtype(self.config.param_dtype))

    def state_shardings(self) -> TrainState:
        """Return the sharding of every leaf of the train state."""
        whole: Any = self._replicated
        return TrainState(
            step=whole,
            params=self._param_shardings,
            buffers=self._buffer_shardings,
            optimizer=self._by_phase(
                lambda phase, optimizer: state_shardings(
                    optimizer,
                    phase.take(self._params)[0],
                    phase.take(self._param_shardings)[0],
                    whole,
                )
            ),
            guard=jax.tree.map(lambda _: whole, jax.eval_shape(GuardState.create)),
            key=whole,
            average=None if self.config.average_decay is None else self._param_shardings,
        )

    def _by_phase(self, make: Callable[[Phase, optax.GradientTransformation], Any]) -> Any:
        """Return what `make` gives for the only phase, or a dictionary by the phases' names."""
        made = {phase.name: make(phase, self._optimizers[phase.name]) for phase in self.phases}
        return made if len(made) > 1 else next(iter(made.values()))

    def init(
        self, seed: int, params: Tree | None = None, buffers: Tree | None = None
    ) -> TrainState:
        """Return the state before the first step, drawn or placed directly as shards.

        Args:
          seed: of parameters and of the steps' keys.
          params: start from these instead of fresh ones.
          buffers: likewise; those that are absent are fresh.
        """
        return jax.jit(self._init, out_shardings=self.state_shardings())(
            jax.random.key(seed), params, buffers
        )

    def _init(self, key: jax.Array, params: Tree | None, given: Tree | None = None) -> TrainState:
        init_key, run_key = jax.random.split(key)
        _, fresh, buffers = split(self._build(init_key))
        if params is None:
            params = fresh if self._scales is None else scaled(fresh, self._scales)
        else:
            params = cast_floating(params, self.config.param_dtype)
        if given:
            buffers = unflatten({**flatten(buffers), **flatten(given)})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            buffers=buffers,
            optimizer=self._by_phase(
                lambda phase, optimizer: optimizer.init(phase.take(params)[0])
            ),
            guard=GuardState.create(),
            key=jax.random.key_data(run_key),
            average=None if self.config.average_decay is None else jax.tree.map(jnp.copy, params),
        )

    def abstract_state(self) -> TrainState:
        """Return shapes with shardings, for restoring and for planning."""
        shapes = jax.eval_shape(self._init, jax.random.key(0), None)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.state_shardings(),
        )

    def abstract_frozen(self) -> dict[str, Any] | None:
        """Return the frozen models' (params, buffers) as shapes with shardings, or None."""

        def placed(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        shapes = {name: list(parts) for name, parts in self._frozen_shapes.items()}
        return jax.tree.map(placed, shapes, self.frozen_shardings) or None

    def module(self, state: TrainState) -> Any:
        """Return the model with the averaged parameters, or the current ones where none are kept."""
        return self.definition.merge(_used(state), state.buffers)

    def _loss(self, params, buffers, batch, key, frozen, objective, step):
        params = cast_floating(params, jnp.dtype(self.config.compute_dtype))
        model = self.definition.merge(params, buffers)
        with matmul_format(self.config.matmuls):
            return self._objective(objective, model, batch, key, frozen, step)

    def _objective(self, objective, model, batch, key, frozen, step):
        given = None
        if frozen is not None:
            frozen = cast_floating(frozen, jnp.dtype(self.config.compute_dtype))
            given = {
                name: definition.merge(*frozen[name])
                for name, definition in self._frozen_definitions.items()
            }
        if getattr(objective, "uses_progress", False):
            progress = step / self.total_steps
            return objective(model, batch, key, frozen=given, progress=progress)
        return objective(model, batch, key, frozen=given)

    def _step(self, state: TrainState, batch, frozen):
        with self.partitioner.activate():
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            params, optimizer, sums, norms = state.params, {}, {}, []
            for phase in self.phases:
                owned, rest = phase.take(params)
                gradients, found = self._gradients(
                    phase, owned, rest, state.buffers, batch, key, frozen, state.step
                )
                sums = self._merged(sums, found, phase)
                norms.append(optax.global_norm(gradients))
                transform = self._optimizers[phase.name]
                before = state.optimizer[phase.name] if len(self.phases) > 1 else state.optimizer
                updates, optimizer[phase.name] = transform.update(gradients, before, owned)
                updated: Any = optax.apply_updates(owned, updates)
                params = phase.put(updated, rest)
            grad_norm = optax.global_norm(norms)
            loss_sum, loss_weight = sums["loss"]
            loss = loss_sum / jnp.maximum(loss_weight, 1e-9)
            accept, reasons, guard = self.guards.judge(state.guard, loss, grad_norm)
            buffers = state.buffers
            if hasattr(self.objective, "update_buffers"):
                buffers = self.objective.update_buffers(buffers, sums)
            buffers, sums = metrics_lib.taken(buffers, sums)

            def choose(new, old):
                return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

            new = TrainState(
                step=state.step + 1,
                params=choose(params, state.params),
                buffers=choose(buffers, state.buffers),
                optimizer=choose(self._by_phase(lambda p, _: optimizer[p.name]), state.optimizer),
                guard=guard,
                key=state.key,
                average=self._averaged(state, params, accept),
            )
            extra = {
                "grad_norm": grad_norm,
                # The optimiser counts the updates that were applied.
                "learning_rate": self.schedule(state.guard.accepted),
                "guard/in_a_row": guard.skipped_in_a_row,
                **reasons,
            }
            sums |= {name: metrics_lib.pair(value, 1.0) for name, value in extra.items()}
            return new, sums

    def _merged(self, sums, found, phase: Phase):
        """Return the metrics of all phases so far; "loss" without a prefix is the last phase's."""
        if phase is not self.phases[-1]:
            found = {(f"{phase.name}/loss" if k == "loss" else k): v for k, v in found.items()}
        clash = sums.keys() & found.keys()
        if clash:
            raise JaxherdError(f"phase {phase.name!r} repeats the metrics {sorted(clash)}.")
        return {**sums, **found}

    def _averaged(self, state: TrainState, params, accept):
        decay = self.config.average_decay
        if decay is None:
            return None
        due = accept & ((state.guard.accepted + 1) % self.config.average_every == 0)
        return jax.tree.map(
            lambda a, p: jnp.where(due, decay * a + (1 - decay) * p, a).astype(a.dtype),
            state.average,
            params,
        )

    def _gradients(self, phase: Phase, owned, rest, buffers, batch, key, frozen, step):
        """Return the gradient of a phase over all microbatches together, and the metric sums."""

        def loss(owned, batch, key):
            params = phase.put(owned, rest)
            return self._loss(params, buffers, batch, key, frozen, phase.objective, step)

        differentiate = jax.value_and_grad(loss, has_aux=True)
        parts = self.config.accumulate
        if parts == 1:
            (_, sums), gradients = differentiate(owned, batch, key)
            return gradients, sums

        # Microbatch i takes groups of rows i, i + parts, ...: no row leaves its device.
        group = rows_together(phase.objective)

        def strided(x):
            grouped = x.reshape(x.shape[0] // (parts * group), parts, group, *x.shape[1:])
            return jnp.moveaxis(grouped, 1, 0).reshape(parts, -1, *x.shape[1:])

        def body(carry, part):
            total, sums = carry
            index, micro = part
            (_, new), gradients = differentiate(owned, micro, jax.random.fold_in(key, index))
            weight = new["loss"][1]
            total = jax.tree.map(lambda a, g: a + weight * g.astype(a.dtype), total, gradients)
            return (total, metrics_lib.add(sums, new)), None

        micro = jax.tree.map(strided, batch)
        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda: loss(owned, first, key)[1])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), owned), zeros)
        (total, sums), _ = jax.lax.scan(body, start, (jnp.arange(parts), micro))
        weight = jnp.maximum(sums["loss"][1], 1e-9)
        gradients = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), total, owned)
        return gradients, sums

    def evaluate(
        self, state: TrainState, batch: Mapping[str, Any], frozen: Any = None, objective: Any = None
    ) -> metrics_lib.Metrics:
        """Return the metric sums of a batch; of the step's own objective when None is given."""
        return self.evaluation(objective)(state, batch, frozen)

    def evaluation(self, objective: Any = None) -> Any:
        """Return the jitted function (state, batch, frozen) -> metric sums of an objective."""
        objective = self.objective if objective is None else objective
        if objective not in self._evaluations:

            def run(state, batch, frozen):
                with self.partitioner.activate():
                    key = jax.random.wrap_key_data(state.key)
                    _, found = self._loss(
                        _used(state), state.buffers, batch, key, frozen, objective, state.step
                    )
                    return metrics_lib.taken(state.buffers, found)[1]

            self._evaluations[objective] = jax.jit(
                run,
                # The batch comes as it is laid out: it need not have the training batch's fields.
                in_shardings=(self.state_shardings(), None, self.frozen_shardings or None),
                out_shardings=self._replicated,
            )
        return self._evaluations[objective]


def rows_together(objective: Any) -> int:
    """Return how many successive rows an objective looks at as one (a pair has two)."""
    return int(getattr(objective, "rows_together", 1))


def _used(state: TrainState) -> Any:
    """Return the parameters that stand for the model outside of training."""
    return state.params if state.average is None else state.average
