"""95% intervals of the estimates that are printed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Z = 1.959963984540054


def wilson(successes: float, n: int) -> dict[str, float]:
    """A share of successes with Wilson's score interval (1927).

    The interval stays inside [0, 1] and keeps its coverage near both ends.
    """
    if n == 0:
        return {"value": math.nan, "low": 0.0, "high": 1.0, "n": 0}
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return {"value": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def ratio(
    sums: Sequence[float], counts: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """Total of `sums` over total of `counts` (nats over tokens), with its normal interval.

    The interval is that of the delta method, so long rows count for more. n is the number of rows;
    rows of one cluster are not treated as independent.
    """
    n, total = len(sums), sum(counts)
    if n == 0 or total == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": n}
    value = sum(sums) / total
    off = mean([s - value * c for s, c in zip(sums, counts, strict=True)], clusters)
    half = off["high"] * n / total
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, float]:
    """A mean with its normal interval.

    Values of one cluster (such as the pairs of one prompt) are not treated as independent.
    """
    n = len(values)
    if n == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    average = sum(values) / n
    sums: dict[Hashable, float] = {}
    for i, value in enumerate(values):
        key = clusters[i] if clusters is not None else i
        sums[key] = sums.get(key, 0.0) + value - average
    g = len(sums)
    half = Z * math.sqrt(g / (g - 1) * sum(s * s for s in sums.values())) / n if g > 1 else math.inf
    return {"value": average, "low": average - half, "high": average + half, "n": n}
