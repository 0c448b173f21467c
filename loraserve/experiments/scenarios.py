"""The scenarios of a job: its workload at a rate, on so many replicas."""

import numpy as np

from loraserve.errors import BadInputError
from loraserve.experiments.drawn import requests_at, typical_requests
from loraserve.experiments.jobs import Job
from loraserve.simulator.from_profile import ClusterOptions, parse_failures, scenario_of
from loraserve.simulator.scenario import Scenario
from placement.latency import RankKernel


def scenario_at(job: Job, rate_per_s: float | None, replicas: int) -> Scenario:
    """The job's workload at this rate, None: as it is by itself, on so many replicas; BadInputError if all of
    it comes in the warm-up."""
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
    last_s = float(trace.arrival_s[-1]) if len(trace) else 0.0
    if not len(trace) or last_s < cluster.warmup_s:
        at = "" if rate_per_s is None else f" at {rate_per_s:.4g}/s"
        raise BadInputError(
            f"cluster.warmup_s: {cluster.warmup_s:g} leaves nothing; expected at most {last_s:g}, when the"
            f" last request comes{at}"
        )
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
