"""A workload to synthesise as one value, and its synthesis into columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from traces.columns import BASE, TraceAdapter, TraceColumns
from traces.fill import UNKNOWN
from traces.read import read_columns
from traces.synthesis.arrivals import ARRIVALS, Arrivals, Poisson
from traces.synthesis.checks import (
    MAX_ADAPTERS,
    MAX_DURATION_S,
    MAX_REQUESTS,
    check_above_zero,
    check_number,
)
from traces.synthesis.drift import DRIFTS, Drift, Run, Still
from traces.synthesis.lengths import LENGTHS, Azure, Lengths, Limits
from traces.synthesis.notation import law_text
from traces.synthesis.popularity import POPULARITY, Popularity, Uniform
from traces.synthesis.portable import Floats, open_uniform, stream
from traces.synthesis.ranks import RANKS, EqualRanks, Ranks, lay_out
from traces.types import TraceError

_ARRIVALS, _POPULARITY, _DRIFT, _LENGTHS, _RANKS, _BASE, _ORDER = range(7)
"""The streams of random numbers. A new aspect takes a new number: the others must not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """A workload: the same spec (and the same files, where it names any) gives the same columns, bit by
    bit, on every machine.

    Each aspect draws from its own random numbers, so that changing the popularity leaves the arrivals as
    they are. `correlation` (-1 to 1) says how rank goes with popularity; None leaves laws that go by rank
    alone and makes rank independent under the others, except that adapters given by name keep their
    order. A request is for the base model with probability `base_share`.
    """

    num_requests: int
    duration_s: float
    num_adapters: int = 25
    arrivals: Arrivals = field(default_factory=Poisson)
    popularity: Popularity = field(default_factory=Uniform)
    drift: Drift = field(default_factory=Still)
    lengths: Lengths = field(default_factory=Azure)
    limits: Limits = field(default_factory=Limits)
    ranks: Ranks = field(default_factory=EqualRanks)
    correlation: float | None = None
    base_share: float = 0.0
    seed: int = 0
    name: str = "synthetic"

    def __post_init__(self) -> None:
        check_number("the number of requests", self.num_requests, 1, MAX_REQUESTS)
        check_above_zero("the duration in seconds", self.duration_s, MAX_DURATION_S)
        check_number("the number of adapters", self.num_adapters, 1, MAX_ADAPTERS)
        check_number("the base share", self.base_share, 0.0, 1.0)
        check_number("the seed", self.seed, 0, 2**63 - 1)
        if self.correlation is not None:
            check_number("the correlation of rank and popularity", self.correlation, -1.0, 1.0)
            if self.popularity.by_rank:
                raise TraceError("popularity by rank takes no correlation; choose another law, or leave it")

    @property
    def rate_per_s(self) -> float:
        """Mean requests per second."""
        return self.num_requests / self.duration_s

    def as_text(self) -> Mapping[str, object]:
        """All of it as plain values, the laws in the notation that `workload` reads."""
        return {
            "name": self.name,
            "requests": self.num_requests,
            "duration": self.duration_s,
            "adapters": self.num_adapters,
            "arrivals": law_text(self.arrivals, ARRIVALS),
            "popularity": law_text(self.popularity, POPULARITY),
            "drift": law_text(self.drift, DRIFTS),
            "lengths": law_text(self.lengths, LENGTHS),
            "max-prompt": self.limits.max_prompt_tokens,
            "max-output": self.limits.max_output_tokens,
            "over": self.limits.over,
            "ranks": law_text(self.ranks, RANKS),
            "correlation": self.correlation,
            "base-share": self.base_share,
            "seed": self.seed,
        }


def synthesise(spec: WorkloadSpec, *, load: Callable[[str], TraceColumns] | None = None) -> TraceColumns:
    """The columns of a workload; arrivals are rounded to the microsecond and count from the first.

    `load` reads the traces that laws name by path; TraceError where one is missing or fits the law not.
    """
    read = cache(load or _load)
    count = spec.num_requests
    times_s = spec.arrivals.times(count, spec.duration_s, stream(spec.seed, _ARRIVALS), read)
    adapters, weights = _adapters(spec)
    run = Run(
        weights=weights,
        ranks=[adapter.rank for adapter in adapters],
        times_s=times_s,
        duration_s=spec.duration_s,
        uniform=open_uniform(stream(spec.seed, _POPULARITY), count),
    )
    places = spec.drift.choose(run, stream(spec.seed, _DRIFT)).astype(np.int32)
    if spec.base_share > 0:
        is_base = stream(spec.seed, _BASE).random(count) < spec.base_share
        places = np.where(is_base, np.int32(BASE), places)
    pairs = spec.lengths.pairs(count, stream(spec.seed, _LENGTHS), read, spec.limits)
    return TraceColumns(
        arrival_s=np.round(times_s - times_s[0], 6),
        prompt_tokens=pairs[0].astype(np.int32),
        output_tokens=pairs[1].astype(np.int32),
        adapter=places,
        adapters=adapters,
        source=f"{spec.name}, seed {spec.seed}",
        format="synthetic",
    )


def _adapters(spec: WorkloadSpec) -> tuple[tuple[TraceAdapter, ...], Floats]:
    """The adapters and their shares at the start."""
    adapters = spec.ranks.adapters(spec.num_adapters, stream(spec.seed, _RANKS))
    if spec.popularity.by_rank:
        return adapters, spec.popularity.weights([adapter.rank for adapter in adapters])
    weights = spec.popularity.weights(len(adapters))
    if spec.correlation is None and spec.ranks.in_order:
        return adapters, weights
    correlation = spec.correlation or 0.0
    return lay_out(adapters, weights, correlation, stream(spec.seed, _ORDER)), weights


def _load(path: str) -> TraceColumns:
    # Arrivals need no lengths; a law of lengths refuses a trace that has none.
    return read_columns(path, fill=UNKNOWN)
