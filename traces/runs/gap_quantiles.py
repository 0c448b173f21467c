"""Order statistics of gaps that are kept as runs: exact, and without writing out a single gap per token.

A histogram over logarithmic buckets finds the bucket that holds a wanted place; only the rows that reach
into that bucket are looked at again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from traces.runs.step_runs import Gaps, Whole, spread_rows

_SHIFT, _WIDEST_SHIFT = 42, 52
"""A bucket is a float64's exponent and the first bits of its mantissa: 10 bits, a thousandth of the value
wide, or fewer where so many rows reach over several such buckets that listing them would take too much."""

_MAX_ACROSS = 2_000_000
_EXACT = 1 << 53
_MAX_SPREAD = 2_000_000
"""How many single gaps are written out at a time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Split:
    """Rows of gaps by bucket: the row's first and last, and for rows that reach over several of them
    `count[i]` gaps of row `row[i]` in bucket `bucket[i]`."""

    gaps: Gaps
    low: Whole
    high: Whole
    row: Whole
    bucket: Whole
    count: Whole


class GapHistogram:
    """Gaps of several sources, sorted into buckets once and then weighed for any number of groups."""

    def __init__(self, sources: Sequence[Gaps], *, max_across: int = _MAX_ACROSS) -> None:
        most = max_across + sum(len(gaps.count) for gaps in sources) // 4
        self._shift = _SHIFT
        while self._shift < _WIDEST_SHIFT and sum(_num_across(one, self._shift) for one in sources) > most:
            self._shift += 1
        self._splits = [_split(gaps, self._shift) for gaps in sources]
        lows = [int(split.low.min()) for split in self._splits if len(split.low)]
        highs = [int(split.high.max()) for split in self._splits if len(split.high)]
        self._first = min(lows, default=0)
        self._size = max(highs, default=0) - self._first + 1

    def weigh(self, weights: Sequence[Whole]) -> "WeighedGaps":
        """The gaps of one group: how often each row of each source counts."""
        totals = np.zeros(self._size)
        for split, weight in zip(self._splits, weights, strict=True):
            inside = split.low == split.high
            counts = np.where(inside, weight * split.gaps.count, 0)
            totals += np.bincount(split.low - self._first, weights=counts, minlength=self._size)
            spread = weight[split.row] * split.count
            totals += np.bincount(split.bucket - self._first, weights=spread, minlength=self._size)
        return WeighedGaps(self._splits, list(weights), totals.astype(np.int64), self._first, self._shift)


class WeighedGaps:
    """One group's gaps."""

    def __init__(
        self, splits: list[_Split], weights: list[Whole], totals: Whole, first: int, shift: int
    ) -> None:
        self._splits = splits
        self._weights = weights
        self._totals = totals
        self._sums = np.cumsum(totals)
        self._first = first
        self._shift = shift

    @property
    def count(self) -> int:
        """How many gaps there are."""
        return int(self._sums[-1])

    def at(self, places: Sequence[int]) -> dict[int, int]:
        """The gap in picoseconds at each of these places of the ascending sample, counted from 0."""
        found: dict[int, int] = {}
        buckets = np.searchsorted(self._sums, np.asarray(places, dtype=np.int64), side="right")
        for bucket in np.unique(buckets):
            here = [place for place, of in zip(places, buckets, strict=True) if of == bucket]
            before = int(self._sums[bucket] - self._totals[bucket])
            rows = self._rows(int(bucket) + self._first)
            inner = select(*rows, [place - before for place in here])
            found |= dict(zip(here, inner, strict=True))
        return found

    def curve(self) -> tuple[Whole, Whole]:
        """`(gap_ps, count)`: how many gaps are at most that long, at the end of each bucket that has some."""
        used = np.flatnonzero(self._totals)
        ends_ps = [_bounds(int(bucket) + self._first, self._shift)[1] for bucket in used]
        return np.asarray(ends_ps, dtype=np.int64), self._sums[used]

    def _rows(self, bucket: int) -> tuple[Whole, Whole, Whole, Whole]:
        """Start, growth, count and weight of what lies in a bucket."""
        low_ps, high_ps = _bounds(bucket, self._shift)
        parts = []
        for split, weight in zip(self._splits, self._weights, strict=True):
            rows = np.flatnonzero((split.low <= bucket) & (split.high >= bucket) & (weight > 0))
            gaps = split.gaps
            parts.append(
                (
                    *_clip(gaps.start_ps[rows], gaps.growth_ps[rows], gaps.count[rows], low_ps, high_ps),
                    weight[rows],
                )
            )
        start_ps, growth_ps, count, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
        some = count > 0
        return start_ps[some], growth_ps[some], count[some], weight[some]


def at_most(gaps: Gaps, limit_ps: int) -> Whole:
    """How many gaps of each row are no longer than the limit."""
    return _at_most(gaps.start_ps, gaps.growth_ps, gaps.count, limit_ps)


def _at_most(start_ps: Whole, growth_ps: Whole, count: Whole, limit_ps: int | Whole) -> Whole:
    room_ps = limit_ps - start_ps
    fit = room_ps // np.maximum(growth_ps, 1) + 1
    fit = np.where(growth_ps > 0, fit, count)
    return np.where(room_ps < 0, 0, np.minimum(fit, count))


def _clip(
    start_ps: Whole, growth_ps: Whole, count: Whole, low_ps: int, high_ps: int
) -> tuple[Whole, Whole, Whole]:
    """The rows' gaps from `low_ps` to `high_ps`, as rows."""
    below = _at_most(start_ps, growth_ps, count, low_ps - 1)
    upto = _at_most(start_ps, growth_ps, count, high_ps)
    return start_ps + below * growth_ps, growth_ps, upto - below


def select(
    start_ps: Whole,
    growth_ps: Whole,
    count: Whole,
    weight: Whole,
    places: Sequence[int],
    *,
    max_spread: int = _MAX_SPREAD,
) -> list[int]:
    """The gaps at these ascending places of rows of equally spaced gaps, each of which counts `weight` times.

    Halves the range of values until at most `max_spread` different gaps, or two per row, are left to write
    out and sort.
    """
    if len(places) > 1 and _spread(growth_ps, count) > max_spread:
        return [
            select(start_ps, growth_ps, count, weight, [place], max_spread=max_spread)[0] for place in places
        ]
    wanted = np.asarray(places, dtype=np.int64)
    low_ps, high_ps = int(start_ps.min()), int((start_ps + growth_ps * (count - 1)).max())
    while _spread(growth_ps, count) > max(max_spread, 2 * len(count)) and low_ps < high_ps:
        middle_ps = (low_ps + high_ps) // 2
        lower = int((_at_most(start_ps, growth_ps, count, middle_ps) * weight).sum())
        if wanted[0] < lower:
            high_ps = middle_ps
        else:
            low_ps, wanted = middle_ps + 1, wanted - lower
        start_ps, growth_ps, count = _clip(start_ps, growth_ps, count, low_ps, high_ps)
        some = count > 0
        start_ps, growth_ps, count, weight = start_ps[some], growth_ps[some], count[some], weight[some]
        low_ps, high_ps = int(start_ps.min()), int((start_ps + growth_ps * (count - 1)).max())
    if low_ps == high_ps:
        return [low_ps] * len(places)
    values, weights = _write_out(start_ps, growth_ps, count, weight)
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    return [int(value) for value in values[order[np.searchsorted(sums, wanted, side="right")]]]


def _spread(growth_ps: Whole, count: Whole) -> int:
    return int(np.where(growth_ps > 0, count, 1).sum())


def _write_out(start_ps: Whole, growth_ps: Whole, count: Whole, weight: Whole) -> tuple[Whole, Whole]:
    """Every different gap once, with its weight."""
    times = np.where(growth_ps > 0, count, 1)
    weight = np.where(growth_ps > 0, weight, weight * count)
    row, place = spread_rows(times)
    return start_ps[row] + place * growth_ps[row], weight[row]


def _bucket(value_ps: Whole, shift: int) -> Whole:
    if len(value_ps) and int(value_ps.max()) >= _EXACT:
        # So that no value is rounded up into the next bucket.
        value_ps = np.where(value_ps >= _EXACT, value_ps & ~np.int64(1023), value_ps)
    bits: Whole = value_ps.astype(np.float64).view(np.int64)
    return bits >> shift


def _bounds(bucket: int, shift: int) -> tuple[int, int]:
    """The least and the greatest whole number of a bucket."""
    edges = (np.array([bucket, bucket + 1], dtype=np.int64) << shift).view(np.float64)
    return int(np.ceil(edges[0])), int(np.ceil(edges[1])) - 1


def _reach(gaps: Gaps, shift: int) -> tuple[Whole, Whole, Whole]:
    """Each row's first and last bucket, and the rows in which they differ."""
    low = _bucket(gaps.start_ps, shift)
    high = low.copy()
    growing = np.flatnonzero((gaps.growth_ps > 0) & (gaps.count > 1))
    longest_ps = gaps.start_ps[growing] + gaps.growth_ps[growing] * (gaps.count[growing] - 1)
    high[growing] = _bucket(longest_ps, shift)
    return low, high, growing[low[growing] != high[growing]]


def _num_across(gaps: Gaps, shift: int) -> int:
    low, high, rows = _reach(gaps, shift)
    return int(np.minimum(high[rows] - low[rows] + 1, gaps.count[rows]).sum())


def _split(gaps: Gaps, shift: int) -> _Split:
    """Rows that reach over several buckets are listed by bucket, or by gap where those are fewer."""
    low, high, rows = _reach(gaps, shift)
    num_buckets = high[rows] - low[rows] + 1
    by_gap = gaps.count[rows] <= num_buckets
    parts = [
        _by_gap(gaps, rows[by_gap], shift),
        _by_bucket(gaps, rows[~by_gap], low[rows[~by_gap]], num_buckets[~by_gap], shift),
    ]
    row, bucket, count = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Split(gaps=gaps, low=low, high=high, row=row, bucket=bucket, count=count)


def _by_gap(gaps: Gaps, rows: Whole, shift: int) -> tuple[Whole, Whole, Whole]:
    place, step = spread_rows(gaps.count[rows])
    row = rows[place]
    bucket = _bucket(gaps.start_ps[row] + step * gaps.growth_ps[row], shift)
    return row, bucket, np.ones(len(row), dtype=np.int64)


def _by_bucket(
    gaps: Gaps, rows: Whole, low: Whole, num_buckets: Whole, shift: int
) -> tuple[Whole, Whole, Whole]:
    place, step = spread_rows(num_buckets)
    row, bucket = rows[place], low[place] + step
    edges = np.ceil(((bucket + 1) << shift).view(np.float64))
    upto = _at_most(gaps.start_ps[row], gaps.growth_ps[row], gaps.count[row], edges.astype(np.int64) - 1)
    before = np.concatenate((np.zeros(1, dtype=np.int64), upto))[:-1]
    before[step == 0] = 0
    return row, bucket, upto - before
