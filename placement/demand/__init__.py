"""Demand forecasters by name. A forecaster is one file and one line here."""

from collections.abc import Mapping
from types import MappingProxyType

from placement.demand.adaptive import Adaptive
from placement.demand.base import DemandForecaster, ForecastOptions, MakeForecaster
from placement.demand.ema import Ema
from placement.demand.last import Last
from placement.demand.loraserve import LoraServe
from placement.demand.quantile import Quantile
from placement.demand.seasonal import Seasonal
from placement.demand.trend import Trend

FORECASTERS: Mapping[str, MakeForecaster] = MappingProxyType(
    {maker.name: maker for maker in (Last, LoraServe, Ema, Trend, Adaptive, Seasonal, Quantile)}
)

DEFAULT_FORECASTER = "adaptive"
"""The closest over the traces that were tried: see the README for the figures and the command."""


def forecaster(name: str, options: ForecastOptions | None = None) -> DemandForecaster:
    """A new forecaster of this name; KeyError lists the known ones."""
    try:
        make = FORECASTERS[name]
    except KeyError:
        raise KeyError(f"unknown forecaster {name!r}; known: {', '.join(sorted(FORECASTERS))}") from None
    return make(options or ForecastOptions())


__all__ = ["DEFAULT_FORECASTER", "FORECASTERS", "DemandForecaster", "ForecastOptions", "forecaster"]
