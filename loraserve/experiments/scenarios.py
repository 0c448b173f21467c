"""The scenarios of a job: its workload at a rate, on so many replicas."""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from loraserve.errors import BadInputError
from loraserve.experiments.jobs import Job
from loraserve.simulator.from_profile import ClusterOptions, parse_failures, scenario_of
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.workload import SimulatedWorkload
from placement.latency import RankKernel
from traces.columns import TraceColumns
from traces.synthesis import is_preset
from traces.synthesis.tiling import at_rate

FLUID_RATE_PER_S, FLUID_DURATION_S = 10.0, 200.0
"""Of the workload that a preset's fluid rate is taken from."""


def scenario_at(job: Job, rate_per_s: float, replicas: int) -> Scenario:
    """The job's workload at this rate on so many replicas."""
    cluster = job.experiment.cluster
    options = ClusterOptions(
        num_replicas=replicas,
        policy=job.contender.policy,
        routing=job.contender.routing,
        kernel=job.kernel or None,
        speed=cluster.speed,
        num_routers=cluster.routers,
        epoch_s=cluster.epoch_s,
        window_s=cluster.window_s or None,
        forecast=job.contender.forecast,
        report_interval_s=cluster.report_interval_s,
        max_waiting=cluster.max_waiting,
        pool_bytes=round(cluster.pool_mib * 2**20) or None,
        on_demand=cluster.on_demand,
        from_origin_only=cluster.from_origin_only,
        failures=parse_failures(cluster.fail),
        max_lora_ranks=cluster.max_lora_ranks,
        restart_s=cluster.restart_s,
        migration=cluster.migration if job.contender.migration == "off" else job.contender.migration,
    )
    trace = requests_at(job.workload, rate_per_s, job.seed)
    return scenario_of(job.profile, trace, options, seed=job.seed)


def fluid_per_s(job: Job, replicas: int) -> float:
    """Requests per second that would keep so many replicas exactly busy if ranks never met in a batch, by the
    profile's operating points; an upper bound where batches are padded. BadInputError if it has none."""
    if not job.profile.operating_points:
        raise BadInputError(
            f"profile {job.profile.name} has no operating points to take shares of; give rates in requests"
            " per second"
        )
    typical = ClusterOptions(kernel=job.kernel or None, speed=job.experiment.cluster.speed)
    trace = typical_requests(job.workload, job.seed)
    (known,) = scenario_of(job.profile, trace, typical).profiles.values()
    latency = known.latency
    is_fixed = latency is not None and latency.kernel is RankKernel.PADDED_CONFIG
    if job.experiment.cluster.max_lora_ranks == "planned":
        is_fixed = False
    ranks = [adapter.rank or 0 for adapter in trace.adapters]
    ranks = [known.engine.max_lora_rank if is_fixed else rank for rank in ranks]
    speeds = np.array([*(known.operating_point(rank) for rank in ranks), known.operating_point(0)])
    tokens = trace.prompt_tokens.astype(np.int64) + trace.output_tokens
    return replicas * len(trace) / float((tokens / speeds[trace.adapter]).sum())


def own_rate(workload: SimulatedWorkload, seed: int) -> float:
    """Requests per second of the workload as it is by itself."""
    trace = _drawn(workload, None, seed)
    return max(len(trace) - 1, 1) / trace.duration_s if trace.duration_s > 0 else 1.0


def requests_at(workload: SimulatedWorkload, rate_per_s: float, seed: int) -> TraceColumns:
    """The workload at this mean rate."""
    if is_preset(workload.source) and workload.speedup is None:
        return _drawn(workload, rate_per_s, seed)
    return at_rate(_drawn(workload, None, seed), rate_per_s)


def typical_requests(workload: SimulatedWorkload, seed: int) -> TraceColumns:
    """Requests to take the workload's cost from."""
    if not is_preset(workload.source):
        return _drawn(workload, None, seed)
    return _drawn(replace(workload, duration_s=FLUID_DURATION_S, requests=None), FLUID_RATE_PER_S, 0)


@lru_cache(maxsize=8)
def _drawn(workload: SimulatedWorkload, rate_per_s: float | None, seed: int) -> TraceColumns:
    return replace(workload, rate_per_s=rate_per_s).draw(seed)
