"""The open-loop schedule of a trace, and how well a client kept to it.

Owns no clock: the client waits, this says until when.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from traces.quantiles import percentile
from traces.records import RequestRecord
from traces.types import Trace, TraceError, TraceRequest

PACING_P99_LIMIT_MS = 10.0
"""A live run whose pacing error exceeds this at the 99th percentile measured the client, not the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacingStats:
    """How far from their scheduled times requests were sent; None where none was."""

    requests: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None


def schedule(trace: Trace, speedup: float = 1.0) -> tuple[tuple[float, TraceRequest], ...]:
    """`(due_s, request)` in order; `due_s` counts from the start of the run and never depends on completions.

    A `speedup` of 2 sends the same requests in half the time.
    """
    if not 0 < speedup < math.inf:
        raise TraceError(f"a speedup of {speedup} is not possible; it must be a number above 0")
    return tuple((request.arrival_s / speedup, request) for request in trace.requests)


def pacing_stats(records: Iterable[RequestRecord]) -> PacingStats:
    """The distribution of |sent − scheduled| over these requests."""
    errors_ms = sorted(abs(record.sent_s - record.scheduled_s) * 1000 for record in records)
    return PacingStats(
        requests=len(errors_ms),
        p50_ms=percentile(errors_ms, 50),
        p99_ms=percentile(errors_ms, 99),
        max_ms=errors_ms[-1] if errors_ms else None,
    )


def void_reason(pacing: PacingStats) -> str:
    """Why a live run with this pacing is void; '' if it is not."""
    if pacing.p99_ms is None or pacing.p99_ms <= PACING_P99_LIMIT_MS:
        return ""
    return (
        f"the pacing error's p99 is {pacing.p99_ms:.1f} ms, above {PACING_P99_LIMIT_MS:.0f} ms:"
        " the client was too slow for this schedule, so the latencies are not the cluster's alone"
    )
