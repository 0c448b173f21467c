"""Small scenarios for tests of the simulator, and what every simulation of theirs must satisfy."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.run import Simulation
from loraserve.simulator.scenario import ReplicaSetup, Scenario, versions_of
from placement.cluster.invariants import check_cluster
from placement.latency import LatencyModel, StepCost
from placement.types import ReplicaId, ReplicaSpec
from traces.columns import TraceAdapter, TraceColumns

RANKS = (8, 16, 32, 64, 128)
BYTES_PER_RANK = 1_000_000
NO_DELAYS = {"network_delay_s": 0.0, "report_delay_s": 0.0, "table_delay_s": 0.0}


def trace_of_columns(
    arrival_s: Any, prompt_tokens: Any, output_tokens: Any, adapter: Any, *, num_adapters: int = 0
) -> TraceColumns:
    """A trace of these columns; a single number stands for all requests."""
    arrivals = np.asarray(arrival_s, dtype=np.float64)

    def column(values: Any) -> Any:
        return np.broadcast_to(np.asarray(values, dtype=np.int32), arrivals.shape).copy()

    return TraceColumns(
        arrival_s=arrivals,
        prompt_tokens=column(prompt_tokens),
        output_tokens=column(output_tokens),
        adapter=column(adapter),
        adapters=tuple(
            TraceAdapter(name=f"a{index:02d}", rank=RANKS[index % len(RANKS)])
            for index in range(num_adapters)
        ),
        source="made",
        format="made",
    )


def poisson_trace(
    num_requests: int, rate: float, *, num_adapters: int = 5, seed: int = 0, base_share: float = 0.1
) -> TraceColumns:
    """Poisson arrivals of requests with lognormal lengths, some of them for the base model."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
    adapter = rng.integers(0, max(1, num_adapters), num_requests)
    adapter[rng.random(num_requests) < (base_share if num_adapters else 1.0)] = -1
    return trace_of_columns(
        arrivals - arrivals[0],
        np.clip(rng.lognormal(4.5, 1, num_requests), 1, 1500),
        np.clip(rng.lognormal(3.5, 1, num_requests), 1, 400),
        adapter,
        num_adapters=num_adapters,
    )


def replicas_of(
    num_replicas: int,
    *,
    pool_adapters: int = 8,
    latency: LatencyModel | None = None,
    limits: ReplicaLimits | None = None,
) -> tuple[ReplicaSetup, ...]:
    """Replicas of one kind: 10 ms steps and 0.05 ms per prompt token, unless told otherwise."""
    cost = StepCost.of(latency or LatencyModel(base_ms=10, prefill_token_ms=0.05, decode_rank_ms=0.001))
    return tuple(
        ReplicaSetup(
            spec=ReplicaSpec(
                replica_id=ReplicaId(f"r{index}"),
                max_lora_rank=128,
                pool_adapters=pool_adapters,
                pool_bytes=10**12,
            ),
            limits=limits or ReplicaLimits(kv_blocks=1000, max_num_seqs=16),
            cost=cost,
        )
        for index in range(num_replicas)
    )


def scenario_of(trace: TraceColumns, replicas: Sequence[ReplicaSetup], **options: Any) -> Scenario:
    """The scenario with these options."""
    return Scenario(
        trace=trace,
        adapters=versions_of(trace, bytes_per_rank=BYTES_PER_RANK),
        replicas=tuple(replicas),
        **options,
    )


def run_checked(scenario: Scenario) -> SimulationResult:
    """The scenario's result; AssertionError unless the cluster's own invariants hold at its end too."""
    simulation = Simulation(scenario)
    result = simulation.run()
    check_cluster(simulation.shell.state)
    return result


def digest(result: SimulationResult) -> str:
    """A digest of everything in a result but how long it took."""
    sha256 = hashlib.sha256()
    for field in fields(result):
        value = getattr(result, field.name)
        if field.name == "wall_s":
            continue
        if isinstance(value, np.ndarray):
            sha256.update(f"{value.dtype}".encode() + value.tobytes())
        elif field.name == "logs":
            for log in value:
                for part in fields(log):
                    column = getattr(log, part.name)
                    sha256.update(str(column).encode() if isinstance(column, int) else column.tobytes())
        else:
            sha256.update(repr(value).encode())
    return sha256.hexdigest()
