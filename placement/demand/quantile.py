"""`quantile`: what an adapter's demand stays below in so many of its epochs, for who has to provide for it.

An adapter's tokens come as a compound process, requests of random lengths at random times, so that what is
to be added to the mean follows from how far windows were from what was expected of them: a running variance
of its own, drawn towards the index of dispersion (variance per token/s) of all adapters, of which a rare
adapter's few windows say more than they do of itself. The quantile is that of a Gamma distribution with this
mean and variance, which a compound Poisson sum is close to and which is never below 0.
"""

from math import fsum
from typing import ClassVar

import numpy as np

from placement.demand.base import ForecastOptions, RowForecaster, fading_windows
from placement.demand.rows import Floats

LEVEL_WEIGHT = 0.3
VARIANCE_WEIGHT = 0.1
POOLED_WINDOWS = 1.0
"""How many of its own windows the dispersion of all is worth; with more, steady adapters get too much."""

_NOTHING = 1e-9


class Quantile(RowForecaster):
    """Keeps a level and the mean square of the errors of one window ahead."""

    name: ClassVar[str] = "quantile"

    def __init__(self, options: ForecastOptions, *, level_weight: float = LEVEL_WEIGHT) -> None:
        self._quantile = options.quantile
        self._weight = level_weight
        super().__init__({"level": 1, "square": 1}, patience=fading_windows(VARIANCE_WEIGHT))

    def _update(self, tokens: Floats) -> None:
        rows = self.rows
        if rows.num_windows == 1:
            rows["level"] = tokens
            return
        error = tokens - rows["level"]
        # A plain mean of the few first ones, so that the zero it began with does not count.
        weight = max(VARIANCE_WEIGHT, 1.0 / (rows.num_windows - 1))
        rows["square"] = rows["square"] + weight * (error**2 - rows["square"])
        rows["level"] = rows["level"] + self._weight * error

    def _expected(self) -> Floats:
        level = self.rows["level"]
        variance = self._variance(level)
        expected = level.copy()
        at = np.flatnonzero((level > _NOTHING) & (variance > _NOTHING * level**2))
        if at.size:
            from scipy.special import gammaincinv

            shape = level[at] ** 2 / variance[at]
            expected[at] = gammaincinv(shape, self._quantile) * variance[at] / level[at]
        return expected

    def _variance(self, level: Floats) -> Floats:
        square = self.rows["square"]
        total = fsum(level)
        dispersion = fsum(square) / total if total > 0 else 0.0
        own = min(self.rows.num_windows - 1, 1 / VARIANCE_WEIGHT)
        return np.asarray((own * square + POOLED_WINDOWS * dispersion * level) / (own + POOLED_WINDOWS))
