"""Find the repeating pattern in a list of layers, so that it can be scanned."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Segment:
    """`pattern` of different layers, `count` times in a row."""

    pattern: tuple[Any, ...]
    count: int

    @property
    def length(self) -> int:
        """Layers of the segment."""
        return len(self.pattern) * self.count


def find_segments(layers: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Split layers into runs of repeated patterns, few distinct bodies first.

    From the left, the pattern whose repetition saves the most layer bodies is taken; layers that
    repeat nothing become segments of count one.
    """
    layers = tuple(layers)
    segments: list[Segment] = []
    start = 0
    while start < len(layers):
        best = Segment(layers[start : start + 1], 1)
        saved = 0
        for period in range(1, (len(layers) - start) // 2 + 1):
            pattern = layers[start : start + period]
            count = 1
            while layers[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if (count - 1) * period > saved:
                best, saved = Segment(pattern, count), (count - 1) * period
        segments.append(best)
        start += best.length
    return tuple(segments)


def locate(segments: Sequence[Segment], layer: int) -> tuple[int, int, int]:
    """Return (segment, block of the pattern, repetition) of a layer by its place in the model."""
    for index, segment in enumerate(segments):
        if layer < segment.length:
            repetition, block = divmod(layer, len(segment.pattern))
            return index, block, repetition
        layer -= segment.length
    raise IndexError(f"no layer {layer}")
