"""Which requests have the 95th percentile of their own gaps inside a limit, from runs of steps."""

import numpy as np
from numpy.typing import NDArray

from traces.runs.gap_quantiles import at_most
from traces.runs.step_runs import Gaps, StepRuns, Whole, spread_rows

PERCENT = 95
_PS_PER_MS = 1e9
_MAX_SPREAD = 4_000_000
"""How many runs of requests are looked at together."""

_NEVER = np.iinfo(np.int64).max


def requests_within(runs: StepRuns, limit_ms: float, *, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each of these requests is: its percentile by linear interpolation is at most the limit, or it
    has no gaps. False for all others.

    Counting the gaps above the limit decides nearly all; only where the percentile lies between the longest
    gap within and the shortest above it are those two looked up.
    """
    limit_ps = int(min(limit_ms * _PS_PER_MS, 9e18))
    size = len(among)
    over = _over(runs, limit_ps, size)
    gaps = _sums(runs.request, runs.tokens - 1, size) + _sums(runs.pauses.owner, runs.pauses.count, size)
    position = (gaps - 1) * PERCENT / 100
    below = np.floor(position).astype(np.int64)
    share = position - below
    # Places from 0; those within the limit come first.
    last_within = gaps - over - 1
    needed = below + (share > 0)
    within: NDArray[np.bool_] = among & ((gaps == 0) | (needed <= last_within))
    between = np.flatnonzero(among & (gaps > 0) & (below <= last_within) & (needed > last_within))
    longest_ps, shortest_ps = _around(runs, limit_ps, between, size)
    value_ms = longest_ps + (shortest_ps - longest_ps) * share[between]
    within[between] = value_ms <= limit_ms * _PS_PER_MS
    return within


def _sums(owner: Whole, values: Whole, size: int) -> Whole:
    return np.bincount(owner, weights=values, minlength=size).astype(np.int64)


def _over(runs: StepRuns, limit_ps: int, size: int) -> Whole:
    """Each request's gaps above the limit."""
    per_run = runs.gaps.count - at_most(runs.gaps, limit_ps)
    per_run[runs.heads.owner] += runs.heads.start_ps > limit_ps
    sums = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(per_run)))
    stretches = sums[runs.last_run + 1] - sums[runs.first_run + 1]
    pauses = (runs.pauses.start_ps > limit_ps).astype(np.int64)
    return _sums(runs.request, stretches, size) + _sums(runs.pauses.owner, pauses, size)


def _around(
    runs: StepRuns, limit_ps: int, requests: Whole, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The longest gap within the limit and the shortest above it, of each of these requests."""
    longest, shortest = np.full(size, -1, dtype=np.int64), np.full(size, _NEVER, dtype=np.int64)
    wanted = np.zeros(size, dtype=np.bool_)
    wanted[requests] = True
    run_longest, run_shortest = _per_run(runs, limit_ps)
    stretches = np.flatnonzero(wanted[runs.request] & (runs.last_run > runs.first_run))
    lengths = runs.last_run[stretches] - runs.first_run[stretches]
    parts = np.cumsum(lengths) // _MAX_SPREAD
    for part in np.unique(parts):
        rows, times = stretches[parts == part], lengths[parts == part]
        row, place = spread_rows(times)
        run = runs.first_run[rows][row] + 1 + place
        starts = np.cumsum(times) - times
        np.maximum.at(longest, runs.request[rows], np.maximum.reduceat(run_longest[run], starts))
        np.minimum.at(shortest, runs.request[rows], np.minimum.reduceat(run_shortest[run], starts))
    pauses_longest, pauses_shortest = _nearest(runs.pauses, limit_ps)
    np.maximum.at(longest, runs.pauses.owner, pauses_longest)
    np.minimum.at(shortest, runs.pauses.owner, pauses_shortest)
    return longest[requests].astype(np.float64), shortest[requests].astype(np.float64)


def _per_run(runs: StepRuns, limit_ps: int) -> tuple[Whole, Whole]:
    longest, shortest = _nearest(runs.gaps, limit_ps)
    heads_longest, heads_shortest = _nearest(runs.heads, limit_ps)
    np.maximum.at(longest, runs.heads.owner, heads_longest)
    np.minimum.at(shortest, runs.heads.owner, heads_shortest)
    return longest, shortest


def _nearest(gaps: Gaps, limit_ps: int) -> tuple[Whole, Whole]:
    """Each row's longest gap within the limit, -1 without one, and its shortest above it."""
    within = at_most(gaps, limit_ps)
    longest = np.where(within > 0, gaps.start_ps + gaps.growth_ps * (within - 1), -1)
    shortest = np.where(within < gaps.count, gaps.start_ps + gaps.growth_ps * within, _NEVER)
    return longest, shortest
