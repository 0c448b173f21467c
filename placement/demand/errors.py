"""How far forecasts were from what came, as a few figures that say which mistake it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum

import numpy as np

from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFigures:
    """Forecast f against what came, a, both tokens per second, over every epoch and adapter where either is
    above 0 (`pairs` of them). `sum` is over all pairs, `sum_e` over epochs:

    `wape` sum |f - a| / sum a; `mae_tokens_per_s` sum |f - a| / pairs; `bias` sum (f - a) / sum a;
    `under_share` sum max(0, a - f) / sum a, the share of tokens that no forecast provided for; `coverage`
    the share of pairs with a <= f; `total_wape` sum_e |sum f - sum a| / sum a, the cluster as a whole.
    All are None where nothing came.
    """

    epochs: int
    pairs: int
    wape: float | None
    mae_tokens_per_s: float | None
    bias: float | None
    under_share: float | None
    coverage: float | None
    total_wape: float | None


@dataclass(slots=True)
class ForecastErrors:
    """Adds up the errors of one forecaster; `forecast_totals` and `totals` are tokens per second of all
    adapters, one for each epoch."""

    forecast_totals: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    _pairs: int = 0
    _covered: int = 0
    _under: float = 0.0
    _over: float = 0.0

    def add(self, forecast: Mapping[VersionId, float], came: Mapping[VersionId, float]) -> None:
        """One epoch: what was forecast for it and what came in it."""
        versions = sorted(forecast.keys() | came.keys())
        expected = np.fromiter((forecast.get(one, 0.0) for one in versions), np.float64, count=len(versions))
        actual = np.fromiter((came.get(one, 0.0) for one in versions), np.float64, count=len(versions))
        counts = (expected > 0) | (actual > 0)
        error = (expected - actual)[counts]
        self._pairs += len(error)
        self._covered += int((error >= 0).sum())
        self._under += fsum(-error[error < 0])
        self._over += fsum(error[error > 0])
        self.forecast_totals.append(fsum(expected))
        self.totals.append(fsum(actual))

    def figures(self) -> ErrorFigures:
        """What the errors add up to."""
        came = fsum(self.totals)
        missed = self._under + self._over
        of_totals = fsum(abs(f - a) for f, a in zip(self.forecast_totals, self.totals, strict=True))

        def share(value: float, of: float) -> float | None:
            return value / of if of > 0 else None

        return ErrorFigures(
            epochs=len(self.totals),
            pairs=self._pairs,
            wape=share(missed, came),
            mae_tokens_per_s=share(missed, self._pairs),
            bias=share(self._over - self._under, came),
            under_share=share(self._under, came),
            coverage=share(self._covered, self._pairs),
            total_wape=share(of_totals, came),
        )
