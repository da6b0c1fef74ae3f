"""A stage that trains: data, model, objective and optimiser on a mesh, resumable at any moment."""

import dataclasses
import functools
import inspect
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from jaxherd.core import batch as batch_lib
from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.core.experiment import StageContext, describe, write_json
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import flatten
from jaxherd.core.reports import Report
from jaxherd.core.sharding import Partitioner
from jaxherd.training import metrics as metrics_lib
from jaxherd.training.checkpoints import Checkpoints
from jaxherd.training.guards import Guards
from jaxherd.training.loggers import LOGGERS, check_loggers, open_loggers, read_records
from jaxherd.training.optimizers import Optimizer
from jaxherd.training.phases import phases_of
from jaxherd.training.progress import Counts, Progress
from jaxherd.training.step import Program, StepConfig, TrainState, rows_together
from jaxherd.training.stopping import Interrupted, StopOnSignal
from jaxherd.training.transfer import Transfer


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a stage trains and what it leaves behind.

    Attributes:
      steps: optimiser steps of the whole stage.
      eval_every: steps between evaluations; one also comes at the end.  0 evaluates at the end.
      checkpoint_every: steps between checkpoints; one also comes at the end.
      keep_checkpoints, keep_every: newest ones to keep, and multiples kept besides.
      log_every: steps between records.
      loggers: among "jsonl", "tensorboard", "wandb".
      profile_at: step at which `jax.profiler` records five steps into `profile/`; None for never.
      unit: what progress counts, the product of the batch's first two dimensions.
    """

    steps: int = 1000
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int | None = None
    log_every: int = 1
    loggers: tuple[str, ...] = ("jsonl", "tensorboard")
    profile_at: int | None = None
    unit: str = "tokens"

    def __post_init__(self):
        for name in ("steps", "checkpoint_every", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise JaxherdError(f"run.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("eval_every", "profile_at", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < (name == "keep_every"):
                raise JaxherdError(f"run.{name}={value} is too small.")
        if self.profile_at is not None and self.profile_at >= self.steps:
            raise JaxherdError(f"run.profile_at={self.profile_at} is past the {self.steps} steps.")
        for kind in self.loggers:
            if kind not in LOGGERS:
                raise JaxherdError(f"no logger {kind!r}; " + nearest(kind, LOGGERS))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A pass over held-out data with the metrics of an objective.

    Attributes:
      name: prefix of the metrics in the log.
      data: its `split` is read once, in order; the stage's own when None.
      objective: the stage's own when None.
      max_batches: stop after so many batches; None reads the split to its end.
    """

    name: str
    data: Any = None
    split: str = "heldout"
    objective: Any = None
    max_batches: int | None = None

    def source(self, own: Any) -> Any:
        """Return the data that it reads; `own` is the stage's."""
        return own if self.data is None else self.data

    def spec(self, own: Any) -> BatchSpec:
        """Return the fields of its batches: those of its split, where the data tells splits apart."""
        source = self.source(own)
        if "split" in inspect.signature(source.batch_spec).parameters:
            return source.batch_spec(self.split)
        return source.batch_spec()


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model that the objective is given and no step changes: a teacher, a reference policy.

    Attributes:
      name: its key in the objective's `frozen`.
      model: its config.
      stage: the earlier stage (among the stage's `reads`) whose last parameters it has.
    """

    name: str
    model: Any
    stage: str


@runtime_checkable
class Callback(Protocol):
    """Something to do with the model before, during or after training."""

    def __call__(self, run: "Running", moment: str) -> Mapping[str, float] | None:
        """Act; `moment` is "start", "end" or "eval".

        Numbers that come back at "eval" are logged beside those of the evaluations.
        """
        ...


@dataclasses.dataclass
class Running:
    """What callbacks, and data that asks for it, see of a stage at work."""

    stage: "TrainStage"
    context: StageContext
    program: Program
    state: TrainState
    step: int

    def model(self) -> Any:
        """Return the model with the current parameters, or their average where one is kept."""
        return self.program.module(self.state)

    def trained_model(self) -> Any:
        """Return the model with the very parameters that the next step changes."""
        return self.program.definition.merge(self.state.params, self.state.buffers)


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """Train a model.

    Attributes:
      name, reads: see `jaxherd.core.experiment.Stage`.
      model: a frozen config with `build(key)`, `num_params()` and `train_flops(...)`.
      data: a `jaxherd.core.batch.DataConfig`.
      objective: see `jaxherd.training.objectives`.
      initial: name of an earlier stage whose last parameters (their moving average, where it kept
        one) and buffers to start from; None draws fresh ones.
      evaluations, callbacks: run at "eval" moments.
      frozen: further models that the objective needs.
      transfer: a smaller model for which the learning rate was found; rates and fresh parameters of
        every matrix follow from how it grew (`jaxherd.training.transfer`).

    Data that is made from an earlier stage's artifacts says so by a true attribute
    `needs_artifacts`; its `build` is then also given `artifacts`, the folders of the stages that
    this one reads, by name.  Data that the model itself makes while it trains has an iterator with
    `attach(running)`, which is called once before the first batch.
    """

    name: str
    model: Any
    data: Any
    objective: Any
    optimizer: Optimizer = Optimizer()
    layout: Layout = Layout()
    step: StepConfig = StepConfig()
    guards: Guards = Guards()
    run_config: RunConfig = RunConfig()
    evaluations: tuple[Evaluation, ...] = ()
    callbacks: tuple[Any, ...] = ()
    initial: str | None = None
    reads: tuple[str, ...] = ()
    frozen: tuple[FrozenModel, ...] = ()
    transfer: Transfer | None = None

    writes: ClassVar[str] = "checkpoints/, config.json, metrics.jsonl, events and plots of them"

    def __post_init__(self):
        needed = [f.stage for f in self.frozen] + ([self.initial] if self.initial else [])
        for name in needed:
            if name not in self.reads:
                raise JaxherdError(
                    f"{self.name}: {name!r} is needed and not among reads={self.reads}."
                )

    def program(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> Program:
        """Return the compiled-on-use program of this stage for these devices.

        Args:
          devices: real ones, or a target's abstract devices to plan with.
          compiler_options: of XLA, the same for planning and for running.

        Raises:
          JaxherdError: the layout, the batch or a parameter does not fit the devices.
        """
        return _program(self, tuple(devices), tuple(sorted((compiler_options or {}).items())))

    def check(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> None:
        """Trace the step on shapes alone: what does not fit is told before anything is written.

        Raises:
          JaxherdError: the layout, the batch, a parameter or an activation does not fit.
        """
        words, known = (
            getattr(self.data, "vocab_size", None),
            getattr(self.model, "vocab_size", None),
        )
        if words is not None and known is not None and words > known:
            raise JaxherdError(
                f"{self.name}: the tokenizer has {words} tokens and the model knows {known}: set "
                f"{self.name}.model.vocab_size={words} or take a smaller tokenizer."
            )
        check_loggers(self.run_config.loggers)
        program = self.program(devices, compiler_options)
        state, batch, frozen = self.abstract_inputs(program)
        program.step.trace(state, batch, frozen)
        for evaluation in self.evaluations:
            spec = evaluation.spec(self.data)
            where = f"evaluation {evaluation.name!r}: "
            held_out = batch_lib.abstract(spec, batch_shardings(spec, program.partitioner, where))
            program.evaluation(evaluation.objective).trace(state, held_out, frozen)

    def _build_program(self, devices: Any, compiler_options: Mapping[str, Any]) -> Program:
        partitioner = Partitioner.create(self.layout, devices)
        spec = self.data.batch_spec()
        if self.step.accumulate > 1:
            for name, field in spec.items():
                self._check_accumulate(name, field)
        return Program(
            self.model,
            self.objective,
            self.optimizer,
            partitioner,
            total_steps=self.run_config.steps,
            config=self.step,
            guards=self.guards,
            batch_shardings=batch_shardings(spec, partitioner),
            frozen={f.name: f.model for f in self.frozen},
            transfer=self.transfer,
            compiler_options=compiler_options,
        )

    def _check_accumulate(self, name: str, field: Any) -> None:
        rows = field.shape[0]
        group = max(rows_together(phase.objective) for phase in phases_of(self.objective, {}))
        if field.axes[:1] != ("batch",) or rows % (self.step.accumulate * group):
            together = f", {group} of which belong together" if group > 1 else ""
            raise JaxherdError(
                f"step.accumulate={self.step.accumulate} does not divide the {rows} rows of batch "
                f"field {name!r}{together}; change it or the batch size."
            )

    def abstract_inputs(self, program: Program) -> tuple[TrainState, dict[str, Any], Any]:
        """Return the arguments of `program.step` as shapes with shardings."""
        batch = batch_lib.abstract(self.data.batch_spec(), program.batch_shardings)
        return program.abstract_state(), batch, program.abstract_frozen()

    def flops_per_step(self) -> float:
        """Return the useful FLOPs of one step, counted by the model (or by the objective).

        An objective whose step is more than one pass of the model defines `train_flops(model,
        spec)`; otherwise the model's own `train_flops` of the batch's first two dimensions counts.
        """
        spec = self.data.batch_spec()
        if hasattr(self.objective, "train_flops"):
            return self.objective.train_flops(self.model, spec)
        return self.model.train_flops(*next(iter(spec.values())).shape[:2])

    def units_per_step(self) -> int:
        """Return the tokens (frames, samples, ...) of one step.

        The product of the first two dimensions of the batch's first field, unless the data counts
        otherwise in a method of this name.
        """
        if hasattr(self.data, "units_per_step"):
            return self.data.units_per_step()
        field = next(iter(self.data.batch_spec().values()))
        return int(np.prod(field.shape[:2]))

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Train to the end, from the last checkpoint if there is one; returns the last metrics."""
        return _Run(self, context).run()

    def report(self, folder: Path) -> str:
        """Return a Markdown section about this stage, with plots beside it."""
        from jaxherd.training.report import stage_report

        return stage_report(self, folder)


@functools.lru_cache(maxsize=2)
def _program(
    stage: TrainStage, devices: tuple[Any, ...], options: tuple[tuple[str, Any], ...]
) -> Program:
    """Check and run share one program, and so one trace of its step."""
    return stage._build_program(devices, dict(options))


class _Run:
    """One process's work on a stage."""

    def __init__(self, stage: TrainStage, context: StageContext):
        self.stage, self.context = stage, context
        self.program = stage.program(context.devices, context.compiler_options)
        self.stop = threading.Event()
        self.signals = StopOnSignal(self.stop)
        self.frozen: Any = None

    def run(self) -> dict[str, Any]:
        stage, context, config = self.stage, self.context, self.stage.run_config
        with Counts(stage.name, quiet=context.quiet or jax.process_index() != 0) as report:
            # What is wrong with the held-out data is told now, not after hours of training.
            for evaluation in stage.evaluations:
                _close(self._open(evaluation, report))
            data = open_data(stage.data, "train", context.seed, context.artifacts, report)
        checkpoints = Checkpoints(
            context.folder / "checkpoints",
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            say=context.say,
        )
        loggers = []
        try:
            state, first = self._start(checkpoints, data)
            self.frozen = self._load_frozen()
            record = self._record_config(data)
            if jax.process_index() == 0:
                loggers = open_loggers(
                    config.loggers,
                    context.folder,
                    name=stage.name,
                    config=record,
                    resume_step=first,
                    say=context.say,
                )
            running = Running(stage, context, self.program, state, first)
            if hasattr(data, "attach"):
                data.attach(running)
            if first == 0:
                self._callbacks(running, "start")
            with self.signals, self._progress(first) as progress:
                summary = self._train(running, data, checkpoints, loggers, progress)
            self._callbacks(running, "end")
            return summary
        finally:
            for logger in loggers:
                logger.close()
            checkpoints.close()
            _close(data)

    def _start(self, checkpoints: Checkpoints, data: Any) -> tuple[TrainState, int]:
        restored = checkpoints.restore(self.program.abstract_state())
        if restored is not None:
            step, state, position = restored
            checkpoints.discard_after(step)
            data.set_state(position)
            self.context.say(f"{self.stage.name}: resuming at step {step}.")
            return state, step
        if self.stage.initial is None:
            return self.program.init(self.context.seed), 0
        wanted = self.program.abstract_state()
        folder = self.context.artifacts[self.stage.initial]
        given = load_model(folder, wanted.params, wanted.buffers)
        return self.program.init(self.context.seed, *given), 0

    def _load_frozen(self) -> Any:
        wanted = self.program.abstract_frozen()
        if wanted is None:
            return None
        found = {}
        for model in self.stage.frozen:
            params, buffers = wanted[model.name]
            given = load_model(self.context.artifacts[model.stage], params, buffers)
            missing = flatten(buffers).keys() - flatten(given[1]).keys()
            if missing:
                raise JaxherdError(
                    f"{self.stage.name}: stage {model.stage!r} has no {sorted(missing)[:4]} for the "
                    f"frozen model {model.name!r}: give it the config that the stage trained."
                )
            found[model.name] = list(given)
        return found

    def _record_config(self, data: Any) -> dict[str, Any]:
        about = data.describe() if hasattr(data, "describe") else {}
        record = {"stage": describe(self.stage), "data": about}
        if jax.process_index() == 0:
            for note in about.get("notes", ()):
                self.context.say(f"{self.stage.name}: {note}")
            write_json(self.context.folder / "config.json", record)
            if hasattr(self.stage.data, "export"):
                self.stage.data.export(self.context.folder)
        return record

    def _progress(self, first: int) -> Progress:
        stage = self.stage
        quiet = self.context.quiet or jax.process_index() != 0
        return Progress(
            stage.name, stage.run_config.steps, first, stage.run_config.unit, quiet=quiet
        )

    def _train(self, running, data, checkpoints, loggers, progress) -> dict[str, Any]:
        stage, config, program = self.stage, self.stage.run_config, self.program
        units = stage.units_per_step()
        # One step's metrics are read while the next one runs: the host never waits for the device.
        waiting: tuple[int, Any] | None = None
        last: dict[str, Any] = {}
        summary: dict[str, Any] = {}
        profiling, nothing_left = False, running.step == config.steps
        if running.step and self._missed_evaluation(running.step):
            summary = self._evaluate(running, loggers, progress)
        for step in range(running.step, config.steps):
            if config.profile_at == step:
                jax.profiler.start_trace(str(self.context.folder / "profile"))
                profiling = True
            batch = batch_lib.to_global(next(data), program.batch_shardings)
            running.state, sums = program.step(running.state, batch, self.frozen)
            running.step = step + 1
            if waiting is not None:
                last = self._log(*waiting, loggers, progress, units)
            waiting = (step + 1, sums)
            final = step + 1 == config.steps
            if profiling and (final or step == (config.profile_at or 0) + 4):
                jax.block_until_ready(sums)
                jax.profiler.stop_trace()
                profiling = False
            evaluate = self._evaluates_at(step + 1)
            stopping = self._stopping(step + 1)
            save = final or (step + 1) % config.checkpoint_every == 0 or stopping
            if evaluate or save:
                last = self._log(*waiting, loggers, progress, units)
                waiting = None
            if stopping and jax.process_index() == 0:
                progress.say("stopping after this step; saving a checkpoint first.")
            if save and (stopping or not evaluate):
                checkpoints.save(step + 1, running.state, data.get_state())
            if stopping and not final:
                # Whoever asked may not wait for an evaluation: a resumed run makes up for it.
                self._interrupt(step + 1, checkpoints)
            if evaluate:
                summary = self._evaluate(running, loggers, progress)
                if save and not stopping:
                    checkpoints.save(step + 1, running.state, data.get_state())
        if nothing_left:
            summary = self._evaluate(running, loggers, progress)
        checkpoints.wait()
        if self._stopping(0):  # asked during the last step: later stages do not begin
            self._interrupt(config.steps, checkpoints)
        last = last or self._last_record(config.steps)
        return {
            "step": running.step,
            **{f"train/{k}": v for k, v in last.items() if np.ndim(v) == 0},
            **summary,
        }

    def _evaluates_at(self, step: int) -> bool:
        config = self.stage.run_config
        return step == config.steps or bool(config.eval_every) and step % config.eval_every == 0

    def _missed_evaluation(self, step: int) -> bool:
        """Whether an earlier run stopped at `step` before the evaluation that was due there."""
        config = self.stage.run_config
        measures = self.stage.evaluations or self.stage.callbacks
        if not measures or step == config.steps or not self._evaluates_at(step):
            return False
        records = read_records(self.context.folder / "metrics.jsonl")
        return not any(r["kind"] == "eval" and r["step"] == step for r in records)

    def _interrupt(self, step: int, checkpoints: Checkpoints) -> None:
        checkpoints.wait()
        raise Interrupted(
            f"{self.stage.name}: stopped at step {step}, checkpoint saved; run the same command to "
            "go on.",
            exit_status=128 + self.signals.asked_by,
        )

    def _last_record(self, step: int) -> dict[str, Any]:
        """Return the metrics of the last step from the log: an earlier run has made that step."""
        records = read_records(self.context.folder / "metrics.jsonl")
        found = [r for r in records if r["kind"] == "train" and r["step"] == step]
        return {k: v for k, v in found[-1].items() if k not in ("kind", "step")} if found else {}

    def _log(self, step, sums, loggers, progress, units) -> dict[str, Any]:
        values = metrics_lib.means(jax.device_get(sums))
        plain = {k: (v.item() if v.ndim == 0 else v) for k, v in values.items()}
        progress.update(step, units, plain.get("loss"))
        sentence = self.stage.guards.explain(step, plain)
        if sentence and jax.process_index() == 0:
            progress.say(sentence)
        if self.stage.guards.non_finite == "raise" and plain.get("guard/non_finite"):
            raise JaxherdError(sentence or "")
        if plain["guard/in_a_row"] >= self.stage.guards.stop_after:
            raise JaxherdError(
                f"{self.stage.name}: {int(plain['guard/in_a_row'])} updates in a row were skipped "
                f"up to step {step}; lower optimizer.schedule.peak or look at the data."
            )
        if step % self.stage.run_config.log_every == 0:
            for logger in loggers:
                logger.write("train", step, plain)
        return plain

    def _evaluate(self, running, loggers, progress) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for evaluation in self.stage.evaluations:
            spec = evaluation.spec(self.stage.data)
            values = evaluate(
                self.program,
                running.state,
                evaluation,
                self._open(evaluation),
                batch_shardings(spec, self.program.partitioner),
                self.frozen,
            )
            named |= {f"{evaluation.name}/{k}": v for k, v in values.items()}
        for callback in self.stage.callbacks:
            named |= {k: np.asarray(v) for k, v in (callback(running, "eval") or {}).items()}
        # One record a step: after a kill it is there as a whole, or is made again.
        for logger in loggers if named else ():
            logger.write("eval", running.step, named)
        summary = {k: v.item() for k, v in named.items() if v.ndim == 0}
        if summary:
            shown = ", ".join(
                f"{k} {v:.4g}"
                for k, v in summary.items()
                if "/balance" not in k and "router" not in k
            )
            if jax.process_index() == 0 and not self.context.quiet:
                progress.say(f"{self.stage.name} step {running.step}: {shown}")
        return summary

    def _open(self, evaluation: Evaluation, report: Report | None = None) -> Any:
        source = evaluation.source(self.stage.data)
        return open_data(source, evaluation.split, 0, self.context.artifacts, report)

    def _callbacks(self, running: Running, moment: str) -> None:
        for callback in self.stage.callbacks:
            callback(running, moment)

    def _stopping(self, step: int) -> bool:
        """Whether any process was asked to stop; all processes agree on the step."""
        if jax.process_count() == 1:
            return self.stop.is_set()
        from jax.experimental import multihost_utils

        # jax's own service takes SIGTERM and finds a step that no process has passed.
        if step and multihost_utils.reached_preemption_sync_point(step):
            self.stop.set()
        return self.stop.is_set()


def evaluate(
    program: Program,
    state: TrainState,
    evaluation: Evaluation,
    batches: Any,
    shardings: Mapping[str, Any],
    frozen: Any = None,
) -> dict[str, np.ndarray]:
    """Return the metrics of a pass over held-out data, summed over batches and processes.

    Args:
      program, state: what to evaluate.
      evaluation: its objective and number of batches.
      batches: iterator over the pass; closed at the end.
      shardings: of the fields of its batches.
      frozen: arrays of the program's frozen models.
    Raises:
      JaxherdError: the split is empty.
    """
    total = None
    for number, batch in enumerate(batches):
        if number == evaluation.max_batches:
            break
        placed = batch_lib.to_global(batch, shardings)
        sums = program.evaluate(state, placed, frozen, evaluation.objective)
        total = sums if total is None else metrics_lib.add(total, sums)
    _close(batches)
    if total is None:
        raise JaxherdError(f"evaluation {evaluation.name!r}: split {evaluation.split!r} is empty.")
    return metrics_lib.means(jax.device_get(total))


def batch_shardings(spec: BatchSpec, partitioner: Partitioner, where: str = "") -> dict[str, Any]:
    """Return the sharding of every field of a batch.

    Raises:
      JaxherdError: a field that the layout's axes do not divide.
    """
    return {
        name: partitioner.sharding(field.axes, field.shape, f"{where}batch field {name!r}")
        for name, field in spec.items()
    }


def open_data(
    data: Any,
    split: str,
    seed: int,
    artifacts: Mapping[str, Path],
    report: Report | None = None,
) -> Any:
    """Return this process's iterator over a split; see `TrainStage` for `artifacts`.

    `report` goes to data that can tell how far the opening is (`jaxherd.core.batch.DataConfig`).
    """
    given: dict[str, Any] = {"artifacts": dict(artifacts)} if needs_artifacts(data) else {}
    if "report" in inspect.signature(data.build).parameters:
        given["report"] = report
    return data.build(
        split=split,
        seed=seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **given,
    )


def needs_artifacts(data: Any) -> bool:
    """Return whether data is made from the artifacts of earlier stages."""
    return bool(getattr(data, "needs_artifacts", False))


def _close(data: Any) -> None:
    if hasattr(data, "close"):
        data.close()


def load_model(folder: Path, abstract_params: Any, abstract_buffers: Any) -> tuple[Any, Any]:
    """Return (parameters, buffers) of the last checkpoint of another training stage.

    Raises:
      JaxherdError: there is no checkpoint, or it is of another model.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        found = checkpoints.restore_model(abstract_params, abstract_buffers)
    finally:
        checkpoints.close()
    if found is None:
        raise JaxherdError(f"{folder} holds no checkpoint to start from.")
    return found
