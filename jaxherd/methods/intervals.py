"""How sure a share is."""

import math


def wilson(hits: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of a share; (0, 1) where nothing was tried.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = hits / n

    Args:
      hits, trials: 0 <= hits <= trials.
      z: quantile of the normal distribution; 1.96 gives 95 %.
    """
    if trials == 0:
        return 0.0, 1.0
    share, square = hits / trials, z * z
    middle = share + square / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    # Exact at the ends, where rounding would leave 1e-17.
    low = 0.0 if hits == 0 else (middle - spread) / scale
    high = 1.0 if hits == trials else (middle + spread) / scale
    return low, high
