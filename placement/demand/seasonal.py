"""`seasonal`: level, damped trend and an additive season (Holt-Winters); plain `trend` for an adapter that
has not been there for a season yet.

A season is kept in at most 48 bins of equally many epochs, half-hours of a day: memory stays bounded, and a
bin's mean is less noisy than that of an epoch.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from placement.demand.base import ForecastOptions, RowForecaster
from placement.demand.rows import Floats

LEVEL_WEIGHT = 0.2
TREND_WEIGHT = 0.05
SEASON_WEIGHT = 0.3
DAMPING = 0.98
MAX_BINS = 48


class Seasonal(RowForecaster):
    """In an adapter's first season its column `season` sums what came in each bin, later it is what the
    bin is above the level."""

    name: ClassVar[str] = "seasonal"

    def __init__(self, options: ForecastOptions) -> None:
        self._horizon = options.horizon_epochs
        self._epochs = options.season_epochs
        num_bins = min(self._epochs, MAX_BINS)
        self._bins: NDArray[np.int64] = np.arange(self._epochs) * num_bins // self._epochs
        self._sizes = np.bincount(self._bins, minlength=num_bins).astype(np.float64)
        widths = {"level": 1, "trend": 1, "age": 1, "season": num_bins}
        super().__init__(widths, patience=2 * self._epochs)

    def _update(self, tokens: Floats) -> None:
        rows = self.rows
        here = self._bins[(rows.num_windows - 1) % self._epochs]
        is_grown = rows["age"] >= self._epochs
        season = rows["season"]
        carried = DAMPING * rows["trend"]
        before = tokens if rows.num_windows == 1 else rows["level"] + carried
        error = tokens - before - np.where(is_grown, season[:, here], 0.0)
        rows["level"] = before + LEVEL_WEIGHT * error
        rows["trend"] = carried + LEVEL_WEIGHT * TREND_WEIGHT * error
        season[:, here] += np.where(is_grown, SEASON_WEIGHT / self._sizes[here] * error, tokens)
        rows["age"] = rows["age"] + 1
        self._grow(np.flatnonzero(rows["age"] == self._epochs), int(here))

    def _grow(self, places: NDArray[np.int64], here: int) -> None:
        """The first season of these rows is over: what was summed becomes what is above the mean."""
        if not places.size:
            return
        sums = self.rows["season"][places]
        season = sums / self._sizes - sums.sum(axis=1, keepdims=True) / self._epochs
        self.rows["season"][places] = season
        self.rows["level"][places] -= season[:, here]

    def _expected(self) -> Floats:
        rows = self.rows
        ahead = rows.num_windows - 1 + max(1, round(self._horizon))
        season = rows["season"][:, self._bins[ahead % self._epochs]]
        steps = DAMPING * (1 - DAMPING**self._horizon) / (1 - DAMPING)
        level = rows["level"] + steps * rows["trend"]
        expected = level + np.where(rows["age"] >= self._epochs, season, 0.0)
        return np.asarray(np.maximum(expected, 0.0))
