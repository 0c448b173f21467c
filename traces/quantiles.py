"""Percentiles and means of samples that may hold infinities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The percentile of an ascending sample, by linear interpolation as numpy does it; None if empty.

    Between a finite and an infinite neighbour the result is infinite, never NaN.
    """
    if not ordered:
        return None
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    weight = position - below
    low = ordered[below]
    if weight == 0:
        return low
    high = ordered[below + 1]
    return high if math.isinf(high) else low + (high - low) * weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A sample in five numbers; they are None if it was empty and infinite if a failure reaches them."""

    count: int
    mean: float | None
    median: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Distribution":
        """Summarise a sample in any order."""
        ordered = sorted(sample)
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered) if ordered else None,
            median=percentile(ordered, 50),
            p95=percentile(ordered, 95),
            p99=percentile(ordered, 99),
        )
