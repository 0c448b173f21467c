"""`adaptive`: a slow, a middling and a fast average and a trend side by side, and of these the one that has
been the closest of late.

How fast demand drifts is a property of the workload more than of an adapter, and a burst of a rare adapter
says little of which memory is right for it. So the errors that choose are those of all adapters together:
a steady workload is averaged over long, one that slides is followed. On ten traces no single one of the
four is that good on all of them.
"""

from collections.abc import Mapping
from math import fsum
from typing import ClassVar

import numpy as np

from placement.demand.base import ForecastOptions, RowForecaster, fading_windows
from placement.demand.rows import Floats, Plain
from placement.demand.trend import DAMPING, LEVEL_WEIGHT, TREND_WEIGHT

AVERAGE_WEIGHTS = (0.1, 0.25, 0.5)
ERROR_WEIGHT = 0.1
"""What a window's error counts for in the running ones: half of them is of the last seven windows."""


class Adaptive(RowForecaster):
    """The averages are the columns of `averages`, the trend is `level` and `trend`, as in `Trend`; `_errors`
    has the running absolute error of each, in this order."""

    name: ClassVar[str] = "adaptive"

    def __init__(self, options: ForecastOptions) -> None:
        self._horizon = options.horizon_epochs
        self._errors = [0.0] * (len(AVERAGE_WEIGHTS) + 1)
        widths = {"averages": len(AVERAGE_WEIGHTS), "level": 1, "trend": 1}
        super().__init__(widths, patience=fading_windows(AVERAGE_WEIGHTS[0]))

    def _update(self, tokens: Floats) -> None:
        rows = self.rows
        if rows.num_windows == 1:
            rows["averages"] = np.repeat(tokens[:, None], len(AVERAGE_WEIGHTS), axis=1)
            rows["level"] = tokens
            return
        of_averages = tokens[:, None] - rows["averages"]
        carried = DAMPING * rows["trend"]
        of_trend = tokens - np.maximum(rows["level"] + carried, 0.0)
        self._judge([*of_averages.T, of_trend])
        rows["averages"] = rows["averages"] + of_averages * AVERAGE_WEIGHTS
        error = tokens - rows["level"] - carried
        rows["level"] = rows["level"] + carried + LEVEL_WEIGHT * error
        rows["trend"] = carried + LEVEL_WEIGHT * TREND_WEIGHT * error

    def _judge(self, misses: list[Floats]) -> None:
        # `fsum` is the same in whatever order the adapters stand.
        now = [fsum(np.abs(missed).tolist()) for missed in misses]
        self._errors = [
            (1 - ERROR_WEIGHT) * before + ERROR_WEIGHT * missed
            for before, missed in zip(self._errors, now, strict=True)
        ]

    def _expected(self) -> Floats:
        best = min(range(len(self._errors)), key=lambda place: self._errors[place])
        if best < len(AVERAGE_WEIGHTS):
            return np.asarray(self.rows["averages"][:, best])
        steps = DAMPING * (1 - DAMPING**self._horizon) / (1 - DAMPING)
        return np.asarray(np.maximum(self.rows["level"] + steps * self.rows["trend"], 0.0))

    def export(self) -> dict[str, Plain]:
        """The rows, and the errors."""
        return {**super().export(), "errors": list(self._errors)}

    def restore(self, state: Mapping[str, Plain]) -> None:
        """The rows and the errors; ValueError if either is not there."""
        try:
            errors = [float(error) for error in state["errors"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of {self.name}: {error}") from error
        if len(errors) != len(self._errors):
            raise ValueError(f"{len(errors)} errors; expected {len(self._errors)}")
        super().restore(state)
        self._errors = errors
