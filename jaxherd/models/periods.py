"""Find the repeating pattern in a list of layers, so that it can be scanned.

48 layers of three chunked and one full, again and again, are one segment: a pattern of two runs
(chunked x 3, full x 1), twelve times.  Each run compiles one layer.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One kind of layer, `length` times in a row."""

    layer: Any
    length: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of runs, `count` times in a row.

    The arrays of a run's layers are stacked in the model's order: `count * length` of them.
    """

    runs: tuple[Run, ...]
    count: int

    @property
    def period(self) -> int:
        """Layers of one pattern."""
        return sum(run.length for run in self.runs)

    @property
    def length(self) -> int:
        """Layers of the segment."""
        return self.period * self.count

    def layers_of(self, run: int) -> list[int]:
        """Return the layers of a run's stack, in its order, counted from the segment's first."""
        start = sum(r.length for r in self.runs[:run])
        return [
            repetition * self.period + start + offset
            for repetition in range(self.count)
            for offset in range(self.runs[run].length)
        ]


def find_segments(layers: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Split layers into runs of repeated patterns, few distinct bodies first.

    From the left, the pattern whose repetition saves the most layer bodies is taken; layers that
    repeat nothing become segments of count one.
    """
    layers = tuple(layers)
    segments: list[Segment] = []
    start = 0
    while start < len(layers):
        best, saved = Segment(_runs(layers[start : start + 1]), 1), 0
        for period in range(1, (len(layers) - start) // 2 + 1):
            pattern = layers[start : start + period]
            count = 1
            while layers[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if (count - 1) * period > saved:
                best, saved = Segment(_runs(pattern), count), (count - 1) * period
        segments.append(best)
        start += best.length
    return tuple(segments)


def stacked_layers(segments: Sequence[Segment], segment: int, run: int) -> list[int]:
    """Return the model's layers that are stacked in a run, in the order of the stack."""
    first = sum(s.length for s in segments[:segment])
    return [first + layer for layer in segments[segment].layers_of(run)]


def locate(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Return (segment, run, place in the run's stack) of every layer of the model."""
    places: dict[int, tuple[int, int, int]] = {}
    for s, segment in enumerate(segments):
        for r in range(len(segment.runs)):
            for place, layer in enumerate(stacked_layers(segments, s, r)):
                places[layer] = (s, r, place)
    return [places[layer] for layer in range(len(places))]


def _runs(pattern: Sequence[Hashable]) -> tuple[Run, ...]:
    return tuple(Run(layer, len(list(group))) for layer, group in itertools.groupby(pattern))
