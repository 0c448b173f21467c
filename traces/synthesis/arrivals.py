"""When requests arrive: the laws a workload may follow.

Every law places a given number of requests inside a given duration, so that workloads of different
laws offer the same load.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from traces.columns import TraceColumns
from traces.synthesis.checks import MAX_SEGMENTS, check_above_zero, check_number, check_segments
from traces.synthesis.portable import (
    Floats,
    apportion,
    counting,
    exp,
    log,
    log_gammas,
    open_uniform,
    shares,
)
from traces.synthesis.tiling import tile
from traces.types import TraceError

Load = Callable[[str], TraceColumns]
"""Reads the trace at a path."""

_MAX_CV = 20.0
_MAX_PATHS = 1_000
_STEPS_OF_DAY = 288


class Arrivals(Protocol):
    """A law of arrivals."""

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Even:
    """The same gap between any two requests."""

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        return np.asarray(np.arange(count) * duration_s / count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Exponential gaps; given their number, the arrivals are uniform points in order."""

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        return np.sort(rng.random(count)) * duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Gamma distributed gaps with a coefficient of variation; 1 is Poisson, more comes in clumps."""

    cv: float = 1.0

    def __post_init__(self) -> None:
        check_number("cv of gamma arrivals", self.cv, 0.01, _MAX_CV)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        return _renewals(log_gammas(rng, 1.0 / (self.cv * self.cv), count + 1), duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weibull:
    """Weibull distributed gaps with a coefficient of variation; 1 is Poisson."""

    cv: float = 1.0

    def __post_init__(self) -> None:
        check_number("cv of weibull arrivals", self.cv, 0.1, _MAX_CV)

    @property
    def shape(self) -> float:
        """The shape whose coefficient of variation is `cv`."""
        low, high = 0.05, 20.0
        for _ in range(80):
            middle = math.sqrt(low * high)
            ratio = math.lgamma(1 + 2 / middle) - 2 * math.lgamma(1 + 1 / middle)
            low, high = (middle, high) if ratio > math.log1p(self.cv * self.cv) else (low, middle)
        # The C library's last digits differ between machines.
        return round(low, 9)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        exponential = -log(open_uniform(rng, count + 1))
        return _renewals(log(exponential) / self.shape, duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursty:
    """LoRAServe's bursts: a share of the requests lies inside bursts, the rest is uniform.

    There are T/60 to T/20 bursts in T seconds, at uniform places, each 1 to 5 % of T long, and the
    bursts divide their requests as a flat Dirichlet does. The share is uniform in [low, high].
    """

    low: float = 0.65
    high: float = 0.80

    def __post_init__(self) -> None:
        check_number("low of bursty arrivals", self.low, 0.0, 1.0)
        check_number("high of bursty arrivals", self.high, self.low, 1.0)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        pick = rng.random(2)
        in_bursts = math.floor(count * (self.low + (self.high - self.low) * float(pick[0])))
        fewest, most = math.floor(duration_s / 60), math.floor(duration_s / 20)
        num_bursts = fewest + math.floor((most - fewest + 1) * float(pick[1]))
        num_bursts = min(max(1, num_bursts), max(1, in_bursts), MAX_SEGMENTS)
        lengths_s = (0.01 + 0.04 * rng.random(num_bursts)) * duration_s
        starts_s = np.minimum(rng.random(num_bursts) * duration_s, duration_s - lengths_s)
        counts = apportion(-log(open_uniform(rng, num_bursts)), in_bursts)
        burst = np.repeat(np.arange(num_bursts), counts)
        inside = starts_s[burst] + rng.random(in_bursts) * lengths_s[burst]
        outside = rng.random(count - in_bursts) * duration_s
        return np.sort(np.concatenate((inside, outside)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Markov:
    """A Markov-modulated Poisson process: each state has a relative rate and a mean stay in seconds.

    From one state it goes to any other with the same probability; it starts in equilibrium.
    """

    rates: tuple[float, ...] = (1.0, 5.0)
    stays_s: tuple[float, ...] = (60.0, 15.0)

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.stays_s) or len(self.rates) < 2:
            raise TraceError("markov arrivals need a rate and a stay for each of two or more states")
        for rate, stay_s in zip(self.rates, self.stays_s, strict=True):
            check_number("a rate of markov arrivals", rate, 0.0, 1e9)
            check_above_zero("a stay of markov arrivals", stay_s, 1e9)
        if max(self.rates) <= 0:
            raise TraceError("all rates of markov arrivals are 0; one must be above 0")

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        steps = check_segments("a mean stay of markov arrivals", duration_s, min(self.stays_s))
        for _ in range(_MAX_PATHS):
            edges_s, rates = self._path(steps, duration_s, rng)
            if np.any(rates[: np.searchsorted(edges_s, duration_s)]):
                return _modulated(edges_s, rates, count, duration_s, rng)
        raise TraceError(f"markov arrivals of rates {self.rates} hardly ever leave the states of rate 0")

    def _path(self, steps: int, duration_s: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Where the states change, up to or beyond the end, and the rates between."""
        mean_s, rate_of = np.asarray(self.stays_s), np.asarray(self.rates)
        states = len(mean_s)
        state = int(np.searchsorted(np.cumsum(shares(mean_s)), float(rng.random()))) % states
        edges, rates = [np.zeros(1)], []
        while edges[-1][-1] < duration_s:
            hops = np.floor(rng.random(64 + steps) * (states - 1)).astype(np.int64) + 1
            path = (state + np.cumsum(np.concatenate(([0], hops)))) % states
            stays_s = -log(open_uniform(rng, len(hops))) * mean_s[path[:-1]]
            edges.append(edges[-1][-1] + np.cumsum(stays_s))
            rates.append(rate_of[path[:-1]])
            state = int(path[-1])
        return np.concatenate(edges), np.concatenate(rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """A rate that swings like a day, `peak_to_trough` times higher at its peak than at its lowest.

    The run begins at the lowest rate. A day lasts `period_s`; 0 makes the whole run one day.
    """

    peak_to_trough: float = 4.0
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        check_number("peak_to_trough of day arrivals", self.peak_to_trough, 1.0, 1e6)
        check_number("period_s of day arrivals", self.period_s, 0.0, 1e9)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        steps = _STEPS_OF_DAY
        # Rounded, because the C library's last digits differ between machines.
        waves = [round(0.5 - 0.5 * math.cos(2 * math.pi * (step + 0.5) / steps), 9) for step in range(steps)]
        rates = tuple(1.0 + (self.peak_to_trough - 1.0) * wave for wave in waves)
        return Curve(rates=rates, period_s=self.period_s).times(count, duration_s, rng, load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """An inhomogeneous Poisson process whose relative rates divide a period evenly and then start over;
    a `period_s` of 0 stretches them over the run."""

    rates: tuple[float, ...]
    period_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.rates or len(self.rates) > MAX_SEGMENTS:
            raise TraceError(f"a curve has 1 to {MAX_SEGMENTS:,} rates, not {len(self.rates)}")
        for rate in self.rates:
            check_number("a rate of a curve", rate, 0.0, 1e9)
        check_number("period_s of a curve", self.period_s, 0.0, 1e9)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        step_s = (self.period_s or duration_s) / len(self.rates)
        steps = check_segments("a step of the curve", duration_s, step_s)
        rates = np.resize(np.asarray(self.rates, dtype=np.float64), steps)
        if not np.any(rates):
            raise TraceError("the curve has no rate above 0 within the run")
        return _modulated((counting(steps + 1) - 1.0) * step_s, rates, count, duration_s, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTrace:
    """The arrivals of a trace file, repeated if it has too few and squeezed or stretched to the run."""

    path: str

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        times_s = tile(load(self.path), count + 1).arrival_s
        if times_s[-1] <= 0:
            raise TraceError("all its requests arrive at once; no rate can be made of it", source=self.path)
        return np.asarray(times_s[:-1] / times_s[-1] * duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateOfTrace:
    """Poisson arrivals at the rate of a trace file, counted in bins and stretched over the run."""

    path: str
    bins: int = 60

    def __post_init__(self) -> None:
        check_number("bins of a trace's rate", self.bins, 1, MAX_SEGMENTS)

    def times(self, count: int, duration_s: float, rng: np.random.Generator, load: Load) -> Floats:
        """`count` rising times from 0 to `duration_s`."""
        trace = load(self.path)
        width_s = trace.duration_s / self.bins or 1.0
        places = np.minimum(np.floor(trace.arrival_s / width_s), self.bins - 1).astype(np.int64)
        rates = np.bincount(places, minlength=self.bins)
        return Curve(rates=tuple(rates.tolist())).times(count, duration_s, rng, load)


def _renewals(log_gaps: Floats, duration_s: float) -> Floats:
    """All but the last of the points that follow the gaps, which are stretched to fill the run.

    For gamma gaps (and so for Poisson) this is exactly the process given its number of arrivals.
    """
    points = np.cumsum(exp(log_gaps - np.max(log_gaps)))
    return np.asarray(points[:-1] / points[-1] * duration_s)


def _modulated(
    edges_s: Floats, rates: Floats, count: int, duration_s: float, rng: np.random.Generator
) -> Floats:
    """`count` arrivals of a Poisson process with these rates between the edges, by inversion."""
    edges_s = np.minimum(edges_s, duration_s)
    expected = np.concatenate(([0.0], np.cumsum(np.diff(edges_s) * rates)))
    targets = np.sort(rng.random(count)) * expected[-1]
    piece = np.minimum(np.searchsorted(expected, targets, side="right") - 1, len(rates) - 1)
    rate = np.where(rates[piece] > 0, rates[piece], 1.0)
    times_s = edges_s[piece] + (targets - expected[piece]) / rate
    return np.asarray(np.minimum(times_s, edges_s[piece + 1]))


ARRIVALS: dict[str, type[Arrivals]] = {
    "even": Even,
    "uniform": Even,
    "poisson": Poisson,
    "gamma": Gamma,
    "weibull": Weibull,
    "bursty": Bursty,
    "markov": Markov,
    "day": Day,
    "curve": Curve,
    "trace": FromTrace,
    "trace-rate": RateOfTrace,
}
"""The names of the laws in text, such as `gamma:cv=4`."""
