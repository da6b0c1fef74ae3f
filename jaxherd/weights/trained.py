"""Models of our own runs: the folder of a run, or of one of its stages, as a source."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxherd.core.errors import JaxherdError
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.training.replica import load_replica
from jaxherd.weights import registry


def trained_folder(path: pathlib.Path) -> pathlib.Path | None:
    """Return the stage folder that `path` is, or the last trained stage of a run's folder.

    None where it is neither.
    """
    if _is_stage(path):
        return path
    if not (path / "run.json").is_file():
        return None
    order = [s.get("name", "") for s in _stages(registry.read_json(path / "run.json"))]
    trained = [path / name for name in order if name and _is_stage(path / name)]
    if not trained:
        raise JaxherdError(f"no stage of the run in {str(path)!r} has a checkpoint yet.")
    return trained[-1]


def load_trained(folder: pathlib.Path, dtype: Any = None) -> Any:
    """Return the model of a stage's last checkpoint (its moving average, where it kept one).

    Raises:
      JaxherdError: the model's class is not registered, or no checkpoint is sound.
    """
    stage, config = registry.read_json(folder / "config.json")["stage"], trained_config(folder)
    kind = jnp.dtype(stage.get("step", {}).get("param_dtype", "float32"))
    definition, *parts = split(abstract(config.build, jax.random.key(0)))

    def placed(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, kind if floating else leaf.dtype)

    params, buffers = load_replica(folder, *jax.tree.map(placed, parts))
    return cast_floating(definition.merge(params, buffers), dtype)


def trained_config(folder: pathlib.Path) -> Any:
    """Return the config of the model that a stage trains.

    Raises:
      JaxherdError: the model's class is not registered.
    """
    stage = registry.read_json(folder / "config.json")["stage"]
    return registry.own_config(
        {"version": registry.VERSION, "model": stage.get("model")}, str(folder)
    )


def _is_stage(path: pathlib.Path) -> bool:
    config = path / "config.json"
    if not (path / "checkpoints").is_dir() or not config.is_file():
        return False
    return isinstance(registry.read_json(config).get("stage"), dict)


def _stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    experiment = run.get("experiment")
    stages = experiment.get("stages") if isinstance(experiment, dict) else None
    return [stage for stage in stages or [] if isinstance(stage, dict)]
