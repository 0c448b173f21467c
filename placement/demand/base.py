"""What a demand forecaster is, what it may be told, and the rows that all of them keep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from placement.demand.rows import Floats, Plain, Rows
from placement.types import VersionId

MAX_HISTORY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastOptions:
    """What a forecaster goes by: every `epoch_s` it is told the mean of the last `window_s`, and forecasts
    the mean of the next `epoch_s`.

    `history_s` is what `loraserve` extrapolates over, `season_s` the period of `seasonal`, `quantile` what
    `quantile` forecasts: the demand that so many of an adapter's epochs stay below. ValueError names
    what is wrong.
    """

    epoch_s: float = 60.0
    window_s: float = 60.0
    history_s: float = 300.0
    season_s: float = 86_400.0
    quantile: float = 0.9

    def __post_init__(self) -> None:
        for name in ("epoch_s", "window_s", "history_s", "season_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)}; expected seconds above 0")
        if not 0.5 <= self.quantile < 1:
            raise ValueError(f"quantile: {self.quantile}; expected from 0.5 to below 1")

    @property
    def history_windows(self) -> int:
        """The windows of the history, at least two: one has no slope."""
        return max(2, min(MAX_HISTORY, round(self.history_s / self.epoch_s)))

    @property
    def season_epochs(self) -> int:
        """The epochs of a season."""
        return max(2, round(self.season_s / self.epoch_s))

    @property
    def horizon_epochs(self) -> float:
        """How many epochs lie between the middle of the last window and the middle of the next epoch; 1 where
        both are as long."""
        return (self.window_s / self.epoch_s + 1) / 2


class DemandForecaster(Protocol):
    """Forecasts tokens per second of every adapter, prompt and output.

    Guarantees: pure but for its own state, independent of the order of what it is told, never negative,
    and the same after `restore` of what `export` gave. An adapter that a window does not name had no
    tokens in it; one that is silent for long is forgotten, and then, as one that was never seen, has no
    forecast, which means 0. What an adapter without a past is worth is `placement.demand.newcomers`.
    """

    @property
    def name(self) -> str:
        """The name it is registered under."""
        ...

    def observe(self, window: Mapping[VersionId, float]) -> None:
        """The window that just ended, tokens per second; ValueError for what is no number from 0."""
        ...

    def forecast(self) -> dict[VersionId, float]:
        """Tokens per second of the next epoch; the same again until the next `observe`."""
        ...

    def export(self) -> dict[str, Plain]:
        """The state as JSON has it."""
        ...

    def restore(self, state: Mapping[str, Plain]) -> None:
        """Take over what `export` gave; ValueError if it is not this forecaster's."""
        ...


class RowForecaster(ABC):
    """A forecaster that is arithmetic on columns: one row for each adapter, and nothing else."""

    name: ClassVar[str]

    def __init__(self, widths: Mapping[str, int], patience: int) -> None:
        """`widths` as of `Rows`; an adapter silent for more than `patience` windows is forgotten."""
        self.rows = Rows(widths, patience)

    def observe(self, window: Mapping[VersionId, float]) -> None:
        """Take the window that just ended in."""
        self._update(self.rows.take(window))

    def forecast(self) -> dict[VersionId, float]:
        """The next epoch, for every adapter that is not forgotten."""
        if self.rows.num_windows == 0:
            return {}
        return self.rows.named(self._expected())

    def export(self) -> dict[str, Plain]:
        """The name and the rows."""
        return {"forecaster": self.name, **self.rows.export()}

    def restore(self, state: Mapping[str, Plain]) -> None:
        """The rows of a forecaster of this name."""
        if state.get("forecaster") != self.name:
            raise ValueError(f"the state of forecaster {state.get('forecaster')!r}; expected {self.name!r}")
        self.rows.restore(state)

    @abstractmethod
    def _update(self, tokens: Floats) -> None:
        """Move the columns on by one window; `tokens[i]` is row i's tokens per second."""

    @abstractmethod
    def _expected(self) -> Floats:
        """Tokens per second of each row in the next epoch."""


MakeForecaster = Callable[[ForecastOptions], DemandForecaster]


def fading_windows(weight: float) -> int:
    """After how many windows what is smoothed with this weight has faded to a thousandth."""
    windows, left = 0, 1.0
    while left > 1e-3:
        left *= 1 - weight
        windows += 1
    return windows
