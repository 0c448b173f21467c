"""What a workload is like, in figures: rates, lengths, adapters and their drift, bursts, repeated blocks."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.columns import TraceColumns
from traces.types import TraceError

TOP = 20
"""How many of a window's most used adapters the drift of popularity compares."""
MAX_WINDOWS = 100_000

_DAY_S, _HOUR_S = 86_400.0, 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStats:
    """Numbers of tokens; percentiles by linear interpolation."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """Use of the adapters; shares are of the requests that name one.

    `named` counts the adapters that the trace names, `used` those with a request. `zipf` is the exponent
    a of the law share(k) ~ k^-a that makes the counts likeliest, None for fewer than two adapters.
    `ranks` counts requests per rank; "unknown" where the trace does not tell.
    """

    named: int
    used: int
    requests: int
    top1_share: float
    top10_share: float
    zipf: float | None
    ranks: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftStats:
    """How alike the popular adapters of one window and of the next are.

    `overlap` is the mean share of the `top` most used of a window that are again among those of the next;
    windows without a request for an adapter are left out. None for fewer than two windows.
    """

    window_s: float
    windows: int
    top: int
    overlap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """`rate_per_s` is that of the gaps, `peak_per_s` the most requests in one whole second; `gap_cv` is the
    coefficient of variation of the gaps, 1 for a Poisson process. Lengths are None where they are not
    known, `repeated_block_share` is the share of prompt blocks that came before."""

    source: str
    format: str
    requests: int
    bad_rows: int
    duration_s: float
    rate_per_s: float | None
    peak_per_s: int
    gap_cv: float | None
    prompt_tokens: LengthStats | None
    output_tokens: LengthStats | None
    adapters: AdapterStats | None
    drift: DriftStats | None
    blocks: int
    block_tokens: int | None
    repeated_block_share: float | None


def trace_stats(columns: TraceColumns, *, window_s: float | None = None) -> TraceStats:
    """The figures of a workload with at least one request.

    `window_s` is that of the drift; without it a day, an hour or a tenth of the trace, whichever is the
    longest that fits in twice.
    """
    count, duration_s = len(columns), columns.duration_s
    if count == 0:
        raise TraceError("a trace without requests has no figures", source=columns.source)
    gaps_s = np.diff(columns.arrival_s)
    known = int(columns.prompt_tokens.min()) > 0
    ids = columns.hash_ids
    blocks = 0 if ids is None else len(ids)
    return TraceStats(
        source=columns.source,
        format=columns.format,
        requests=count,
        bad_rows=columns.num_bad_rows,
        duration_s=duration_s,
        rate_per_s=(count - 1) / duration_s if duration_s > 0 else None,
        peak_per_s=_peak(columns.arrival_s),
        gap_cv=float(gaps_s.std() / gaps_s.mean()) if duration_s > 0 else None,
        prompt_tokens=_lengths(columns.prompt_tokens) if known else None,
        output_tokens=_lengths(columns.output_tokens) if known else None,
        adapters=_adapters(columns) if columns.adapters else None,
        drift=_drift(columns, window_s) if columns.adapters else None,
        blocks=blocks,
        block_tokens=columns.hash_block_tokens if blocks else None,
        repeated_block_share=None if ids is None or not blocks else 1 - len(np.unique(ids)) / blocks,
    )


def zipf_exponent(counts: NDArray[np.int64]) -> float | None:
    """The exponent of Zipf's law over these numbers of uses that makes them likeliest (0 to 20).

    Of the counts in descending order, the k-th belongs to the adapter of place k. The likelihood is
    that of Clauset, Shalizi and Newman (2009) for a finite support, which is concave.
    """
    ordered = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    if len(ordered) < 2:
        return None
    logs = np.log(np.arange(1, len(ordered) + 1))
    mean_log = float((ordered * logs).sum() / ordered.sum())
    low, high = 0.0, 20.0
    # The expected logarithm of the place falls with the exponent: find where it is the one seen.
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-middle * logs)
        if float((weights * logs).sum() / weights.sum()) > mean_log:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _peak(arrival_s: NDArray[np.float64]) -> int:
    _, counts = np.unique(np.floor(arrival_s), return_counts=True)
    return int(counts.max())


def _lengths(tokens: NDArray[np.int32]) -> LengthStats:
    p50, p95, p99 = np.percentile(tokens, (50, 95, 99)).tolist()
    return LengthStats(mean=float(tokens.mean()), p50=p50, p95=p95, p99=p99, max=int(tokens.max()))


def _adapters(columns: TraceColumns) -> AdapterStats:
    counts = np.bincount(columns.adapter[columns.adapter >= 0], minlength=len(columns.adapters))
    ordered, total = np.sort(counts)[::-1], int(counts.sum())
    ranks: Counter[int | None] = Counter()
    for adapter, uses in zip(columns.adapters, counts.tolist(), strict=True):
        ranks[adapter.rank] += uses
    known = sorted((rank, uses) for rank, uses in ranks.items() if rank is not None and uses)
    return AdapterStats(
        named=len(columns.adapters),
        used=int((counts > 0).sum()),
        requests=total,
        top1_share=int(ordered[0]) / max(total, 1),
        top10_share=int(ordered[:10].sum()) / max(total, 1),
        zipf=zipf_exponent(counts),
        ranks={str(rank): uses for rank, uses in known} | ({"unknown": ranks[None]} if ranks[None] else {}),
    )


def _window(duration_s: float) -> float:
    for window_s in (_DAY_S, _HOUR_S):
        if duration_s >= 2 * window_s:
            return window_s
    return duration_s / 10 or 1.0


def _drift(columns: TraceColumns, window_s: float | None) -> DriftStats:
    if window_s is None:
        window_s = _window(columns.duration_s)
    if not 0 < window_s < math.inf or columns.duration_s / window_s >= MAX_WINDOWS:
        right = f"above 0, and so long that there are at most {MAX_WINDOWS:,}"
        raise TraceError(f"a window of {window_s:g} s is not possible; it must be {right}")
    tops = list(_tops(columns, window_s))
    top = min(TOP, len({adapter.name for adapter in columns.adapters}))
    shares = [len(one & other) / top for one, other in itertools.pairwise(tops)]
    return DriftStats(
        window_s=window_s, windows=len(tops), top=top, overlap=float(np.mean(shares)) if shares else None
    )


def _tops(columns: TraceColumns, window_s: float) -> Iterator[set[int]]:
    """The most used adapters of each window that has any; ties go to the one used first in it."""
    named = columns.adapter >= 0
    adapter = columns.adapter[named]
    # The last request may arrive exactly at the end of the last window.
    last = max(math.ceil(columns.duration_s / window_s), 1) - 1
    window = np.minimum(columns.arrival_s[named] // window_s, last)
    ends = np.flatnonzero(np.diff(window)) + 1
    for part in np.split(adapter, ends):
        if len(part):
            used, first, counts = np.unique(part, return_index=True, return_counts=True)
            yield set(used[np.lexsort((first, -counts))[:TOP]].tolist())
