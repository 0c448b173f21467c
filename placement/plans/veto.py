"""What no plan may do, whoever made it: checked before a plan is adopted."""

import math

from placement.types import SHARE_TOLERANCE, AdapterVersion, Holder, Placement, ReplicaSpec, Snapshot


def veto(snapshot: Snapshot, plan: Placement) -> str | None:
    """Why this plan must not follow the snapshot's `current` one, in one line; None if it may.

    It names only adapters and replicas of the snapshot, exceeds no pool and no replica's rank, its shares
    of each adapter sum to one, and it keeps every adapter somewhere that `current` has on these replicas.
    """
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    specs = {spec.replica_id: spec for spec in snapshot.replicas}
    num_held = dict.fromkeys(specs, 0)
    held_bytes = dict.fromkeys(specs, 0)
    for version, holders in plan.holders.items():
        adapter = adapters.get(version)
        if adapter is None:
            return f"it places {version}, which is not registered"
        for holder in holders:
            spec = specs.get(holder.replica_id)
            if spec is None:
                return f"it places {version} on {holder.replica_id}, which is not ready"
            if (reason := _too_high(plan, adapter, spec)) is not None:
                return reason
            num_held[holder.replica_id] += 1
            held_bytes[holder.replica_id] += adapter.size_bytes
        if (reason := _bad_holders(holders)) is not None:
            return f"{version}: {reason}"
    for replica, spec in specs.items():
        if num_held[replica] > spec.pool_adapters:
            return f"it places {num_held[replica]} adapters on {replica}, which holds {spec.pool_adapters}"
        if held_bytes[replica] > spec.pool_bytes:
            return f"it places {held_bytes[replica]} bytes on {replica}, whose pool has {spec.pool_bytes}"
    for adapter in snapshot.adapters:
        version = adapter.version_id
        if version in plan.holders:
            continue
        if not snapshot.current.replicas_of(version).isdisjoint(specs):
            return f"it drops the last copy of {version}"
    return _bad_ranks(plan, snapshot)


def _too_high(plan: Placement, adapter: AdapterVersion, spec: ReplicaSpec) -> str | None:
    replica = spec.replica_id
    takes = min(spec.max_lora_rank, plan.max_lora_ranks.get(replica, spec.max_lora_rank))
    if adapter.rank > takes:
        return f"it places {adapter.version_id} of rank {adapter.rank} on {replica}, which takes {takes}"
    return None


def _bad_holders(holders: tuple[Holder, ...]) -> str | None:
    if not holders:
        return "it is listed and placed nowhere"
    if len({holder.replica_id for holder in holders}) < len(holders):
        return "it is placed twice on one replica"
    if any(not math.isfinite(holder.share) or holder.share < 0 for holder in holders):
        return "a share is negative or no number"
    total = sum(holder.share for holder in holders)
    return f"its shares sum to {total:g}" if abs(total - 1) > SHARE_TOLERANCE else None


def _bad_ranks(plan: Placement, snapshot: Snapshot) -> str | None:
    known = {spec.replica_id for spec in snapshot.replicas}
    for replica, rank in plan.max_lora_ranks.items():
        if replica not in known:
            return f"it sets the max rank of {replica}, which is not ready"
        if rank < 1:
            return f"it sets the max rank of {replica} to {rank}"
    return None
