"""Which prompts online RL trains on: those of medium and high difficulty for the policy of today.

Llama 4's online RL is disclosed to alternate training with filtering prompts, so that medium-to-hard
ones stay (llama4.md section 7); how difficulty is estimated, the band and how often are not.  Here
it is the share of k sampled answers that pass.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxherd.core.errors import JaxherdError


@dataclasses.dataclass(frozen=True)
class PromptFilter:
    """The rule; every number is jaxherd's choice, none is disclosed.

    Attributes:
      every: rounds between two estimates; the first comes before the first round.  0 keeps all
        prompts for good.
      samples: k.
      pass_reward: an answer passes with at least this reward.
      lowest, highest: the band of pass rates that stay, both ends included.
      least: prompts that every capability keeps (all, if it has no more): those nearest to the
        band make up for missing ones, so that no batch lacks a capability.
    """

    every: int = 8
    samples: int = 4
    pass_reward: float = 1.0
    lowest: float = 0.0
    highest: float = 0.75
    least: int = 8

    def __post_init__(self):
        if self.every < 0 or min(self.samples, self.least) < 1:
            raise JaxherdError("filter.every must not be negative, samples and least at least 1.")
        if not 0 <= self.lowest <= self.highest <= 1 or not 0 < self.pass_reward <= 1:
            raise JaxherdError(
                f"filter.lowest={self.lowest} and highest={self.highest} must be in order within "
                f"[0, 1], and pass_reward={self.pass_reward} above 0 and at most 1."
            )

    def period(self, round_number: int) -> int:
        """Return the number of the estimate that a round goes by."""
        return round_number // self.every if self.every else 0

    def begins(self, round_number: int) -> bool:
        """Return whether a new estimate is due before this round."""
        return bool(self.every) and round_number % self.every == 0

    def pass_rates(self, rewards_Nk: Float[np.ndarray, "N k"]) -> Float[np.ndarray, "N"]:
        """Return the share of answers that pass, of each prompt."""
        return (rewards_Nk >= self.pass_reward).mean(axis=1)

    def kept(
        self, rates_N: Float[np.ndarray, "N"], capabilities: Sequence[str]
    ) -> Int[np.ndarray, "K"]:
        """Return the places of the prompts that stay, in their order.

        Args:
          rates_N: pass rates.
          capabilities: of the same prompts.
        """
        # Distance to the band: 0 inside.
        distance_N = np.maximum(self.lowest - rates_N, rates_N - self.highest).clip(min=0.0)
        names, stays = np.asarray(capabilities), []
        for name in dict.fromkeys(capabilities):
            places = np.flatnonzero(names == name)
            nearest = places[np.argsort(distance_N[places], kind="stable")]
            inside = int((distance_N[places] == 0).sum())
            stays.append(nearest[: max(inside, self.least)])
        return np.sort(np.concatenate(stays))


def draw_prompts(
    kept: Int[np.ndarray, "K"],
    capabilities: Sequence[str],
    count: int,
    chance: np.random.Generator,
    first: int = 0,
) -> Int[np.ndarray, "N"]:
    """Return the places of `count` prompts, capability by turns, each in random order.

    A capability with too few prompts gives them again.

    Args:
      kept: places to draw from.
      capabilities: of all prompts, by place.
      count: N.
      chance: of the order within a capability.
      first: which capability begins, so that what does not divide evenly goes round.
    """
    places = [int(place) for place in kept]
    names = sorted({capabilities[place] for place in places})
    orders = {
        name: chance.permutation([p for p in places if capabilities[p] == name]) for name in names
    }
    turns = [names[(first + turn) % len(names)] for turn in range(count)]
    taken = dict.fromkeys(names, 0)
    drawn = []
    for name in turns:
        drawn.append(orders[name][taken[name] % len(orders[name])])
        taken[name] += 1
    return np.asarray(drawn, np.int64)
