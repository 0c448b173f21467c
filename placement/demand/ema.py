"""`ema`: an exponential moving average with weight 0.5, as NVIDIA Dynamo's load estimator smooths counts.

The same stands, commented out, in the artifact of the LoRAServe paper.
"""

from typing import ClassVar

from placement.demand.base import ForecastOptions, RowForecaster, fading_windows
from placement.demand.rows import Floats

WEIGHT = 0.5


class Ema(RowForecaster):
    """Half the newest window, half what was expected of it."""

    name: ClassVar[str] = "ema"

    def __init__(self, options: ForecastOptions, *, weight: float = WEIGHT) -> None:
        self._weight = weight
        super().__init__({"level": 1}, patience=fading_windows(weight))

    def _update(self, tokens: Floats) -> None:
        is_first = self.rows.num_windows == 1
        level = self.rows["level"]
        self.rows["level"] = tokens if is_first else level + self._weight * (tokens - level)

    def _expected(self) -> Floats:
        return self.rows["level"]
