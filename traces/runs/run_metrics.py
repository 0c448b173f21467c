"""The figures of `traces.metrics` from columns of requests and runs of steps, gaps never written out.

Same definitions, same values: `summarise_runs` of a simulation is `summarise` of its records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.columns import TraceAdapter
from traces.metrics import GroupSummary, Slo, Summary
from traces.quantiles import Distribution
from traces.records import Outcome
from traces.runs.column_groups import RequestGroup, adapter_groups, everything, rank_groups
from traces.runs.gap_limits import requests_within
from traces.runs.gap_quantiles import GapHistogram, WeighedGaps
from traces.runs.step_runs import ReplicaSteps, StepRuns, Whole

ALL = "all"
"""The name of all requests among the ranks."""

PS_PER_MS = 1e9
PS_PER_S = 1e12
PERCENTS = (50, 95, 99)
_SMALL_GROUP = 4
"""So many times fewer gaps than all runs have make a group small."""
_OK = tuple(Outcome).index(Outcome.OK)

Rows = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestColumns:
    """One row per request, times in picoseconds, -1 for never.

    `end_ps` is the last token's time of a request that completed; `outcome` is a place in
    `tuple(traces.records.Outcome)`, `adapter` one in `adapters` or `traces.columns.BASE`.
    """

    arrival_ps: Whole
    first_ps: Whole
    end_ps: Whole
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    outcome: NDArray[np.int8]
    adapter: NDArray[np.int32]
    adapters: Sequence[TraceAdapter]

    def __len__(self) -> int:
        return len(self.arrival_ps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunMetrics:
    """A summary, and what its pictures are drawn from: the gaps and the TTFTs of each rank's requests, and
    of all under the name ALL."""

    summary: Summary
    gaps: Mapping[str, WeighedGaps]
    ttft_ms: Mapping[str, Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """Everything that the figures of a group are picked from; float columns are ms, inf for failures."""

    requests: RequestColumns
    runs: StepRuns
    histogram: GapHistogram
    ttft_ms: Floats
    e2el_ms: Floats
    tpot_ms: Floats
    attains: Rows
    messages: Whole
    duration_s: float


def summarise_runs(
    requests: RequestColumns,
    replicas: Sequence[ReplicaSteps],
    *,
    slo: Slo | None = None,
    warmup_s: float = 0.0,
    per_adapter: bool = False,
) -> RunMetrics:
    """Every figure of a simulated run; requests that arrive before `warmup_s` are left out of all.

    `per_adapter` costs time in proportion to all gaps, the rest only to requests and runs.
    """
    slo = slo or Slo()
    counted = requests.arrival_ps >= round(warmup_s * PS_PER_S)
    runs = StepRuns.of(replicas)
    measured = _measure(requests, runs, slo, counted)
    whole = everything(counted, runs)
    ranks = rank_groups(requests.adapter, requests.adapters, counted, runs)
    shown = {ALL: whole, **ranks}
    gaps = {name: _gaps(measured, group) for name, group in shown.items()}
    adapters = adapter_groups(requests.adapter, requests.adapters, counted, runs) if per_adapter else {}
    summary = Summary(
        overall=_group(measured, whole, gaps[ALL], slo),
        per_rank={name: _group(measured, group, gaps[name], slo) for name, group in ranks.items()},
        per_adapter={
            name: _group(measured, group, _gaps(measured, group), slo) for name, group in adapters.items()
        },
        slo=slo,
        duration_s=measured.duration_s,
        warmup_requests=int((~counted).sum()),
        pacing=None,
        void_reason="",
    )
    ttft_ms = {name: measured.ttft_ms[group.requests] for name, group in shown.items()}
    return RunMetrics(summary=summary, gaps=gaps, ttft_ms=ttft_ms)


def _measure(requests: RequestColumns, runs: StepRuns, slo: Slo, counted: Rows) -> _Measured:
    size = len(requests)
    completed = requests.outcome == _OK
    answered = completed & (requests.first_ps >= 0)
    ttft_ms = np.where(answered, (requests.first_ps - requests.arrival_ps) / PS_PER_MS, np.inf)
    e2el_ms = np.where(answered, (requests.end_ps - requests.arrival_ps) / PS_PER_MS, np.inf)
    several = completed & (requests.output_tokens >= 2)
    tpot_ms = np.where(completed, np.nan, np.inf)
    tpot_ms[several] = (e2el_ms[several] - ttft_ms[several]) / (requests.output_tokens[several] - 1)
    return _Measured(
        requests=requests,
        runs=runs,
        histogram=GapHistogram((runs.gaps, runs.heads, runs.pauses)),
        ttft_ms=ttft_ms,
        e2el_ms=e2el_ms,
        tpot_ms=tpot_ms,
        attains=(ttft_ms <= slo.ttft_ms) & requests_within(runs, slo.tbt_ms, among=answered),
        messages=np.bincount(runs.request, weights=runs.tokens, minlength=size).astype(np.int64),
        duration_s=_window_s(requests, counted),
    )


def _window_s(requests: RequestColumns, counted: Rows) -> float:
    if not counted.any():
        return 0.0
    return float(requests.end_ps[counted].max() - requests.arrival_ps[counted].min()) / PS_PER_S


def _gaps(measured: _Measured, group: RequestGroup) -> WeighedGaps:
    runs, pauses = measured.runs, measured.runs.pauses
    if runs.num_runs_of(group.stretches) * _SMALL_GROUP < len(runs.gaps.count):
        return _small_gaps(runs, group)
    weight = runs.weights(group.stretches)
    paused = np.zeros(len(pauses.count), dtype=np.int64)
    paused[group.pauses] = 1
    return measured.histogram.weigh((weight, weight[runs.heads.owner], paused))


def _small_gaps(runs: StepRuns, group: RequestGroup) -> WeighedGaps:
    """The gaps of a group that has so few that sorting them apart from all others is less work."""
    run, weight = runs.runs_of(group.stretches)
    heads, of_run = runs.heads_of(run)
    pauses = runs.pauses.rows(group.pauses)
    sources = (runs.gaps.rows(run), runs.heads.rows(heads), pauses)
    return GapHistogram(sources).weigh((weight, weight[of_run], pauses.count))


def _group(measured: _Measured, group: RequestGroup, gaps: WeighedGaps, slo: Slo) -> GroupSummary:
    requests, duration_s, rows = measured.requests, measured.duration_s, group.requests
    outcomes = np.bincount(requests.outcome[rows], minlength=len(Outcome))
    completed = rows[requests.outcome[rows] == _OK]
    input_tokens = int(requests.prompt_tokens[completed].sum(dtype=np.int64))
    output_tokens = int(requests.output_tokens[completed].sum(dtype=np.int64))
    num_requests, attained = len(rows), int(measured.attains[rows].sum())
    ttft = _distribution(measured.ttft_ms[rows])
    tpot_ms = measured.tpot_ms[rows]
    itl = _gap_distribution(measured, group, gaps)
    return GroupSummary(
        requests=num_requests,
        outcomes={outcome: int(count) for outcome, count in zip(Outcome, outcomes, strict=True) if count},
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        request_throughput=_rate(len(completed), duration_s),
        request_goodput=_rate(attained, duration_s),
        output_throughput=_rate(output_tokens, duration_s),
        total_token_throughput=_rate(input_tokens + output_tokens, duration_s),
        attainment=attained / num_requests if num_requests else None,
        slo_met=ttft.p95 is not None
        and ttft.p95 <= slo.ttft_ms
        and (itl.p95 is None or itl.p95 <= slo.tbt_ms),
        tokens_per_message=1.0 if measured.messages[rows].any() else None,
        ttft_ms=ttft,
        # A simulated client sends at the scheduled moment.
        ttft_from_send_ms=ttft,
        tpot_ms=_distribution(tpot_ms[~np.isnan(tpot_ms)]),
        itl_ms=itl,
        e2el_ms=_distribution(measured.e2el_ms[rows]),
    )


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _distribution(values: Floats) -> Distribution:
    """`Distribution.of` for a column."""
    size = len(values)
    places = _places(size)
    ordered = np.partition(values, places) if places else values
    return _interpolated(
        size,
        float(values.sum()) / size if size else None,
        {place: float(ordered[place]) for place in places},
    )


def _gap_distribution(measured: _Measured, group: RequestGroup, gaps: WeighedGaps) -> Distribution:
    """Of a group's gaps, with one infinite gap for each stream that broke off."""
    runs, rows = measured.runs, group.requests
    broken = (measured.requests.outcome[rows] != _OK) & (measured.messages[rows] > 0)
    size = gaps.count + int(broken.sum())
    finite = [place for place in _places(size) if place < gaps.count]
    values = dict.fromkeys(_places(size), np.inf)
    values |= {place: value_ps / PS_PER_MS for place, value_ps in gaps.at(finite).items()}
    if size > gaps.count:
        return _interpolated(size, np.inf, values)
    spans_ms = (runs.last_ps[group.stretches] - runs.first_ps[group.stretches]) / PS_PER_MS
    pauses_ms = runs.pauses.start_ps[group.pauses] / PS_PER_MS
    mean = (float(spans_ms.sum()) + float(pauses_ms.sum())) / size if size else None
    return _interpolated(size, mean, values)


def _places(size: int) -> list[int]:
    """The places of the ascending sample that the percentiles need."""
    places = set()
    for percent in PERCENTS:
        position = (size - 1) * percent / 100
        places |= {int(position), min(int(position) + 1, size - 1)}
    return sorted(places) if size else []


def _interpolated(size: int, mean: float | None, values: Mapping[int, float]) -> Distribution:
    found: list[float | None] = []
    for percent in PERCENTS:
        position = (size - 1) * percent / 100
        below = int(position)
        low, high = values.get(below), values.get(min(below + 1, size - 1))
        if low is None or high is None:
            found.append(None)
        elif position == below or np.isinf(high):
            found.append(low if position == below else high)
        else:
            found.append(low + (high - low) * (position - below))
    median, p95, p99 = found
    return Distribution(count=size, mean=mean, median=median, p95=p95, p99=p99)
