"""How unevenly a cluster is used, as one number; and the utilisation of each replica that it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.capacity import FLAT_TOKENS_PER_S, kernel_of, tokens_per_s
from placement.latency import RankKernel
from placement.types import AdapterVersion, Holder, Placement, ReplicaId, ReplicaSpec, Snapshot

FORMULA = (
    "skew = load skew x rank skew; load skew = highest / mean utilisation of the replicas; rank skew = mean"
    " over the demanded tokens of (their cost beside the highest rank of their replica / their cost alone)"
)
"""What `skew_of` computes, for people. 1 is none; a utilisation is demand / operating point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUse:
    """What a replica is asked for: tokens/s meant for it, the highest rank among them (0 for none), the share
    of its capacity that they take, and whether its capacity is known from a profile; if not, only ratios
    between replicas mean anything."""

    replica_id: ReplicaId
    demand_tokens_per_s: float
    highest_rank: int
    utilisation: float
    is_measured: bool

    @property
    def operating_point_tokens_per_s(self) -> float | None:
        """What it sustains of this mix of ranks; None if nothing is asked of it or nothing is known."""
        known = self.is_measured and self.utilisation > 0
        return self.demand_tokens_per_s / self.utilisation if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """See `FORMULA`; both parts are at least 1."""

    load: float = 1.0
    rank: float = 1.0

    @property
    def total(self) -> float:
        """The one number."""
        return self.load * self.rank


def uses_of(snapshot: Snapshot, plan: Placement) -> dict[ReplicaId, ReplicaUse]:
    """What the snapshot's demand asks of each of its replicas if it goes by the plan's shares."""
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    parts: dict[ReplicaId, list[tuple[AdapterVersion, float]]] = {}
    for version, holders in plan.holders.items():
        demand = snapshot.demand_tokens_per_s.get(version, 0.0)
        if version not in adapters or demand <= 0:
            continue
        for holder in holders:
            if holder.share > 0:
                part = (adapters[version], demand * holder.share)
                parts.setdefault(holder.replica_id, []).append(part)
    return {
        spec.replica_id: _use_of(snapshot, _as_planned(spec, plan), parts.get(spec.replica_id, []))
        for spec in snapshot.replicas
    }


def highest_utilisation(uses: Mapping[ReplicaId, ReplicaUse]) -> float:
    """Of the replicas; 0 if there are none."""
    return max((use.utilisation for use in uses.values()), default=0.0)


def skew_of(snapshot: Snapshot, plan: Placement) -> Skew:
    """The skew of the plan under the snapshot's demand; 1 without any."""
    uses = uses_of(snapshot, plan)
    total = sum(use.utilisation for use in uses.values())
    if total <= 0:
        return Skew()
    specs = {spec.replica_id: _as_planned(spec, plan) for spec in snapshot.replicas}
    weighted = demanded = 0.0
    for adapter in snapshot.adapters:
        demand = snapshot.demand_tokens_per_s.get(adapter.version_id, 0.0)
        for holder in _known(plan.holders.get(adapter.version_id, ()), specs):
            spec, tokens = specs[holder.replica_id], demand * holder.share
            highest = uses[holder.replica_id].highest_rank
            weighted += tokens * _padding(snapshot, spec, adapter.rank, highest) if tokens > 0 else 0.0
            demanded += max(0.0, tokens)
    return Skew(load=highest_utilisation(uses) * len(uses) / total, rank=weighted / demanded)


def _known(holders: tuple[Holder, ...], specs: Mapping[ReplicaId, ReplicaSpec]) -> list[Holder]:
    return [holder for holder in holders if holder.replica_id in specs]


def _as_planned(spec: ReplicaSpec, plan: Placement) -> ReplicaSpec:
    rank = plan.max_lora_ranks.get(spec.replica_id, spec.max_lora_rank)
    return spec if rank == spec.max_lora_rank else replace(spec, max_lora_rank=rank)


def _use_of(snapshot: Snapshot, spec: ReplicaSpec, parts: list[tuple[AdapterVersion, float]]) -> ReplicaUse:
    highest = max((adapter.rank for adapter, _ in parts), default=0)
    taken = [
        tokens / tokens_per_s(snapshot.profiles, spec, adapter.rank, highest) for adapter, tokens in parts
    ]
    profile = snapshot.profiles.get(spec.profile)
    return ReplicaUse(
        replica_id=spec.replica_id,
        demand_tokens_per_s=sum(tokens for _, tokens in parts),
        highest_rank=highest,
        utilisation=sum(taken),
        is_measured=profile is not None and bool(profile.operating_points),
    )


def _padding(snapshot: Snapshot, spec: ReplicaSpec, rank: int, highest: int) -> float:
    """How many times the cost of a token at its own rank it costs here."""
    profile = snapshot.profiles.get(spec.profile)
    here = tokens_per_s(snapshot.profiles, spec, rank, highest)
    if kernel_of(profile) is not RankKernel.PADDED_CONFIG:
        own = tokens_per_s(snapshot.profiles, spec, rank, rank)
    else:
        own = profile.operating_point(rank) if profile is not None else FLAT_TOKENS_PER_S
    return max(1.0, own / here)
