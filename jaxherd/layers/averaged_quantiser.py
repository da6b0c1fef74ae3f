"""Residual vector quantisation whose codes are moving averages of what chose them (EnCodec's).

Each stage takes the nearest code to what the earlier stages left.  No gradient moves the codes:

    count' = d count + (1 - d) n        sum' = d sum + (1 - d) (sum of the n vectors)
    code   = sum / count

A code that is hardly used is moved to a vector of the batch; so is every code of a stage when its
turn to begin comes, one stage a step, since a stage can only be laid out on the rest that the
stages before it leave.

Axis letters: B batch, T frames, L width, Q stages, V codes, n = B T vectors of a batch.
Source: arXiv 2210.13438 3.2, as in audiocraft (decay 0.99, dead codes replaced).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxherd.core.modules import Module, buffer
from jaxherd.layers.vector_quantiser import Quantised


@dataclasses.dataclass(frozen=True)
class AveragedQuantiserConfig:
    """Residual quantiser of `stages` codebooks of full width.

    Attributes:
      dim: width L of what is quantised.
      stages: codebooks, each for the rest that the earlier ones left.
      codes: entries V of a codebook.
      commitment: weight of the loss that draws the encoder to its codes.
      decay: of the averages, for each step.
      dead: a code with less than this share of the uniform use is moved to a vector of the batch.
        Audiocraft moves one whose average falls below 2 vectors, which is no use for small batches.
    """

    dim: int
    stages: int = 8
    codes: int = 1024
    commitment: float = 1.0
    decay: float = 0.99
    dead: float = 0.1

    def build(self, key: jax.Array) -> "AveragedQuantiser":
        """Return the layer; it has no parameters, and its codes begin at zero."""
        return AveragedQuantiser(self)

    @property
    def bits_per_frame(self) -> float:
        """Bits that name one frame: stages log2(codes)."""
        return self.stages * math.log2(self.codes)

    def num_params(self) -> int:
        """Return the number of parameters that a gradient moves: none."""
        return 0

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence: the distances to all codes."""
        return 2.0 * inputs * self.stages * self.codes * self.dim


class AveragedQuantiser(Module):
    """Quantises frame by frame: a frame's codes depend on that frame alone.  In float32."""

    def __init__(self, config: AveragedQuantiserConfig):
        c = config
        self.config = config
        self.counts = buffer(jnp.zeros((c.stages, c.codes)), (None, None))
        self.sums = buffer(jnp.zeros((c.stages, c.codes, c.dim)), (None, None, None))
        self.steps = buffer(jnp.zeros(()), ())

    def _tables(self) -> Float[Array, "Q V L"]:
        # A stage that has not begun has counts and sums of zero, and codes of zero.
        return self.sums[...] / jnp.maximum(self.counts[...], 1e-9)[..., None]

    def __call__(self, latents_BTL: Float[Array, "B T L"]) -> Quantised:
        """Return the quantised latents, their codes, the commitment loss and the statistics.

        The gradient of the sum goes straight through to the latents; the commitment loss is the
        mean over stages of |rest - stop_gradient(code)|^2.
        """
        c, stop = self.config, jax.lax.stop_gradient
        batch = latents_BTL.shape[0]
        rest = rearrange(latents_BTL.astype(jnp.float32), "B T L -> (B T) L")
        codes, losses, found = [], [], []
        for table_VL in self._tables():
            chosen_n, part_nL = _nearest(stop(rest), table_VL)
            losses.append(jnp.mean(jnp.square(rest - part_nL)))
            codes.append(chosen_n)
            found.append(self._statistics(stop(rest), chosen_n))
            rest = rest - part_nL
        given = latents_BTL.astype(jnp.float32)
        left = rearrange(stop(rest), "(B T) L -> B T L", B=batch)
        counts_QV, sums_QVL, candidates_QVL = map(jnp.stack, zip(*found))
        share = counts_QV / counts_QV.sum(axis=-1, keepdims=True)
        return Quantised(
            given - left,
            rearrange(jnp.stack(codes), "Q (B T) -> B T Q", B=batch),
            c.commitment * jnp.stack(losses).mean(),
            jnp.exp(-jnp.sum(share * jnp.log(share + 1e-12), axis=-1)),
            self._renewed(counts_QV, sums_QVL, candidates_QVL),
        )

    def _renewed(self, counts_QV, sums_QVL, candidates_QVL) -> dict[str, jax.Array]:
        """Return the buffers as they are after a step with this batch."""
        c, keep = self.config, self.config.decay
        begun_Q = jnp.arange(c.stages) <= self.steps[...]
        uniform = counts_QV.sum(axis=-1, keepdims=True) / c.codes
        counts = keep * self.counts[...] + (1.0 - keep) * counts_QV
        sums = keep * self.sums[...] + (1.0 - keep) * sums_QVL
        dead_QV = counts < c.dead * uniform
        counts = jnp.where(dead_QV, uniform, counts)
        sums = jnp.where(dead_QV[..., None], candidates_QVL * uniform[..., None], sums)
        return {
            "counts": jnp.where(begun_Q[:, None], counts, self.counts[...]),
            "sums": jnp.where(begun_Q[:, None, None], sums, self.sums[...]),
            "steps": self.steps[...] + 1.0,
        }

    def _statistics(self, rest_nL, chosen_n):
        """Return counts [V], sums [V, L] and vectors of the batch [V, L] to move dead codes to."""
        rows, codes = rest_nL.shape[0], self.config.codes
        counts_V = jnp.bincount(chosen_n, length=codes).astype(jnp.float32)
        sums_VL = jnp.zeros((codes, rest_nL.shape[1])).at[chosen_n].add(rest_nL)
        # Other vectors at each step, spread over the batch by a multiplicative sequence.
        start = self.steps[...].astype(jnp.uint32) * jnp.uint32(codes)
        index_V = ((jnp.arange(codes, dtype=jnp.uint32) + start) * jnp.uint32(2654435761)) >> 7
        return counts_V, sums_VL, jnp.take(rest_nL, index_V % rows, axis=0)

    def decode(self, codes_BTQ: Int[Array, "B T Q"]) -> Float[Array, "B T L"]:
        """Return the latents that these codes name."""
        tables = self._tables()
        parts = [jnp.take(tables[q], codes_BTQ[..., q], axis=0) for q in range(len(tables))]
        return jnp.stack(parts).sum(axis=0)


def _nearest(rest_nL, table_VL):
    """Return the index of the nearest code of each vector, and the code."""
    squares_V = jnp.sum(jnp.square(table_VL), axis=-1)
    chosen_n = jnp.argmin(squares_V - 2.0 * rest_nL @ table_VL.T, axis=-1).astype(jnp.int32)
    return chosen_n, jnp.take(table_VL, chosen_n, axis=0)
