"""Character n-grams of a text as numbers of buckets: the input of small classifiers of text.

A text is folded (`jaxherd.data.folded_text`) and cut into windows, so that a long one cannot dilute what
stands somewhere in it.  The hash is fixed: equal texts have equal numbers on every machine.

Axis letters: N n-grams of a window, W windows.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32

from jaxherd.core.errors import JaxherdError
from jaxherd.data.folded_text import fold

_PRIME = np.uint64(0x100000001B3)
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """How text becomes numbers.

    Attributes:
      sizes: characters of the n-grams.
      buckets: numbers that there are; n-grams that share one are not told apart.
      window, stride: folded characters of a window, and from one window's beginning to the next's.
    """

    sizes: tuple[int, ...] = (2, 3, 4, 5)
    buckets: int = 1 << 15
    window: int = 256
    stride: int = 128

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > self.window:
            raise JaxherdError(f"sizes={self.sizes} must lie from 1 to window={self.window}.")
        if self.buckets < 2 or not 1 <= self.stride <= self.window:
            raise JaxherdError(
                f"buckets={self.buckets} must be at least 2 and stride={self.stride} from 1 to "
                f"window={self.window}."
            )

    @property
    def length(self) -> int:
        """N: the n-grams of a full window and of the space at either end."""
        return sum(self.window + 2 - size + 1 for size in self.sizes)

    def windows(self, text: str, *, complete: bool = True) -> list[str]:
        """Return the windows of a text; one at least, unless it is not complete.

        Args:
          text: any; it is folded here.
          complete: False leaves out what more text could change: a window that is not full.
        """
        text = fold(text)
        starts = range(0, max(1, len(text) - self.window + self.stride), self.stride)
        found = [text[start : start + self.window] for start in starts]
        return found if complete else [one for one in found if len(one) == self.window]

    def numbers(self, windows: list[str]) -> Int32[np.ndarray, "W N"]:
        """Return the bucket of every n-gram, -1 after the last."""
        found = np.full((len(windows), self.length), -1, np.int32)
        for row, window in enumerate(windows):
            codes = np.frombuffer(f" {window} ".encode("utf-32-le"), np.uint32).astype(np.uint64)
            hashes = [_hashes(codes, size) for size in self.sizes if len(codes) >= size]
            joined = np.concatenate(hashes) % np.uint64(self.buckets)
            found[row, : len(joined)] = joined.astype(np.int32)
        return found


def _hashes(codes: np.ndarray, size: int) -> np.ndarray:
    count = len(codes) - size + 1
    with np.errstate(over="ignore"):
        total = np.full(count, np.uint64(size))
        for place in range(size):
            total = (total ^ codes[place : place + count]) * _PRIME
        for factor in _MIX:
            total = (total ^ (total >> np.uint64(33))) * factor
    return total ^ (total >> np.uint64(33))
