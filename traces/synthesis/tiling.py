"""Making a workload longer, faster or slower without changing what is in it."""

from dataclasses import replace

import numpy as np

from traces.columns import TraceColumns
from traces.synthesis.checks import MAX_REQUESTS, check_above_zero
from traces.types import TraceError


def tile(columns: TraceColumns, num_requests: int) -> TraceColumns:
    """The first `num_requests` of the workload repeated in time without end.

    From the last arrival to the first of the next repetition there is the workload's mean gap. The
    repetitions name the same adapters and the same prompt blocks.
    """
    have = len(columns)
    if not 1 <= num_requests <= MAX_REQUESTS:
        raise TraceError(f"{num_requests:,} requests are not possible; it must be 1 to {MAX_REQUESTS:,}")
    if have == 0:
        raise TraceError("a workload without requests cannot be repeated", source=columns.source)
    period_s = columns.duration_s * have / max(have - 1, 1)
    if have < num_requests and period_s <= 0:
        raise TraceError("its requests all arrive at once; repeated they would too", source=columns.source)
    place = np.arange(num_requests) % have
    repeated = columns.take(place)
    return replace(repeated, arrival_s=repeated.arrival_s + np.arange(num_requests) // have * period_s)


def scale_rate(columns: TraceColumns, factor: float) -> TraceColumns:
    """The same requests arriving `factor` times as fast."""
    check_above_zero("the factor of a rate", factor, 1e12)
    return replace(columns, arrival_s=columns.arrival_s / factor)


def at_rate(columns: TraceColumns, rate_per_s: float) -> TraceColumns:
    """The same requests arriving at a mean rate per second."""
    check_above_zero("the rate per second", rate_per_s, 1e12)
    if columns.duration_s <= 0:
        raise TraceError("its requests all arrive at once; it has no rate", source=columns.source)
    return scale_rate(columns, rate_per_s * columns.duration_s / max(len(columns) - 1, 1))
