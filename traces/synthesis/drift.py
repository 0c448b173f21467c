"""How popularity changes while a workload runs.

A law takes the shares at the start and chooses an adapter for every request from those of its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from traces.synthesis.checks import check_above_zero, check_number, check_segments
from traces.synthesis.popularity import choose
from traces.synthesis.portable import Floats, exp, normals, permutation
from traces.types import TraceError

Places = NDArray[np.int64]

_MAX_SWAPS = 10_000


class Run(NamedTuple):
    """What a drift may know of a workload.

    `weights` are the shares per adapter at the start, `ranks` None where unknown, `times_s` the arrivals,
    and `uniform` one number per request to choose with.
    """

    weights: Floats
    ranks: Sequence[int | None]
    times_s: Floats
    duration_s: float
    uniform: Floats


class Drift(Protocol):
    """A law of drifting popularity."""

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Still:
    """Popularity stays as it is."""

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        return choose(run.weights, run.uniform)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """LoRAServe's sliding: the shares move in a straight line to their mirror image over the ranks.

    The adapter of the highest rank ends with the share that the one of the lowest rank began with, and
    so on; with equal ranks the order of the adapters is mirrored.
    """

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        order = np.argsort([rank or 0 for rank in run.ranks], kind="stable")
        mirrored = np.empty_like(run.weights)
        mirrored[order] = run.weights[order[::-1]]
        # A mixture of both ends in the ratio of the time gone by is the straight line between them.
        is_late = rng.random(len(run.uniform)) * run.duration_s < run.times_s
        return np.where(is_late, choose(mirrored, run.uniform), choose(run.weights, run.uniform))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Every `every_s` each adapter takes over the share of the one before it, the first of the last."""

    every_s: float = 60.0

    def __post_init__(self) -> None:
        check_number("every_s of rotate drift", self.every_s, 1e-6, 1e9)

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        turns = np.floor(run.times_s / self.every_s) % len(run.weights)
        return (choose(run.weights, run.uniform) + turns.astype(np.int64)) % len(run.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """Every `every_s` a share of the adapters, chosen at random, trade their places at random."""

    every_s: float = 300.0
    share: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("every_s of shuffle drift", self.every_s, 1e9)
        check_number("share of shuffle drift", self.share, 0.0, 1.0)

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        number = len(run.weights)
        steps = check_segments("every_s of shuffle drift", run.duration_s, self.every_s, number)
        orders = np.empty((steps, number), dtype=np.int32)
        orders[0] = np.arange(number)
        for step in range(1, steps):
            chosen = permutation(rng, number)[: round(self.share * number)]
            orders[step] = orders[step - 1]
            orders[step, chosen] = orders[step - 1, chosen[permutation(rng, len(chosen))]]
        step_of = np.minimum(np.floor(run.times_s / self.every_s), steps - 1).astype(np.int64)
        return np.asarray(orders[step_of, choose(run.weights, run.uniform)], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """At each of these times the order of popularity is turned round at once: the most popular adapter
    gets the share of the least popular one, the second that of the last but one, and so on."""

    at_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at_s or len(self.at_s) > _MAX_SWAPS:
            raise TraceError(f"swap drift needs 1 to {_MAX_SWAPS:,} times, not {len(self.at_s)}")
        for time_s in self.at_s:
            check_number("a time of swap drift", time_s, 0.0, 1e9)

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        order = np.argsort(-run.weights, kind="stable")
        mirror = np.empty_like(order)
        mirror[order] = order[::-1]
        places = choose(run.weights, run.uniform)
        is_turned = np.searchsorted(np.sort(self.at_s), run.times_s, side="right") % 2 == 1
        return np.where(is_turned, mirror[places], places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Every `every_s` the logarithm of each adapter's weight takes a normal step of `sigma`."""

    sigma: float = 0.1
    every_s: float = 10.0

    def __post_init__(self) -> None:
        check_number("sigma of walk drift", self.sigma, 0.0, 10.0)
        check_above_zero("every_s of walk drift", self.every_s, 1e9)

    def choose(self, run: Run, rng: np.random.Generator) -> Places:
        """An adapter's place for every request."""
        number = len(run.weights)
        steps = check_segments("every_s of walk drift", run.duration_s, self.every_s, number)
        bounds = np.searchsorted(run.times_s, np.arange(1, steps) * self.every_s, side="left")
        bounds = np.concatenate(([0], bounds, [len(run.times_s)]))
        walked = np.zeros(number)
        places = np.empty(len(run.times_s), dtype=np.int64)
        for step in range(steps):
            here = slice(bounds[step], bounds[step + 1])
            # The biggest step of the walk is 0, so that no weight overflows and one stays above 0.
            weights = run.weights * exp(walked - np.max(walked[run.weights > 0]))
            places[here] = choose(weights, run.uniform[here])
            walked += self.sigma * normals(rng, number)
        return places


DRIFTS: dict[str, type[Drift]] = {
    "none": Still,
    "slide": Slide,
    "rotate": Rotate,
    "shuffle": Shuffle,
    "swap": Swap,
    "walk": Walk,
}
"""The names of the laws in text, such as `rotate:every_s=30`."""
