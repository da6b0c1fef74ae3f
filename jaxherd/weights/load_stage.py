"""A stage that brings released weights into a run, for later stages to start from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import StageContext, describe, write_json
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import Definition, abstract, flatten, split
from jaxherd.core.sharding import Partitioner
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig
from jaxherd.training.checkpoints import Checkpoints
from jaxherd.weights.generation import load_tokenizer
from jaxherd.weights.load import load, materials_of, model_config


@dataclasses.dataclass(frozen=True)
class LoadWeights:
    """Leaves the weights of a source as a checkpoint that a `TrainStage` can name as `initial`.

    Its folder is itself a source of `jaxherd.load`, with the source's tokenizer.

    Attributes:
      name: of the stage.
      source: whatever `jaxherd.load` takes: an alias, a folder, a GGUF file, a run of ours.
      model: the config that later stages train; its parameters must have the source's names and
        shapes.  Of a multimodal source a text model gets the text part.
      layout: how the devices share the checkpoint's arrays out; each process first reads all of
        them into the memory of its host.
      dtype: of the weights; None keeps the source's, which for GGUF is float32.
    """

    name: str
    source: str
    model: Any
    layout: Layout = Layout()
    dtype: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """No other stage."""
        return ()

    def check(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> None:
        """Compare the source's shapes with the config's; no weights are read.

        Raises:
          JaxherdError: the source cannot be had, is of another model, or does not divide over the
            devices.
        """
        found = model_config(self.source)
        if isinstance(found, MultimodalDecoderConfig) and self._text_only:
            found = found.text()
        wanted, there = _shapes(self.model), _shapes(found)
        wrong = sorted(
            path for path in wanted.keys() | there.keys() if wanted.get(path) != there.get(path)
        )
        if wrong:
            path = wrong[0]
            raise JaxherdError(
                f"{self.name}: {self.source!r} is another model than the config: {path} is "
                f"{there.get(path, 'absent')} and not {wanted.get(path, 'wanted')}"
                + (f", and {len(wrong) - 1} more differ." if len(wrong) > 1 else ".")
            )
        definition, *parts = split(abstract(self.model.build, jax.random.key(0)))
        self._shardings(definition, parts, devices)

    def _shardings(self, definition: Definition, parts: Any, devices: Any) -> list[Any]:
        partitioner = Partitioner.create(self.layout, tuple(devices))
        axes = definition.axes()
        return [partitioner.tree_shardings(a, shapes) for a, shapes in zip(axes, parts)]

    @property
    def _text_only(self) -> bool:
        return not isinstance(self.model, MultimodalDecoderConfig)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Read the weights and write the checkpoint."""
        if jax.process_index() == 0:
            materials = materials_of(self.source)
            if materials is not None:
                # Later stages inherit it, and so does what they train.
                materials.record(context.folder)
                context.say(f"{self.name}: these are Llama Materials ({materials.reason}).")
            write_json(context.folder / "config.json", {"stage": describe(self)})
            try:
                load_tokenizer(self.source).save(context.folder)
            except JaxherdError as error:
                # Later stages name their own; this folder alone is then no model to talk to.
                context.say(f"{self.name}: no tokenizer comes with the weights ({error})")
        checkpoints = Checkpoints(context.folder / "checkpoints", keep=1, say=context.say)
        try:
            if not checkpoints.steps():
                # A large model fits into the host's memory and not into one device's.
                with jax.default_device(jax.local_devices(backend="cpu")[0]):
                    module = load(self.source, dtype=self.dtype, text_only=self._text_only)
                definition, *parts = split(module)
                placed = jax.tree.map(
                    _placed, parts, self._shardings(definition, parts, context.devices)
                )
                checkpoints.save(0, {"params": placed[0], "buffers": placed[1]}, {})
                checkpoints.wait()
        finally:
            checkpoints.close()
        return {"parameters": self.model.num_params()}


def _placed(leaf: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array that every process holds whole on its host as shards on the devices."""
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model."""
    _, params, _ = split(abstract(config.build, jax.random.key(0)))
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
