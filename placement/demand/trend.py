"""`trend`: a smoothed level and a damped trend (Holt's method, damped as by Gardner and McKenzie, 1985)."""

from typing import ClassVar

import numpy as np

from placement.demand.base import ForecastOptions, RowForecaster, fading_windows
from placement.demand.rows import Floats

LEVEL_WEIGHT = 0.3
TREND_WEIGHT = 0.1
DAMPING = 0.98
"""A trend is believed to go on, a fiftieth less so each epoch."""


class Trend(RowForecaster):
    """Follows a ramp with less delay than an average, and a level with more noise."""

    name: ClassVar[str] = "trend"

    def __init__(
        self,
        options: ForecastOptions,
        *,
        level_weight: float = LEVEL_WEIGHT,
        trend_weight: float = TREND_WEIGHT,
        damping: float = DAMPING,
    ) -> None:
        self._horizon = options.horizon_epochs
        self._weights = (level_weight, level_weight * trend_weight, damping)
        super().__init__({"level": 1, "trend": 1}, patience=2 * fading_windows(level_weight))

    def _update(self, tokens: Floats) -> None:
        rows = self.rows
        if rows.num_windows == 1:
            rows["level"] = tokens
            return
        of_level, of_trend, damping = self._weights
        carried = damping * rows["trend"]
        error = tokens - rows["level"] - carried
        rows["level"] = rows["level"] + carried + of_level * error
        rows["trend"] = carried + of_trend * error

    def _expected(self) -> Floats:
        damping = self._weights[2]
        steps = damping * (1 - damping**self._horizon) / (1 - damping)
        return np.asarray(np.maximum(self.rows["level"] + steps * self.rows["trend"], 0.0))
