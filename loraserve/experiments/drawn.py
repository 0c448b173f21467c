"""The requests of an experiment's workload, as it is by itself or at a rate."""

from dataclasses import replace
from functools import lru_cache

from loraserve.simulator.workload import SimulatedWorkload
from traces.columns import TraceColumns
from traces.synthesis import is_preset
from traces.synthesis.tiling import at_rate

FLUID_RATE_PER_S, FLUID_DURATION_S = 10.0, 200.0
"""Of the workload that a preset's fluid rate is taken from."""


def own_rate(workload: SimulatedWorkload, seed: int) -> float:
    """Requests per second of the workload as it is by itself."""
    trace = _drawn(workload, None, seed)
    return max(len(trace) - 1, 1) / trace.duration_s if trace.duration_s > 0 else 1.0


def requests_at(workload: SimulatedWorkload, rate_per_s: float | None, seed: int) -> TraceColumns:
    """The workload at this mean rate, None: as it is by itself."""
    if rate_per_s is None or (is_preset(workload.source) and workload.speedup is None):
        return _drawn(workload, rate_per_s, seed)
    return at_rate(_drawn(workload, None, seed), rate_per_s)


def typical_requests(workload: SimulatedWorkload, seed: int) -> TraceColumns:
    """Requests to take the workload's cost from."""
    if not is_preset(workload.source):
        return _drawn(workload, None, seed)
    typical = replace(workload, duration_s=FLUID_DURATION_S, requests=None, speedup=None)
    return _drawn(typical, FLUID_RATE_PER_S, 0)


@lru_cache(maxsize=8)
def _drawn(workload: SimulatedWorkload, rate_per_s: float | None, seed: int) -> TraceColumns:
    return replace(workload, rate_per_s=rate_per_s).draw(seed)
