"""`loraserve`: the forecast of the LoRAServe paper's artifact, windows of 60 s and a history of 300 s there.

A line through an adapter's history, one step on, and no less than the least of the history and one token
per second. The artifact's own fit was not found described: least squares is our reading. What lies before
an adapter's first window counts as silence, but for what lies before the first window of all.
"""

from typing import ClassVar

import numpy as np

from placement.demand.base import ForecastOptions, RowForecaster
from placement.demand.rows import Floats

LEAST_TOKENS_PER_S = 1.0


class LoraServe(RowForecaster):
    """Keeps a history of windows, the newest in the last column; an adapter silent all through it goes."""

    name: ClassVar[str] = "loraserve"

    def __init__(self, options: ForecastOptions) -> None:
        self._length = options.history_windows
        self._horizon = options.horizon_epochs
        super().__init__({"history": self._length}, patience=self._length - 1)

    def _update(self, tokens: Floats) -> None:
        history = self.rows["history"]
        self.rows["history"] = np.concatenate((history[:, 1:], tokens[:, None]), axis=1)

    def _expected(self) -> Floats:
        known = self.rows["history"][:, -min(self._length, self.rows.num_windows) :]
        least = np.maximum(known.min(axis=1), LEAST_TOKENS_PER_S)
        return np.asarray(np.maximum(least, self._line(known)))

    def _line(self, known: Floats) -> Floats:
        """The least-squares line of each row, `horizon` after its last point."""
        mean: Floats = known.mean(axis=1)
        length = known.shape[1]
        if length == 1:
            return mean
        middle = (length - 1) / 2
        offsets = np.arange(length) - middle
        # Of differences from the mean, so that a constant has a slope of exactly 0.
        slope = (known - mean[:, None]) @ offsets / (offsets @ offsets)
        return np.asarray(mean + slope * (middle + self._horizon))
