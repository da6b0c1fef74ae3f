"""Weighted mixtures of sources, deterministic and with random access."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """A corpus and its share of the training rows."""

    corpus: str
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise JaxherdError(f"The weight of {self.corpus!r} is {self.weight}: it must be > 0.")


def endless(source: Any, *, seed: int, shuffle: bool) -> Any:
    """Return an endless `grain.MapDataset` over `source`, in a new random order every epoch."""
    import grain

    dataset = grain.MapDataset.source(source).seed(seed)
    return (dataset.shuffle() if shuffle else dataset).repeat()


def mix(datasets: Sequence[Any], weights: Sequence[float]) -> Any:
    """Interleave endless datasets so that every stretch of the result has nearly these shares."""
    import grain

    if len(datasets) == 1:
        return datasets[0]
    total = sum(weights)
    return grain.MapDataset.mix(datasets, [weight / total for weight in weights])
