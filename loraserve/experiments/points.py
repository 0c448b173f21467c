"""From one simulation to its figures in an experiment."""

import math

import numpy as np
from numpy.typing import NDArray

from loraserve.experiments.results import Point, RankMap
from loraserve.simulator.figures import PS_PER_S, RunFigures
from loraserve.simulator.result import SimulationResult
from traces.records import Outcome

_OK = tuple(Outcome).index(Outcome.OK)
_DIGITS = 9

Floats = NDArray[np.float64]


def point_of(
    figures: RunFigures,
    result: SimulationResult,
    *,
    asked: str,
    rate_per_s: float,
    replicas: int,
    warmup_s: float,
    token_ms: float = 0.0,
) -> Point:
    """The figures of one run, of what comes after the warm-up; `token_ms` 0: no target."""
    overall = figures.summary.overall
    latency_ms, wait_ms = _per_token_ms(result, warmup_s)
    epochs = [epoch for epoch in figures.epochs if epoch.time_ps > warmup_s * PS_PER_S] or list(
        figures.epochs
    )
    return Point(
        asked=asked,
        rate_per_s=rate_per_s,
        replicas=replicas,
        requests=overall.requests,
        failed=overall.requests - overall.completed,
        throughput_per_s=overall.request_throughput,
        goodput_per_s=overall.request_goodput,
        attainment=overall.attainment or 0.0,
        in_slo=overall.slo_met,
        ttft_p50_ms=finite(overall.ttft_ms.median),
        ttft_p95_ms=finite(overall.ttft_ms.p95),
        ttft_p99_ms=finite(overall.ttft_ms.p99),
        tbt_p50_ms=finite(overall.itl_ms.median),
        tbt_p95_ms=finite(overall.itl_ms.p95),
        tbt_p99_ms=finite(overall.itl_ms.p99),
        latency_per_token_ms=_mean(latency_ms),
        utilisation=figures.utilisation,
        bytes_moved=sum(epoch.bytes_moved for epoch in epochs),
        resident_bytes=sum(epoch.resident_bytes for epoch in epochs) / max(1, len(epochs)),
        copies=figures.copies,
        cold_misses=sum(epoch.cold_misses for epoch in epochs),
        latency_per_token_p99_ms=_p99(latency_ms),
        token_attainment=_share(latency_ms <= token_ms, overall.requests) if token_ms else None,
        wait_per_token_ms=_mean(wait_ms),
        tpot_mean_ms=finite(overall.tpot_ms.mean),
        tpot_p99_ms=finite(overall.tpot_ms.p99),
    )


def rank_map_of(figures: RunFigures, rate_per_s: float) -> RankMap:
    """What each replica did over time."""
    pictures = figures.pictures
    return RankMap(
        rate_per_s=rate_per_s,
        edges_s=tuple(_rounded(pictures.edges_s)),
        rank=tuple(tuple(None if math.isnan(one) else one for one in _rounded(row)) for row in pictures.rank),
        busy=tuple(tuple(_rounded(row)) for row in pictures.busy),
    )


def finite(value: float | None) -> float | None:
    """None for what has no finite value."""
    return value if value is not None and math.isfinite(value) else None


def _rounded(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> list[float]:
    rounded: list[float] = np.round(values, 3).tolist()
    return rounded


def _per_token_ms(result: SimulationResult, warmup_s: float) -> tuple[Floats, Floats]:
    """Of each request that ended well, its whole time over its output tokens, as dLoRA and Toppings have it,
    and its time to the first token over them.

    The second is dLoRA's time in queues per token (all time in which none of a request's steps ran), but with
    the prefill in it.
    """
    counted = (result.outcome == _OK) & (result.arrival_ps >= round(warmup_s * PS_PER_S))
    arrival_ps = result.arrival_ps[counted]
    tokens = np.maximum(result.drawn_tokens[counted], 1) * 1e9
    return (result.end_ps[counted] - arrival_ps) / tokens, (result.first_ps[counted] - arrival_ps) / tokens


def _share(held: NDArray[np.bool_], num_requests: int) -> float | None:
    return int(np.count_nonzero(held)) / num_requests if num_requests else None


def _mean(values: Floats) -> float | None:
    return finite(float(values.mean())) if len(values) else None


def _p99(values: Floats) -> float | None:
    return finite(float(np.percentile(values, 99))) if len(values) else None
