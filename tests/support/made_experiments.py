"""Experiments' results made up by a test."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraserve.experiments.results import ExperimentResult, Fewest, Highest, JobResult, Point, Probe, RankMap
from loraserve.experiments.spec import parse_experiment, share_of

FLUID_PER_S = 10.0
"""Of one replica."""

Capacity = Callable[[str, str, str, int], float]
"""The share of the fluid rate that a policy holds, by trace, policy, kernel and seed; 0: never."""


def point_of(rate_per_s: float, replicas: int, *, asked: str = "", **values: Any) -> Point:
    """A run of middling figures, but for those named."""
    given: dict[str, Any] = {
        "asked": asked or str(rate_per_s),
        "rate_per_s": rate_per_s,
        "replicas": replicas,
        "requests": 1000,
        "failed": 0,
        "throughput_per_s": rate_per_s,
        "goodput_per_s": rate_per_s,
        "attainment": 0.99,
        "in_slo": True,
        "ttft_p50_ms": 50.0,
        "ttft_p95_ms": 100.0,
        "ttft_p99_ms": 200.0,
        "tbt_p50_ms": 30.0,
        "tbt_p95_ms": 60.0,
        "tbt_p99_ms": 90.0,
        "latency_per_token_ms": 40.0,
        "utilisation": 0.8,
        "bytes_moved": 5 * 2**20,
        "resident_bytes": replicas * 7.0 * 2**20,
        "copies": 50,
        "cold_misses": 3,
        **values,
    }
    return Point(**given)


def result_of(tree: Mapping[str, Any], capacity: Capacity) -> ExperimentResult:
    """What this experiment would give were latency a function of the rate over the capacity."""
    experiment = parse_experiment(dict(tree))
    sizes = list(experiment.replicas) if experiment.all_rates or experiment.find.highest_rate else []
    sizes += [0] if experiment.find.fewest_replicas_at else []
    kernels = [kernel.value for kernel in experiment.kernels] or ["sum"]
    jobs = []
    for trace in experiment.traces:
        for kernel in kernels:
            for profile in experiment.profiles:
                for replicas in sizes:
                    for policy in experiment.policies:
                        for seed in experiment.seeds:
                            held = capacity(trace.name, policy, kernel, seed)
                            jobs.append(
                                _job(experiment, held, (trace.name, policy, kernel, profile), replicas, seed)
                            )
    return ExperimentResult(name="made", experiment=experiment, jobs=tuple(jobs))


def _job(
    experiment: Any, held: float, names: tuple[str, str, str, str], replicas: int, seed: int
) -> JobResult:
    trace, policy, kernel, profile = names
    fluid = FLUID_PER_S * max(1, replicas)
    known: dict[str, Any] = {
        "trace": trace,
        "policy": policy,
        "kernel": kernel,
        "profile": profile,
        "replicas": replicas,
        "seed": seed,
        "fluid_per_s": fluid,
    }
    if not replicas:
        most = experiment.find.most_replicas
        answers = [_fewest(rate, held, most) for rate in experiment.find.fewest_replicas_at]
        return JobResult(**known, fewest=tuple(answers))
    rates = [(str(asked), (share_of(asked) or 1.0) * fluid) for asked in experiment.all_rates]
    highest = Highest(held_per_s=held * fluid, failed_per_s=max(held * 1.02, 0.02) * fluid, probes=())
    return JobResult(
        **known,
        points=tuple(
            _point(asked, rate, replicas, rate / fluid / held if held else 9.0) for asked, rate in rates
        ),
        highest=highest if experiment.find.highest_rate else None,
        rank_map=_rank_map(replicas) if seed == experiment.seeds[0] and rates else None,
    )


def _point(asked: str, rate_per_s: float, replicas: int, load: float) -> Point:
    is_lost = load > 2
    ttft_ms = 100.0 * load
    return point_of(
        rate_per_s,
        replicas,
        asked=asked,
        failed=500 if is_lost else 0,
        attainment=min(1.0, 1 / load),
        in_slo=load <= 1,
        ttft_p50_ms=ttft_ms / 2,
        ttft_p95_ms=None if is_lost else ttft_ms,
        ttft_p99_ms=None if is_lost else ttft_ms * 2,
    )


def _fewest(rate: float, held: float, most: int) -> Fewest:
    needed = math.ceil(rate / FLUID_PER_S / held) if held else most + 1
    tried: Sequence[int] = sorted({min(most, needed), max(1, min(most, needed - 1)), most})
    return Fewest(
        asked=str(rate),
        rate_per_s=rate,
        replicas=needed if needed <= most else 0,
        probes=tuple(
            Probe(rate_per_s=rate, replicas=replicas, held=replicas >= needed, ttft_p95_ms=100.0)
            for replicas in tried
        ),
    )


def _rank_map(replicas: int) -> RankMap:
    return RankMap(
        rate_per_s=1.0,
        edges_s=(0.0, 1.0, 2.0, 3.0),
        rank=tuple((8.0, None, 128.0) for _ in range(replicas)),
        busy=tuple((1.0, 0.0, 0.5) for _ in range(replicas)),
    )
