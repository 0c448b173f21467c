"""What `loraserve forecast` measures: forecasters on a trace, epoch by epoch, against what came."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import BadInputError
from placement.demand import FORECASTERS, DemandForecaster, ForecastOptions, forecaster
from placement.demand.errors import ErrorFigures, ForecastErrors
from placement.types import VersionId
from traces.columns import TraceColumns
from traces.demand import demand_tokens_per_s

MAX_EPOCHS = 1_000_000
SILENT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts:
    """The errors of each forecaster by its name, in the order asked for, on the same epochs: those from the
    end of the first epoch on, `epoch_ends_s` each one's end."""

    columns: TraceColumns
    options: ForecastOptions
    errors: Mapping[str, ForecastErrors]
    epoch_ends_s: tuple[float, ...]

    @property
    def figures(self) -> dict[str, ErrorFigures]:
        """The figures by forecaster."""
        return {name: errors.figures() for name, errors in self.errors.items()}


@dataclass(slots=True)
class ForecastProgress:
    """How far it is, for `loraserve.cli.progress`; silent at first, for most traces take no second."""

    share: float = 0.0
    doing: str = ""
    listeners: list[Callable[["ForecastProgress"], None]] = field(default_factory=list)
    begun_s: float = field(default_factory=time.monotonic)

    def tell(self, done: int, of: int) -> None:
        """So many epochs of so many."""
        self.share, self.doing = done / of, f"epoch {done} of {of}"
        if time.monotonic() - self.begun_s > SILENT_S:
            for listener in self.listeners:
                listener(self)


def check_names(names: tuple[str, ...]) -> None:
    """BadInputError for a forecaster that there is not."""
    for name in names:
        if name not in FORECASTERS:
            known = ", ".join(sorted(FORECASTERS))
            raise BadInputError(f"--forecasters: {name!r} is unknown; known: {known}")


def measure(
    columns: TraceColumns,
    names: tuple[str, ...],
    options: ForecastOptions,
    progress: ForecastProgress | None = None,
) -> Forecasts:
    """Forecast every epoch of the trace but the first; one that the trace's end cuts short is left out.

    BadInputError for an unknown name, a trace without adapters, or one of fewer than two epochs.
    """
    check_names(names)
    num_epochs = _num_epochs(columns, options.epoch_s)
    versions = [VersionId(str(place)) for place in range(len(columns.adapters))]
    makes: dict[str, DemandForecaster] = {name: forecaster(name, options) for name in names}
    errors = {name: ForecastErrors() for name in names}
    for epoch in range(1, num_epochs):
        now_s = epoch * options.epoch_s
        window = _named(versions, demand_tokens_per_s(columns, max(0.0, now_s - options.window_s), now_s))
        came = _named(versions, demand_tokens_per_s(columns, now_s, now_s + options.epoch_s))
        for name, one in makes.items():
            one.observe(window)
            errors[name].add(one.forecast(), came)
        if progress is not None:
            progress.tell(epoch, num_epochs - 1)
    ends = tuple((epoch + 1) * options.epoch_s for epoch in range(1, num_epochs))
    return Forecasts(columns=columns, options=options, errors=errors, epoch_ends_s=ends)


def _num_epochs(columns: TraceColumns, epoch_s: float) -> int:
    if not columns.adapters:
        raise BadInputError(f"{columns.source}: names no adapters; give it some with --adapters")
    # The last request comes in an epoch of its own if it comes just at the end of one.
    num_epochs = int(columns.duration_s / epoch_s)
    if not 2 <= num_epochs <= MAX_EPOCHS:
        raise BadInputError(
            f"--epoch: {columns.source} has {num_epochs} whole epochs of {epoch_s:g} s in its"
            f" {columns.duration_s:g} s; expected from 2 to {MAX_EPOCHS}"
        )
    return num_epochs


def _named(versions: list[VersionId], rates: NDArray[np.float64]) -> dict[VersionId, float]:
    return {versions[place]: float(rates[place]) for place in np.flatnonzero(rates).tolist()}
