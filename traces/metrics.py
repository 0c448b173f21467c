"""The one definition of every figure that a run is judged by; `formulas()` says each in words.

Works on records alone: the same for a live cluster, the emulated one and the simulator.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from traces.pacing import PACING_P99_LIMIT_MS, PacingStats, pacing_stats, void_reason
from traces.quantiles import Distribution, percentile
from traces.records import Outcome, RequestRecord
from traces.types import TraceError

BASE_MODEL = "base"
"""The group of requests that name no adapter."""

UNKNOWN_RANK = "unknown"
"""The group of adapter requests whose rank nobody told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The targets: a request is inside if its TTFT is at most `ttft_ms` and the 95th percentile of
    its own gaps at most `tbt_ms`."""

    ttft_ms: float = 2000.0
    tbt_ms: float = 150.0

    def __post_init__(self) -> None:
        for name, value in (("ttft_ms", self.ttft_ms), ("tbt_ms", self.tbt_ms)):
            if not value > 0:
                raise TraceError(f"an SLO with {name} = {value} can never be met; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """The figures of one group of requests, all of them after the warm-up; latencies in ms."""

    requests: int
    outcomes: Mapping[Outcome, int]
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float
    output_throughput: float
    total_token_throughput: float
    attainment: float | None
    slo_met: bool
    tokens_per_message: float | None
    ttft_ms: Distribution
    ttft_from_send_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2el_ms: Distribution

    @property
    def completed(self) -> int:
        """Requests whose outcome is ok."""
        return self.outcomes.get(Outcome.OK, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole run: all requests, and the same per rank and per adapter. `duration_s` is the window
    that every rate divides by. A run with a `void_reason` proves nothing."""

    overall: GroupSummary
    per_rank: Mapping[str, GroupSummary]
    per_adapter: Mapping[str, GroupSummary]
    slo: Slo
    duration_s: float
    warmup_requests: int
    pacing: PacingStats | None
    void_reason: str

    @property
    def void(self) -> bool:
        """Whether the run must be thrown away."""
        return bool(self.void_reason)


def summarise(records: Iterable[RequestRecord], *, slo: Slo | None = None, live: bool = True) -> Summary:
    """Every figure of a run. `live` False (simulated time) leaves the pacing error out.

    Requests marked as warm-up are left out of everything but `warmup_requests`.
    """
    everything = tuple(records)
    measured = [record for record in everything if not record.warmup]
    slo = slo or Slo()
    duration_s = window_s(measured)
    pacing = pacing_stats(measured) if live else None
    return Summary(
        overall=_group(measured, slo, duration_s),
        per_rank={name: _group(group, slo, duration_s) for name, group in by_rank(measured).items()},
        per_adapter={name: _group(group, slo, duration_s) for name, group in by_adapter(measured).items()},
        slo=slo,
        duration_s=duration_s,
        warmup_requests=len(everything) - len(measured),
        pacing=pacing,
        void_reason=void_reason(pacing) if pacing else "",
    )


def window_s(records: Sequence[RequestRecord]) -> float:
    """Seconds from the first scheduled arrival to the last end."""
    if not records:
        return 0.0
    return max(record.end_s for record in records) - min(record.scheduled_s for record in records)


def rank_group(record: RequestRecord) -> str:
    """The name of a record's rank group: 'base', the rank, or 'unknown'."""
    if record.adapter is None:
        return BASE_MODEL
    return UNKNOWN_RANK if record.rank is None else str(record.rank)


def by_rank(records: Iterable[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """Records per rank group: the base model first, then ranks ascending, then the unknown."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in records:
        groups.setdefault(rank_group(record), []).append(record)
    ends = {BASE_MODEL: -math.inf, UNKNOWN_RANK: math.inf}
    return {name: groups[name] for name in sorted(groups, key=lambda name: ends.get(name) or int(name))}


def by_adapter(records: Iterable[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """Records per adapter name, most requests first, ties by name; the base model is left out."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in records:
        if record.adapter is not None:
            groups.setdefault(record.adapter, []).append(record)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def ttft_ms(record: RequestRecord) -> float:
    """First token − scheduled arrival; infinite for a request that did not complete."""
    if record.outcome is not Outcome.OK or record.first_token_s is None:
        return math.inf
    return (record.first_token_s - record.scheduled_s) * 1000


def ttft_from_send_ms(record: RequestRecord) -> float:
    """First token − sending, which hides what waited in the client; infinite as for `ttft_ms`."""
    if record.outcome is not Outcome.OK or record.first_token_s is None:
        return math.inf
    return (record.first_token_s - record.sent_s) * 1000


def e2el_ms(record: RequestRecord) -> float:
    """Last token − scheduled arrival; infinite for a request that did not complete."""
    if record.outcome is not Outcome.OK or record.last_token_s is None:
        return math.inf
    return (record.last_token_s - record.scheduled_s) * 1000


def tpot_ms(record: RequestRecord) -> float | None:
    """(E2E − TTFT) / (output tokens − 1); None for a completed request of fewer than two tokens."""
    if record.outcome is not Outcome.OK:
        return math.inf
    if record.output_tokens < 2:
        return None
    return (e2el_ms(record) - ttft_ms(record)) / (record.output_tokens - 1)


def itl_ms(record: RequestRecord) -> list[float]:
    """Every gap between messages; a stream that broke off adds the infinite gap that never closed."""
    gaps = [gap * 1000 for gap in record.gaps_s()]
    if record.outcome is not Outcome.OK and record.message_times_s:
        gaps.append(math.inf)
    return gaps


def attains(record: RequestRecord, slo: Slo) -> bool:
    """Whether one request is inside every target of the SLO."""
    if ttft_ms(record) > slo.ttft_ms:
        return False
    tbt_p95_ms = percentile(sorted(itl_ms(record)), 95)
    return tbt_p95_ms is None or tbt_p95_ms <= slo.tbt_ms


def _group(records: Sequence[RequestRecord], slo: Slo, duration_s: float) -> GroupSummary:
    completed = [record for record in records if record.outcome is Outcome.OK]
    attained = sum(attains(record, slo) for record in records)
    input_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    messages = sum(len(record.message_tokens) for record in records)
    streamed_tokens = sum(sum(record.message_tokens) for record in records)
    ttft = Distribution.of([ttft_ms(record) for record in records])
    itl = Distribution.of([gap for record in records for gap in itl_ms(record)])
    return GroupSummary(
        requests=len(records),
        outcomes=dict(Counter(record.outcome for record in records)),
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        request_throughput=_rate(len(completed), duration_s),
        request_goodput=_rate(attained, duration_s),
        output_throughput=_rate(output_tokens, duration_s),
        total_token_throughput=_rate(input_tokens + output_tokens, duration_s),
        attainment=attained / len(records) if records else None,
        slo_met=_meets(ttft.p95, slo.ttft_ms) and (itl.p95 is None or itl.p95 <= slo.tbt_ms),
        tokens_per_message=streamed_tokens / messages if messages else None,
        ttft_ms=ttft,
        ttft_from_send_ms=Distribution.of([ttft_from_send_ms(record) for record in records]),
        tpot_ms=Distribution.of([value for record in records if (value := tpot_ms(record)) is not None]),
        itl_ms=itl,
        e2el_ms=Distribution.of([e2el_ms(record) for record in records]),
    )


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _meets(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def formulas() -> dict[str, str]:
    """Each figure's name and what it is, in the order a report prints them."""
    return {
        "TTFT": "first token − scheduled arrival, in ms; waiting anywhere, the client included, counts",
        "TTFT from send": "first token − sending, in ms; what most other tools call TTFT",
        "TBT / ITL": "every gap between consecutive messages of a stream, pooled over requests, in ms;"
        " a message is what one engine step added (tokens per message is printed)",
        "TPOT": "(E2E − TTFT) / (output tokens − 1), one value per request, in ms;"
        " requests of one token have none",
        "E2E": "last token − scheduled arrival, in ms",
        "attainment": "requests whose TTFT is inside the target and whose own 95th percentile of TBT is"
        " inside the target / requests offered",
        "goodput": "requests that attain / window, in requests per second",
        "SLO met": "the group's TTFT p95 and TBT p95 are both inside their targets",
        "window": "last end − first scheduled arrival, after the warm-up, in s; every rate divides by it",
        "throughput": "completed requests (or their tokens) / window",
        "failures": "a refused, failed, truncated or cancelled request has infinite TTFT, TPOT and E2E;"
        " if its stream had begun, one infinite gap is added to TBT. A percentile or mean that reaches"
        ' such a value is infinite: "inf" in JSON, where null means that there was nothing to measure',
        "percentiles": "over requests (TBT: over gaps) after the warm-up, by linear interpolation",
        "pacing error": "|sent − scheduled| in ms;"
        f" a live run with p99 above {PACING_P99_LIMIT_MS:.0f} ms is void",
    }
