"""What replicas did with their time: how much of it they computed, and for which rank."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.runs.step_runs import ReplicaSteps, Whole, ends_ps

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BusyTime:
    """Per bin of time: seconds in a step, and those seconds times the largest rank in the step."""

    busy_s: Floats
    rank_s: Floats


def busy_time(steps: ReplicaSteps, max_rank: Whole, edges_ps: Whole) -> BusyTime:
    """One replica's time between these ascending edges; `max_rank` is the largest rank in each run."""
    if not len(steps.run_ps):
        none = np.zeros(len(edges_ps) - 1)
        return BusyTime(busy_s=none, rank_s=none)
    spans_ps = ends_ps(steps, np.diff(steps.run_step, append=steps.num_steps)) - steps.run_ps
    return BusyTime(
        busy_s=_between(steps.run_ps, spans_ps, np.ones(len(spans_ps)), edges_ps),
        rank_s=_between(steps.run_ps, spans_ps, max_rank.astype(np.float64), edges_ps),
    )


def _between(start_ps: Whole, span_ps: Whole, weight: Floats, edges_ps: Whole) -> Floats:
    """Weighted seconds of the spans, which do not overlap, between each two edges."""
    sums = np.concatenate((np.zeros(1), np.cumsum(span_ps * weight)))
    begun = np.searchsorted(start_ps, edges_ps, side="right")
    last = np.maximum(begun - 1, 0)
    inside_ps = np.where(begun > 0, np.minimum(edges_ps - start_ps[last], span_ps[last]), 0)
    return np.diff(np.where(begun > 0, sums[last] + inside_ps * weight[last], 0.0)) / 1e12
