"""`last`: the next epoch is as the last window was. What every other forecaster must beat."""

from typing import ClassVar

from placement.demand.base import ForecastOptions, RowForecaster
from placement.demand.rows import Floats


class Last(RowForecaster):
    """Remembers one window."""

    name: ClassVar[str] = "last"

    def __init__(self, options: ForecastOptions) -> None:
        super().__init__({"tokens": 1}, patience=0)

    def _update(self, tokens: Floats) -> None:
        self.rows["tokens"] = tokens

    def _expected(self) -> Floats:
        return self.rows["tokens"]
