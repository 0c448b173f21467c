"""The simulator's side of a comparison: a live cluster as a scenario, and what the shell around it adds."""

import dataclasses
from dataclasses import dataclass

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.simulator.figures import records_of
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import ReplicaSetup, Scenario
from placement.latency import LatencyModel, StepCost
from placement.types import AdapterVersion, ReplicaSpec
from traces.columns import TraceColumns
from traces.records import Outcome, RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What the cluster around the engines adds: a step takes `step_factor` times what the latency model
    says, but its prompts' tokens `prefill_factor` times; a message between a router and a replica takes
    `message_delay_s`, in either direction."""

    step_factor: float = 1.0
    prefill_factor: float = 1.0
    message_delay_s: float = 0.0005

    def scaled(self, factor: float) -> "Overheads":
        """The same with all steps so many times as long."""
        return dataclasses.replace(
            self, step_factor=factor * self.step_factor, prefill_factor=factor * self.prefill_factor
        )

    def on(self, model: LatencyModel) -> LatencyModel:
        """The model with these factors."""
        whole = ("base_ms", "row_ms", "context_token_ms", "lora_step_ms", "adapter_ms", "decode_rank_ms")
        prompts = ("prefill_token_ms", "prefill_pair_ms", "prefill_rank_ms")
        changes = {name: self.step_factor * getattr(model, name) for name in whole}
        changes |= {name: self.prefill_factor * getattr(model, name) for name in prompts}
        return dataclasses.replace(model, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A live cluster as the simulator needs it: what is registered, its replicas, their engine's limits and
    latency model, and how its routers and controller are configured."""

    adapters: tuple[AdapterVersion, ...]
    replicas: tuple[ReplicaSpec, ...]
    limits: ReplicaLimits
    latency: LatencyModel
    policy: str
    routing: str
    routers: int
    max_waiting: int
    report_interval_s: float
    epoch_s: float
    seed: int

    def scenario(
        self, trace: TraceColumns, overheads: Overheads, *, endless_queues: bool = False
    ) -> Scenario:
        """This workload on this cluster; with `endless_queues` no replica is ever full."""
        by_name = {str(version.name): version for version in self.adapters}
        cost = StepCost.of(overheads.on(self.latency))
        return Scenario(
            trace=trace,
            adapters=tuple(by_name[adapter.name] for adapter in trace.adapters),
            replicas=tuple(ReplicaSetup(spec=spec, limits=self.limits, cost=cost) for spec in self.replicas),
            policy=self.policy,
            routing=self.routing,
            num_routers=self.routers,
            network_delay_s=overheads.message_delay_s,
            report_interval_s=self.report_interval_s,
            report_delay_s=overheads.message_delay_s,
            table_delay_s=overheads.message_delay_s,
            max_waiting=None if endless_queues else self.max_waiting,
            epoch_s=self.epoch_s,
            window_s=self.epoch_s,
            seed=self.seed,
        )


Runs = tuple[tuple[RequestRecord, ...], ...]
"""Several simulations of one workload that differ in what a live cluster leaves to chance."""


def simulated_runs(subject: Subject, trace: TraceColumns, overheads: Overheads, *, draws: int) -> Runs:
    """The workload's records as the simulator predicts them, `draws` times: each draws other lots where
    routing has a tie, and other moments for load reports, as every live run does."""
    scenario = subject.scenario(trace, overheads)
    return tuple(
        records_of(simulate(dataclasses.replace(scenario, seed=scenario.seed + draw)))
        for draw in range(draws)
    )


def saturated_requests_per_s(subject: Subject, trace: TraceColumns, overheads: Overheads) -> float:
    """The rate at which requests end while all that came at once are being served: from when a tenth of
    them has ended until seven tenths have, so that every batch is full."""
    result: SimulationResult = simulate(subject.scenario(trace, overheads, endless_queues=True))
    assert len(result) >= 10, "too few requests to saturate a cluster"
    ok = tuple(Outcome).index(Outcome.OK)
    ends_s: list[float] = sorted((result.end_ps[result.outcome == ok] / 1e12).tolist())
    first, last = len(ends_s) // 10, len(ends_s) * 7 // 10
    return (last - first) / (ends_s[last] - ends_s[first])
