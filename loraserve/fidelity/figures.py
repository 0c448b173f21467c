"""The figures that live and simulated runs are compared by, from records of either."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Literal

from loraserve.fidelity.options import Targets
from traces.metrics import itl_ms, summarise, ttft_ms
from traces.records import RequestRecord

Kind = Literal["throughput", "p50", "p95"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a run is judged by, as `traces.metrics` defines it; NaN where there is nothing to measure.

    `arriving_tokens_per_s` counts the output tokens that came while requests came: above saturation the
    window of the other rates goes on until the last request has ended, which takes about as long in any
    model, and this one does not.
    """

    requests_per_s: float
    tokens_per_s: float
    arriving_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    tbt_p50_ms: float
    tbt_p95_ms: float


KINDS: dict[str, Kind] = {
    "requests_per_s": "throughput",
    "tokens_per_s": "throughput",
    "arriving_tokens_per_s": "throughput",
    "ttft_p50_ms": "p50",
    "ttft_p95_ms": "p95",
    "tbt_p50_ms": "p50",
    "tbt_p95_ms": "p95",
}
LABELS = {
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "arriving_tokens_per_s": "tokens/s while requests come",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p95_ms": "TTFT p95, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p95_ms": "TBT p95, ms",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of one load; `error` is simulated / live - 1, `met` None where there is no target.

    `simulated` is the median of several simulations, `lowest` and `highest` are their range. `level` is
    the share of the live run's times that `simulated` is at least as long as, None for a rate: 0.94 beside
    a 95th percentile is near, however far apart the two times are.
    """

    name: str
    live: float
    simulated: float
    lowest: float
    highest: float
    level: float | None
    error: float
    target: float | None
    met: bool | None


def figures_of(records: Sequence[RequestRecord]) -> RunFigures:
    """The figures of one run."""
    overall = summarise(records, live=False).overall
    return RunFigures(
        requests_per_s=overall.request_throughput,
        tokens_per_s=overall.output_throughput,
        arriving_tokens_per_s=arriving_tokens_per_s(records),
        ttft_p50_ms=_number(overall.ttft_ms.median),
        ttft_p95_ms=_number(overall.ttft_ms.p95),
        tbt_p50_ms=_number(overall.itl_ms.median),
        tbt_p95_ms=_number(overall.itl_ms.p95),
    )


def arriving_tokens_per_s(records: Sequence[RequestRecord], *, from_s: float = 0.0) -> float:
    """Output tokens per second from `from_s` to the last scheduled arrival; NaN for an empty window."""
    if not records:
        return math.nan
    until_s = max(record.scheduled_s for record in records)
    if until_s <= from_s:
        return math.nan
    tokens = sum(
        count
        for record in records
        for at_s, count in zip(record.message_times_s, record.message_tokens, strict=True)
        if from_s <= at_s < until_s
    )
    return tokens / (until_s - from_s)


def compare(
    live: Sequence[RequestRecord], simulated: Sequence[Sequence[RequestRecord]], targets: Targets
) -> tuple[Compared, ...]:
    """Every figure of the live run beside those of the simulations."""
    ours, theirs = figures_of(live), [figures_of(one) for one in simulated]
    times_ms = {
        "ttft": [ttft_ms(record) for record in live],
        "tbt": [gap for record in live for gap in itl_ms(record)],
    }
    return tuple(
        _compared(
            name,
            getattr(ours, name),
            sorted(getattr(one, name) for one in theirs),
            getattr(targets, KINDS[name]),
            times_ms.get(name.partition("_")[0], ()),
        )
        for name in (field.name for field in fields(RunFigures))
    )


def relative_error(live: float, simulated: float) -> float:
    """simulated / live - 1; 0 if both are the same, also if both are infinite or absent."""
    if live == simulated or (math.isnan(live) and math.isnan(simulated)):
        return 0.0
    if not (math.isfinite(live) and math.isfinite(simulated)) or live == 0:
        return math.inf
    return simulated / live - 1


def _compared(
    name: str, live: float, simulated: Sequence[float], target: float | None, times_ms: Sequence[float]
) -> Compared:
    middle = median(simulated)
    error = relative_error(live, middle)
    return Compared(
        name=name,
        live=live,
        simulated=middle,
        lowest=simulated[0],
        highest=simulated[-1],
        level=sum(time <= middle for time in times_ms) / len(times_ms) if times_ms else None,
        error=error,
        target=target,
        met=None if target is None else abs(error) <= target,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
