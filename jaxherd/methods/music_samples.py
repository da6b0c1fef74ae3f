"""A stage that plays what a music model has learnt: latents sampled on the whole mesh, then sound.

The sampler is one program (condition, grid and guidance inside), laid out like the training step,
so that `jaxherd plan` compiles for a slice just what this stage runs there.

Axis letters: B batch, F frames, L latent width.  Source: melodyflow.md 5.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core import batch as batch_lib
from jaxherd.core.batch import BatchSpec
from jaxherd.core.errors import JaxherdError
from jaxherd.core.experiment import StageContext
from jaxherd.core.layouts import Layout
from jaxherd.core.modules import abstract, cast_floating, split
from jaxherd.core.sharding import Partitioner
from jaxherd.data.audio.files import write_audio
from jaxherd.data.audio.latents import LatentClips
from jaxherd.methods.flow_sampling import SamplingPlan, evaluations, guided, solve
from jaxherd.methods.music_files import load_music
from jaxherd.models.velocity_transformer import VelocityTransformerConfig
from jaxherd.training.plots import music_figure
from jaxherd.training.stage import StepConfig, batch_shardings, load_model


class Sampler:
    """The compiled sampler of a stage on some devices: `step(parts, batch) -> latents`."""

    def __init__(self, stage: "SampleMusic", devices: Any, options: Mapping[str, Any]):
        self.partitioner = Partitioner.create(stage.layout, devices)
        self._plan = stage.plan
        dtype = jnp.dtype(stage.step.compute_dtype)
        self.definition, *parts = split(
            abstract(lambda key: cast_floating(stage.model.build(key), dtype), jax.random.key(0))
        )
        shardings = [
            self.partitioner.tree_shardings(axes, shapes)
            for axes, shapes in zip(self.definition.axes(), parts)
        ]
        self.parts = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            parts,
            shardings,
        )
        self.batch_shardings = batch_shardings(stage.batch_spec(), self.partitioner)
        self.step = jax.jit(
            self._sample,
            in_shardings=(shardings, self.batch_shardings),
            out_shardings=self.batch_shardings["noise"],
            compiler_options=dict(options) or None,
        )

    def _sample(self, parts, batch):
        with self.partitioner.activate():
            model = self.definition.merge(*parts)
            condition = model.condition(batch)
            velocity = guided(model, condition, self._plan.guidance)
            return solve(velocity, batch["noise"], self._plan)


@dataclasses.dataclass(frozen=True)
class SampleMusic:
    """Draws clips for each prompt and writes them as sound with a picture each.

    Attributes:
      name, reads: as of every stage; it reads a run's codec, latents and flow.
      model, clips: what the flow's stage trained, and on what.
      batch_size: clips of one call of the sampler; prompts are repeated to fill it.
      plan: grid, solver and guidance; the paper's default of 64 midpoint evaluations.
      prompts: labels, or captions where conditions are text; the model's labels when empty.
      layout, step: of the sampler; weights are cast to the step's `compute_dtype`.
      keep: clips that are decoded and written.
    """

    name: str
    model: VelocityTransformerConfig
    clips: LatentClips
    batch_size: int = 8
    plan: SamplingPlan = SamplingPlan()
    prompts: tuple[str, ...] = ()
    layout: Layout = Layout("single")
    step: StepConfig = StepConfig()
    keep: int = 6
    codec: str = "codec"
    latents: str = "latents"
    flow: str = "flow"

    writes: ClassVar[str] = "a .wav and a .png for each clip that is kept"

    @property
    def reads(self) -> tuple[str, ...]:
        """The stages of the model's parts."""
        return (self.codec, self.latents, self.flow)

    def batch_spec(self) -> BatchSpec:
        """Return what the sampler is given: noise and conditions."""
        spec = dataclasses.replace(
            self.clips, batch_size=self.batch_size, coupling_group=1
        ).batch_spec()
        return {name: field for name, field in spec.items() if name not in _MADE}

    def program(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> Sampler:
        """Return the sampler for these devices, real or abstract.

        Raises:
          JaxherdError: the layout or the batch does not fit the devices.
        """
        return Sampler(self, tuple(devices), compiler_options or {})

    def abstract_inputs(self, program: Sampler) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of the sampler as shapes with shardings."""
        return program.parts, batch_lib.abstract(self.batch_spec(), program.batch_shardings)

    def check(self, devices: Any, compiler_options: Mapping[str, Any] | None = None) -> None:
        """Trace the sampler on shapes alone.

        Raises:
          JaxherdError: something does not fit.
        """
        program = self.program(devices, compiler_options)
        program.step.trace(*self.abstract_inputs(program))

    def flops_per_step(self) -> float:
        """Return the FLOPs of one call: the network's, as often as it is evaluated."""
        words = max(self.clips.text_length if self.clips.text_dim else 1, 1)
        rows = self.batch_size * evaluations(self.plan)
        return self.model.forward_flops(rows, self.clips.frames, words)

    def units_per_step(self) -> int:
        """Return the frames of one call."""
        return self.batch_size * self.clips.frames

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Sample one batch, decode and write the first clips; returns what is known of them."""
        # By their names in the run's folder, which says what encoded the text.
        music = load_music(
            context.artifacts[self.flow].parent,
            codec=self.codec,
            latents=self.latents,
            flow=self.flow,
        )
        prompts = self.prompts or music.labels
        if not prompts:
            raise JaxherdError(
                f"{self.name}: this model's conditions are text: set {self.name}.prompts."
            )
        for note in music.notes(prompts):
            context.say(f"{self.name}: {note}")
        program = self.program(context.devices, context.compiler_options)
        parts = load_model(context.artifacts[self.flow], *program.parts)
        spec = self.batch_spec()
        rows = [prompts[i % len(prompts)] for i in range(self.batch_size)]
        noise = jax.random.normal(jax.random.key(context.seed), spec["noise"].shape)
        batch = {"noise": np.asarray(noise), **self._conditions(music, rows)}
        placed = {
            name: jax.make_array_from_callback(value.shape, program.batch_shardings[name],
                                               lambda index, value=value: value[index])
            for name, value in batch.items()
        }  # fmt: skip
        made = program.step(list(parts), placed)
        latents_BFL = np.asarray(jax.device_get(_gathered(made, program)))
        if jax.process_index() == 0:
            self._write(music, latents_BFL, rows, context)
        return {
            "clips": self.batch_size,
            "seconds": self.clips.frames / music.frame_rate,
            "evaluations": evaluations(self.plan),
            "latent_std": float(latents_BFL.std()),
        }

    def _conditions(self, music: Any, rows: list[str]) -> dict[str, np.ndarray]:
        if not self.clips.text_dim:
            return {"labels": np.asarray([music.label(row) for row in rows], np.int32)}
        return music.text_batch(rows, self.clips.text_dim, length=self.clips.text_length)

    def _write(self, music: Any, latents_BFL, rows: list[str], context: StageContext) -> None:
        context.folder.mkdir(parents=True, exist_ok=True)
        kept = min(self.keep, self.batch_size)
        wave_BTC = music.decode(latents_BFL[:kept], held=True)
        for index in range(kept):
            words = "-".join("".join(c if c.isalnum() else " " for c in rows[index]).split())[:40]
            path = context.folder / f"{index}-{words}.wav"
            write_audio(path, wave_BTC[index], music.sample_rate)
            music_figure(
                path.with_suffix(".png"),
                {rows[index]: wave_BTC[index]},
                latents_BFL[index],
                music.sample_rate,
                music.frame_rate,
            )
            context.say(f"{self.name}: wrote {path.name}.")

    def report(self, folder: Path) -> str:
        """Return a Markdown section with the sounds and their pictures."""
        lines = [f"## {self.name}\n"]
        for sound in sorted(folder.glob("*.wav")):
            here = f"{self.name}/{sound.name}"
            lines.append(f"[{sound.stem}]({here})\n\n![{sound.stem}]({here[:-4]}.png)\n")
        return "\n".join(lines)


# Fields of training batches that a sampler is not given: it makes clips of all frames.
_MADE = ("latents", "frame_mask")


def _gathered(made: jax.Array, program: Sampler) -> jax.Array:
    """Return the array whole on every device, so that any process can read it."""
    whole = program.partitioner.replicated()
    return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=whole)(made)
