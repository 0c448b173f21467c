"""What a client learns of adapters and of the cluster, as plain values."""

from dataclasses import dataclass, field

from loraserve.rpc.plan_codec import decode_diff, decode_plan, decode_skew
from loraserve.rpc.v1 import management_pb2
from placement.plans.diff import PlanDiff
from placement.plans.skew import Skew
from placement.types import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBy:
    """Where a request was answered and why there; what the router did not say is None. `failovers` is how
    often the router sent it elsewhere because a replica was lost."""

    replica: str | None = None
    table_version: int | None = None
    reason: str | None = None
    failovers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderStatus:
    """A replica with a copy, and its share of the adapter's requests."""

    replica_id: str
    share: float
    spill: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """One registered adapter; `version` is `name@digest16`. Its demand is in prompt and output tokens per
    second, as counted lately and as expected for the next epoch. Of its `requests`, whoever brought them,
    `in_slo` were inside their targets; `cold_misses` met no active copy of it. `recent_` is what came in the
    last five minutes, the rest since its replicas began. Its tokens count `weight` times for the placement;
    the targets are its own (`has_own_slo`) or the cluster's."""

    name: str
    version: str
    rank: int
    size_bytes: int
    sha256: str
    source: str
    target_modules: tuple[str, ...]
    holders: tuple[HolderStatus, ...]
    demand_tokens_per_s: float = 0.0
    forecast_tokens_per_s: float = 0.0
    recent_requests: int = 0
    recent_in_slo: int = 0
    recent_cold_misses: int = 0
    requests: int = 0
    in_slo: int = 0
    cold_misses: int = 0
    weight: float = 1.0
    slo_ttft_ms: float = 0.0
    slo_tbt_ms: float = 0.0
    has_own_slo: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica; `resident` are version ids, at most `pool_adapters` of them; `adapter_slots` is how many
    different ones a batch may hold, and `active_adapters` how many have a slot now. Of the slots'
    `slot_allocated_bytes` the adapters' true ranks fill `slot_used_bytes`; padded to the highest rank, all
    slots would take `slot_padded_bytes`. Zeros there mean that the engine does not say. The forecast asks
    `demand_tokens_per_s` of it, which is `utilisation` of its operating point for that mix of ranks;
    `operating_point_tokens_per_s` is 0 where no profile says it, and utilisations can only be compared."""

    replica_id: str
    state: str
    address: str
    max_lora_rank: int
    adapter_slots: int
    pool_adapters: int
    resident: tuple[str, ...]
    resident_bytes: int
    running: int
    waiting: int
    kv_cache_usage: float
    engine: str
    pid: int
    restarts: int
    reason: str
    node_id: str
    active_adapters: int = 0
    slot_allocated_bytes: int = 0
    slot_used_bytes: int = 0
    slot_padded_bytes: int = 0
    highest_resident_rank: int = 0
    demand_tokens_per_s: float = 0.0
    operating_point_tokens_per_s: float = 0.0
    utilisation: float = 0.0
    pool_bytes: int = 0
    profile: str = ""
    fabric: "FabricStatus" = field(default_factory=lambda: FabricStatus())


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricSource:
    """Loads whose bytes came from there: `cache`, `origin`, or the transport that a peer was asked over."""

    source: str
    loads: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricStatus:
    """What a replica's adapter fabric has done since the replica began: `failures` are attempts by kind,
    `cached_bytes` adapters that no copy needs, `open_breakers` peers and transports not tried now."""

    sources: tuple[FabricSource, ...] = ()
    failures: dict[str, int] = field(default_factory=dict)
    cached_bytes: int = 0
    open_breakers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStatus:
    """How far a replica's drain is: the versions that no other replica holds yet, the requests that run,
    and those that were ended at the deadline to go on elsewhere."""

    replica_id: str
    state: str
    waiting_for: tuple[str, ...]
    running: int
    moved: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStatus:
    """The plan in force, whether it is frozen, why the policy's last one was refused ('' if it was not),
    and why each plan before gave way, the oldest first. `proposed` is what the policy would make now, with
    what it would change, and `refusal` why it would be refused; None if it was not asked for."""

    current: Placement
    frozen: bool
    problem: str
    earlier: tuple[str, ...]
    proposed: Placement | None
    diff: PlanDiff | None
    refusal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """What was changed, and whether the plan is frozen now."""

    diff: PlanDiff
    frozen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """The counters of the router that answered."""

    router_id: str
    requests: int
    completed: int
    failed: int
    refused: int
    cancelled: int
    in_flight: int
    picks: int = 0
    failovers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The cluster; `controller_reachable` False means that the router answers from its last table,
    `problems` are what keeps the controller from its work."""

    cluster: str
    base_model: str
    policy: str
    table_version: int
    controller_reachable: bool
    problems: tuple[str, ...]
    replicas: tuple[ReplicaStatus, ...]
    adapters: tuple[AdapterStatus, ...]
    router: RouterStatus
    plan_frozen: bool = False
    skew: Skew = field(default_factory=Skew)


def adapter_terms(
    weight: float | None, slo_ttft_ms: float | None, slo_tbt_ms: float | None
) -> management_pb2.AdapterTerms | None:
    """What is wanted of an adapter as a message, None if nothing is said."""
    if weight is slo_ttft_ms is slo_tbt_ms is None:
        return None
    return management_pb2.AdapterTerms(weight=weight, slo_ttft_ms=slo_ttft_ms, slo_tbt_ms=slo_tbt_ms)


def adapter_status(message: management_pb2.Adapter) -> AdapterStatus:
    """The adapter in a message."""
    return AdapterStatus(
        name=message.name,
        version=message.version,
        rank=message.rank,
        size_bytes=message.size_bytes,
        sha256=message.sha256,
        source=message.source,
        target_modules=tuple(message.target_modules),
        holders=tuple(
            HolderStatus(replica_id=one.replica_id, share=one.share, spill=one.spill)
            for one in message.holders
        ),
        demand_tokens_per_s=message.demand_tokens_per_s,
        forecast_tokens_per_s=message.forecast_tokens_per_s,
        recent_requests=message.recent_requests,
        recent_in_slo=message.recent_in_slo,
        recent_cold_misses=message.recent_cold_misses,
        requests=message.requests,
        in_slo=message.in_slo,
        cold_misses=message.cold_misses,
        # An earlier release, or a router without its controller, does not say.
        weight=message.weight or 1.0,
        slo_ttft_ms=message.slo_ttft_ms,
        slo_tbt_ms=message.slo_tbt_ms,
        has_own_slo=message.has_own_slo,
    )


def replica_status(message: management_pb2.Replica) -> ReplicaStatus:
    """The replica in a message."""
    return ReplicaStatus(
        replica_id=message.replica_id,
        state=message.state,
        address=message.address,
        max_lora_rank=message.max_lora_rank,
        adapter_slots=message.adapter_slots,
        pool_adapters=message.pool_adapters,
        resident=tuple(message.resident),
        resident_bytes=message.resident_bytes,
        running=message.running,
        waiting=message.waiting,
        kv_cache_usage=message.kv_cache_usage,
        engine=message.engine,
        pid=message.pid,
        restarts=message.restarts,
        reason=message.reason,
        node_id=message.node_id,
        active_adapters=message.active_adapters,
        slot_allocated_bytes=message.slot_allocated_bytes,
        slot_used_bytes=message.slot_used_bytes,
        slot_padded_bytes=message.slot_padded_bytes,
        highest_resident_rank=message.highest_resident_rank,
        demand_tokens_per_s=message.demand_tokens_per_s,
        operating_point_tokens_per_s=message.operating_point_tokens_per_s,
        utilisation=message.utilisation,
        pool_bytes=message.pool_bytes,
        profile=message.profile,
        fabric=_fabric_status(message.fabric),
    )


def _fabric_status(message: management_pb2.Fabric) -> FabricStatus:
    return FabricStatus(
        sources=tuple(
            FabricSource(source=one.source, loads=one.loads, bytes=one.bytes, seconds=one.seconds)
            for one in message.sources
        ),
        failures=dict(message.failures),
        cached_bytes=message.cached_bytes,
        open_breakers=tuple(message.open_breakers),
    )


def drain_statuses(message: management_pb2.DrainProgress) -> tuple[DrainStatus, ...]:
    """How far each replica in a message is."""
    return tuple(
        DrainStatus(
            replica_id=one.replica_id,
            state=one.state,
            waiting_for=tuple(one.waiting_for),
            running=one.running,
            moved=one.moved,
            reason=one.reason,
        )
        for one in message.replicas
    )


def plan_status(message: management_pb2.GetPlanResponse) -> PlanStatus:
    """The plans in a message."""
    return PlanStatus(
        current=decode_plan(message.current),
        frozen=message.frozen,
        problem=message.problem,
        earlier=tuple(one.ended_by for one in message.earlier),
        proposed=decode_plan(message.proposed) if message.HasField("proposed") else None,
        diff=decode_diff(message.diff) if message.HasField("diff") else None,
        refusal=message.refusal,
    )


def plan_change(message: management_pb2.PlanChanged) -> PlanChange:
    """What was changed, from a message."""
    return PlanChange(diff=decode_diff(message.diff), frozen=message.frozen)


def cluster_status(message: management_pb2.GetStatusResponse) -> ClusterStatus:
    """The cluster in a message."""
    router = message.router
    return ClusterStatus(
        cluster=message.cluster,
        base_model=message.base_model,
        policy=message.policy,
        table_version=message.table_version,
        controller_reachable=message.controller_reachable,
        problems=tuple(message.problems),
        replicas=tuple(replica_status(one) for one in message.replicas),
        adapters=tuple(adapter_status(one) for one in message.adapters),
        plan_frozen=message.plan_frozen,
        skew=decode_skew(message.skew),
        router=RouterStatus(
            router_id=router.router_id,
            requests=router.requests,
            completed=router.completed,
            failed=router.failed,
            refused=router.refused,
            cancelled=router.cancelled,
            in_flight=router.in_flight,
            picks=router.picks,
            failovers=router.failovers,
        ),
    )
