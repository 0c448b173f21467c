"""What is simulated: a workload, a cluster, and everything that happens to it."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError
from loraserve.simulator.links import LinkSpeed
from placement.demand import DEFAULT_FORECASTER, FORECASTERS
from placement.latency import StepCost
from placement.policies import POLICIES
from placement.profile import Profile
from placement.routing.chooser import ROUTING_POLICIES
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, version_id
from traces.columns import TraceColumns

MAX_ROUTERS = 1000
MIN_PERIOD_S = 0.001
"""Shorter epochs would take the simulator longer than the requests do."""
MAX_TOKENS = 2**31 - 1
MAX_DURATION_S = 3e6
"""A month: 62 bits hold 53 days of picoseconds, and what came last has to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetup:
    """One replica: what the placement may give it, what its engine holds, and what a step costs."""

    spec: ReplicaSpec
    limits: ReplicaLimits
    cost: StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica that dies at `at_s` and can be started again `down_s` later."""

    at_s: float
    replica_id: ReplicaId
    down_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run of the simulator; everything that its result depends on.

    `adapters` has one version for each of the trace's, in its order: see `versions_of`. Requests are dealt
    to `num_routers` routers in turn; what a router sends and hears takes `network_delay_s`. A replica's
    load is sampled every `report_interval_s`, in its own phase, and seen `report_delay_s` later; a table
    reaches the routers after `table_delay_s`. A replica with `max_waiting` requests waiting is full, as in
    the live router. A request without a holder waits `holder_wait_s` for one.

    Every `epoch_s` the policy plans again, for what `forecast`, a forecaster of `placement.demand`, makes of
    the demand of the last `window_s` and before. Copies come from another holder over its `peer` link if
    there is one, else over the one `origin` link; `on_demand` fetches them when a request needs them, else
    they are loaded as planned and published when they are there.
    `profiles` are what policies know of the kinds of replicas, by `ReplicaSpec.profile`.
    `warm`: the first plan is loaded at the start. The controller hears of a failure `detection_s` after it.
    With `max_lora_ranks` planned, replicas whose kernel is padded_config are drained and started again, which
    takes `restart_s`, with the setting that the plan wants. With `migration` dlora, requests of overloaded
    replicas move every `migration_period_s`.

    BadInputError names the field, what it is and what would be right.
    """

    trace: TraceColumns
    adapters: tuple[AdapterVersion, ...]
    replicas: tuple[ReplicaSetup, ...]
    policy: str = "least-loaded"
    routing: str = "least-outstanding"
    num_routers: int = 1
    network_delay_s: float = 0.0005
    report_interval_s: float = 0.1
    report_delay_s: float = 0.001
    table_delay_s: float = 0.001
    max_waiting: int | None = 256
    holder_wait_s: float = 30.0
    epoch_s: float = 60.0
    window_s: float = 60.0
    forecast: str = DEFAULT_FORECASTER
    history_s: float = 300.0
    origin: LinkSpeed = field(default_factory=lambda: LinkSpeed(bytes_per_s=1e9, latency_s=0.01))
    peer: LinkSpeed | None = None
    on_demand: bool = False
    warm: bool = True
    failures: tuple[Failure, ...] = ()
    detection_s: float = 1.0
    max_restarts: int = 3
    max_lora_ranks: str = "fixed"
    restart_s: float = 60.0
    migration: str = "off"
    migration_period_s: float = 10.0
    seed: int = 0
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_replicas(self)
        _check_failures(self)
        _check_trace(self.trace)
        if len(self.adapters) != len(self.trace.adapters):
            _refuse(
                "adapters", f"{len(self.adapters)}", f"one for each of the trace's {len(self.trace.adapters)}"
            )

    def describe(self) -> dict[str, object]:
        """What is simulated, in plain values."""
        described: dict[str, object] = {
            "trace": self.trace.source,
            "requests": len(self.trace),
            "duration_s": self.trace.duration_s,
            "adapters": len(self.adapters),
            "replicas": len(self.replicas),
            "kernels": sorted({setup.cost.kernel.value for setup in self.replicas}),
            "origin_bytes_per_s": self.origin.bytes_per_s,
            "origin_latency_s": self.origin.latency_s,
            "peer_bytes_per_s": None if self.peer is None else self.peer.bytes_per_s,
            "peer_latency_s": None if self.peer is None else self.peer.latency_s,
            "failures": len(self.failures),
        }
        restarting = () if self.max_lora_ranks == "fixed" else _RESTARTING
        migrating = () if self.migration == "off" else _MIGRATING
        names = (*_PLAIN, *restarting, *migrating)
        return described | {name: getattr(self, name) for name in names}


_DURATIONS = ("report_interval_s", "epoch_s", "window_s", "history_s")
_DELAYS = ("network_delay_s", "report_delay_s", "table_delay_s", "holder_wait_s", "detection_s")
_RESTARTING = ("max_lora_ranks", "restart_s")
_MIGRATING = ("migration", "migration_period_s")
_PLAIN = (
    *("policy", "routing", "forecast"),
    *("num_routers", "max_waiting", "on_demand", "warm", "max_restarts", "seed"),
    *_DURATIONS,
    *_DELAYS,
)


def versions_of(
    trace: TraceColumns, *, bytes_per_rank: float, option: str = "--ranks"
) -> tuple[AdapterVersion, ...]:
    """A version for each adapter of a trace, `bytes_per_rank` bytes for each unit of its rank.

    BadInputError for an adapter of unknown rank; it names `option`, by which a user gives ranks.
    """
    versions = []
    for adapter in trace.adapters:
        if adapter.rank is None:
            raise BadInputError(
                f"adapter {adapter.name}: the trace gives it no rank; give ranks with {option}"
            )
        sha256 = hashlib.sha256(f"{adapter.name}/{adapter.rank}".encode()).hexdigest()
        name = AdapterName(adapter.name)
        versions.append(
            AdapterVersion(
                version_id=version_id(name, sha256),
                name=name,
                sha256=sha256,
                rank=adapter.rank,
                size_bytes=max(1, round(bytes_per_rank * adapter.rank)),
            )
        )
    return tuple(versions)


def _refuse(field: str, found: str, expected: str) -> None:
    raise BadInputError(f"{field}: {found}; expected {expected}")


def _check_names(scenario: Scenario) -> None:
    if scenario.policy not in POLICIES:
        _refuse("policy", repr(scenario.policy), f"one of {', '.join(sorted(POLICIES))}")
    if scenario.routing not in ROUTING_POLICIES:
        _refuse("routing", repr(scenario.routing), f"one of {', '.join(sorted(ROUTING_POLICIES))}")
    if scenario.max_lora_ranks not in ("fixed", "planned"):
        _refuse("max_lora_ranks", repr(scenario.max_lora_ranks), "fixed or planned")
    if scenario.migration not in ("off", "dlora"):
        _refuse("migration", repr(scenario.migration), "off or dlora")
    if scenario.forecast not in FORECASTERS:
        _refuse("forecast", repr(scenario.forecast), f"one of {', '.join(sorted(FORECASTERS))}")


def _check_numbers(scenario: Scenario) -> None:
    for name in (*_DURATIONS, "migration_period_s"):
        if not MIN_PERIOD_S <= getattr(scenario, name) <= MAX_DURATION_S:
            right = f"seconds from {MIN_PERIOD_S:g} to {MAX_DURATION_S:g}"
            _refuse(name, f"{getattr(scenario, name)} s", right)
    for name in (*_DELAYS, "restart_s"):
        if not 0 <= getattr(scenario, name) <= MAX_DURATION_S:
            _refuse(name, f"{getattr(scenario, name)} s", f"seconds from 0 to {MAX_DURATION_S:g}")
    if scenario.report_delay_s < scenario.network_delay_s:
        _refuse(
            "report_delay_s",
            f"{scenario.report_delay_s} s",
            f"at least network_delay_s ({scenario.network_delay_s} s), for a report crosses the network too",
        )
    if not 1 <= scenario.num_routers <= MAX_ROUTERS:
        _refuse("num_routers", f"{scenario.num_routers}", f"from 1 to {MAX_ROUTERS}")
    if scenario.max_waiting is not None and scenario.max_waiting < 1:
        _refuse("max_waiting", f"{scenario.max_waiting}", "at least 1, or none")
    if scenario.max_restarts < 0:
        _refuse("max_restarts", f"{scenario.max_restarts}", "at least 0")


def _check_replicas(scenario: Scenario) -> None:
    ids = [setup.spec.replica_id for setup in scenario.replicas]
    if not ids:
        _refuse("replicas", "none", "at least one")
    if len(set(ids)) != len(ids):
        _refuse("replicas", "two of one id", "each id once")
    if scenario.on_demand:
        return
    for setup in scenario.replicas:
        for name in ("pool_adapters", "pool_bytes"):
            held, planned = getattr(setup.limits, name), getattr(setup.spec, name)
            if 0 < held < planned:
                _refuse(
                    f"{setup.spec.replica_id}: limits.{name}",
                    f"{held}",
                    f"0 or at least the spec's {planned}, unless copies are fetched on demand",
                )


def _check_failures(scenario: Scenario) -> None:
    known = {setup.spec.replica_id for setup in scenario.replicas}
    for failure in scenario.failures:
        if failure.replica_id not in known:
            _refuse("failures", f"no replica {failure.replica_id!r}", f"one of the {len(known)} there are")
        for name in ("at_s", "down_s"):
            value = getattr(failure, name)
            if not (0 <= value <= MAX_DURATION_S):
                _refuse(f"failures: {name}", f"{value} s", f"seconds from 0 to {MAX_DURATION_S:g}")


def _check_trace(trace: TraceColumns) -> None:
    if not len(trace):
        raise BadInputError(f"{trace.source}: no requests; expected at least one")
    arrival_s = trace.arrival_s
    if not (math.isfinite(arrival_s[-1]) and arrival_s[0] >= 0 and bool(np.all(np.diff(arrival_s) >= 0))):
        raise BadInputError(f"{trace.source}: arrivals go back in time; expected them in order from 0 s")
    if arrival_s[-1] > MAX_DURATION_S:
        raise BadInputError(
            f"{trace.source}: lasts {arrival_s[-1]:.0f} s; expected {MAX_DURATION_S:g} s at most"
        )
    for name in ("prompt_tokens", "output_tokens"):
        column = getattr(trace, name)
        if column.min() < 1:
            row = int(np.argmin(column))
            raise BadInputError(f"{trace.source}: row {row}: {name} is {column[row]}; expected at least 1")
    if trace.adapter.min() < -1 or trace.adapter.max() >= len(trace.adapters):
        raise BadInputError(
            f"{trace.source}: an adapter's place is outside its {len(trace.adapters)} adapters"
        )
