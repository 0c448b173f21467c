"""From a simulation's columns to its figures, and to the little that its pictures are drawn from."""

import itertools
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.simulator.result import EpochRecord, SimulationResult
from traces.metrics import Slo, Summary
from traces.records import Outcome, RequestRecord
from traces.runs.gap_quantiles import WeighedGaps
from traces.runs.run_metrics import ALL, RequestColumns, RunMetrics, summarise_runs
from traces.runs.step_runs import ReplicaSteps, spread_rows
from traces.runs.step_time import busy_time

PS_PER_S = 1e12
MAX_BINS = 120
MAX_CURVE_POINTS = 400
_OK = tuple(Outcome).index(Outcome.OK)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How a simulation is judged: the targets, and the seconds at its start that do not count.

    `per_adapter` adds the figures of each adapter, which takes time in proportion to all gaps.
    """

    slo: Slo = field(default_factory=Slo)
    warmup_s: float = 0.0
    per_adapter: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """A cumulative share: `share[i]` of the sample is at most `value_ms[i]`; failures lower its top."""

    value_ms: Floats
    share: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunPictures:
    """What a run's pictures are drawn from, warm-up included where it is over time.

    The bins end at `edges_s[1:]`. `busy` is the share of each bin that a replica computed in, `rank` the
    largest rank in a step, meant over that time and NaN without any: rows are replicas. `due` and
    `completed` are requests per second. The curves are per rank, and of all requests under ALL.
    """

    edges_s: Floats
    busy: Floats
    rank: Floats
    due: Floats
    completed: Floats
    ttft: Mapping[str, Curve]
    tbt: Mapping[str, Curve]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunFigures:
    """Everything that is told of one simulation; small, whatever was simulated.

    `utilisation` is the share of the window in which replicas computed, meant over all of them; `copies`
    how many copies of adapters they held at the end; `epochs` the policy's, warm-up included. `wall_s` and
    `judging_s` are what simulating and judging took on this machine: all else is the same in every run of the
    scenario. `first_failure` is the first request that failed and why, empty without one.
    """

    policy: str
    routing: str
    seed: int
    replica_ids: tuple[str, ...]
    num_requests: int
    summary: Summary
    utilisation: float
    copies: int
    bytes_moved: int
    cold_misses: int
    epochs: tuple[EpochRecord, ...]
    num_events: int
    wall_s: float
    judging_s: float
    scenario: Mapping[str, object]
    pictures: RunPictures
    first_failure: str = ""

    @property
    def simulated_requests_per_s(self) -> float:
        """Requests per second of this machine's time, judging included."""
        spent_s = self.wall_s + self.judging_s
        return self.num_requests / spent_s if spent_s > 0 else 0.0


def figures_of(result: SimulationResult, judging: Judging) -> RunFigures:
    """Judge a simulation; nothing is written out per token."""
    begun_s = time.perf_counter()
    metrics = metrics_of(result, judging)
    pictures = _pictures(result, metrics)
    return RunFigures(
        policy=result.policy,
        routing=result.routing,
        seed=result.seed,
        replica_ids=result.replica_ids,
        num_requests=len(result),
        summary=metrics.summary,
        utilisation=_utilisation(result, judging.warmup_s),
        copies=sum(result.epochs[-1].copies) if result.epochs else 0,
        bytes_moved=result.bytes_moved,
        cold_misses=result.cold_misses,
        epochs=result.epochs,
        num_events=result.num_events,
        wall_s=result.wall_s,
        judging_s=time.perf_counter() - begun_s,
        scenario=result.scenario,
        pictures=pictures,
        first_failure=_first_failure(result),
    )


def _first_failure(result: SimulationResult) -> str:
    if not result.statuses:
        return ""
    row = min(result.statuses)
    return f"request {row}: {result.statuses[row]}"


def metrics_of(result: SimulationResult, judging: Judging) -> RunMetrics:
    """The figures of `traces.metrics`, the same as of the simulation's records."""
    return summarise_runs(
        RequestColumns(
            arrival_ps=result.arrival_ps,
            first_ps=result.first_ps,
            end_ps=result.end_ps,
            prompt_tokens=result.prompt_tokens,
            output_tokens=result.drawn_tokens,
            outcome=result.outcome,
            adapter=result.adapter,
            adapters=result.adapters,
        ),
        [steps_of_log(log) for log in result.logs],
        slo=judging.slo,
        warmup_s=judging.warmup_s,
        per_adapter=judging.per_adapter,
    )


def steps_of_log(log: ReplicaLog) -> ReplicaSteps:
    """The log's columns as numpy sees them, without a copy."""
    return ReplicaSteps(
        run_step=column(log.run_step),
        run_ps=column(log.run_ps),
        run_step_ps=column(log.run_step_ps),
        run_growth_ps=column(log.run_growth_ps),
        num_steps=log.num_steps,
        stretch_request=column(log.stretch_request),
        stretch_first=column(log.stretch_first),
        stretch_last=column(log.stretch_last),
    )


def column(values: "array[int]") -> NDArray[np.int64]:
    """One of a log's columns as numpy sees it, without a copy."""
    return np.frombuffer(values, dtype=np.int64)


def records_of(result: SimulationResult, *, warmup_s: float = 0.0) -> tuple[RequestRecord, ...]:
    """The simulation as a client would have recorded it, one message per token; for small runs.

    A message comes as long after its step as the request's first one did.
    """
    times_s = _token_times_s(result)
    outcomes = tuple(Outcome)
    adapters = (*((one.name, one.rank) for one in result.adapters), (None, None))
    replica_ids = (*result.replica_ids, None)
    return tuple(
        RequestRecord(
            index=index,
            request_id=f"simulated-{index}",
            adapter=adapters[result.adapter[index]][0],
            rank=adapters[result.adapter[index]][1],
            scheduled_s=arrival_ps / PS_PER_S,
            sent_s=arrival_ps / PS_PER_S,
            end_s=int(result.end_ps[index]) / PS_PER_S,
            prompt_tokens=int(result.prompt_tokens[index]),
            output_tokens=int(result.drawn_tokens[index]),
            expected_output_tokens=int(result.output_tokens[index]),
            outcome=outcomes[result.outcome[index]],
            status=result.statuses.get(index, ""),
            message_times_s=times_s[index],
            message_tokens=(1,) * len(times_s[index]),
            replica_id=replica_ids[result.replica[index]],
            warmup=arrival_ps < round(warmup_s * PS_PER_S),
            attempts=int(result.attempts[index]),
        )
        for index, arrival_ps in enumerate(result.arrival_ps.tolist())
    )


def _token_times_s(result: SimulationResult) -> list[tuple[float, ...]]:
    requests, times_ps = [], []
    for log in result.logs:
        steps = steps_of_log(log)
        tokens = steps.stretch_last - steps.stretch_first + 1
        row, place = spread_rows(tokens)
        step = steps.stretch_first[row] + place
        run = np.searchsorted(steps.run_step, step, side="right") - 1
        number = step - steps.run_step[run] + 1
        grown_ps = steps.run_growth_ps[run] * (number * (number - 1) // 2)
        times_ps.append(steps.run_ps[run] + number * steps.run_step_ps[run] + grown_ps)
        requests.append(steps.stretch_request[row])
    if not requests:
        return [()] * len(result)
    request, time_ps = np.concatenate(requests), np.concatenate(times_ps)
    order = np.lexsort((time_ps, request))
    request, time_ps = request[order], time_ps[order]
    bounds = np.searchsorted(request, np.arange(len(result) + 1))
    drew = np.flatnonzero(np.diff(bounds))
    delay_ps = np.zeros(len(result), dtype=np.int64)
    delay_ps[drew] = result.first_ps[drew] - time_ps[bounds[drew]]
    times_s = ((time_ps + delay_ps[request]) / PS_PER_S).tolist()
    return [tuple(times_s[first:last]) for first, last in itertools.pairwise(bounds.tolist())]


def _utilisation(result: SimulationResult, warmup_s: float) -> float:
    counted = result.arrival_ps >= round(warmup_s * PS_PER_S)
    if not counted.any():
        return 0.0
    edges_ps = np.array([result.arrival_ps[counted].min(), result.end_ps[counted].max()])
    busy_s = sum(
        float(busy_time(steps_of_log(log), column(log.run_max_rank), edges_ps).busy_s[0])
        for log in result.logs
    )
    window_s = float(edges_ps[1] - edges_ps[0]) / PS_PER_S
    return busy_s / (window_s * len(result.replica_ids)) if window_s > 0 else 0.0


def _pictures(result: SimulationResult, metrics: RunMetrics) -> RunPictures:
    end_ps = int(result.end_ps.max(initial=1))
    bins = max(1, min(MAX_BINS, end_ps // 1_000_000_000))
    edges_ps = np.linspace(0, end_ps, bins + 1).astype(np.int64)
    busy_s = np.zeros((len(result.replica_ids), bins))
    rank_s = np.zeros_like(busy_s)
    for log, replica in zip(result.logs, result.log_replica, strict=True):
        spent = busy_time(steps_of_log(log), column(log.run_max_rank), edges_ps)
        busy_s[replica] += spent.busy_s
        rank_s[replica] += spent.rank_s
    edges_s = edges_ps / PS_PER_S
    width_s = np.diff(edges_s)
    completed_ps = result.end_ps[result.outcome == _OK]
    groups = {ALL: metrics.summary.overall, **metrics.summary.per_rank}
    return RunPictures(
        edges_s=edges_s,
        busy=busy_s / width_s,
        rank=np.divide(rank_s, busy_s, out=np.full_like(rank_s, np.nan), where=busy_s > 0),
        due=np.histogram(result.arrival_ps, edges_ps)[0] / width_s,
        completed=np.histogram(completed_ps, edges_ps)[0] / width_s,
        ttft={name: _ttft_curve(values) for name, values in metrics.ttft_ms.items()},
        tbt={name: _gap_curve(gaps, groups[name].itl_ms.count) for name, gaps in metrics.gaps.items()},
    )


def _ttft_curve(ttft_ms: Floats) -> Curve:
    ordered = np.sort(ttft_ms[np.isfinite(ttft_ms)])
    places = _some(len(ordered))
    return Curve(value_ms=ordered[places], share=(places + 1) / len(ttft_ms))


def _gap_curve(gaps: WeighedGaps, count: int) -> Curve:
    value_ps, counts = gaps.curve()
    places = _some(len(value_ps))
    return Curve(value_ms=value_ps[places] / 1e9, share=counts[places] / max(count, 1))


def _some(size: int) -> NDArray[np.int64]:
    """Places evenly through a sample of this size, first and last included, as many as a picture shows."""
    return np.unique(np.linspace(0, max(size - 1, 0), min(size, MAX_CURVE_POINTS)).round().astype(np.int64))
