"""What no plan may do, whoever made it: checked before a plan is adopted."""

import math

from placement.types import SHARE_TOLERANCE, Holder, Placement, Snapshot


def veto(snapshot: Snapshot, plan: Placement) -> str | None:
    """Why this plan must not follow the snapshot's `current` one, in one line; None if it may.

    It names only adapters and replicas of the snapshot, exceeds no pool and no replica's rank, its shares
    of each adapter sum to one, and it keeps every adapter somewhere that `current` has on these replicas.
    """
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    specs = {spec.replica_id: spec for spec in snapshot.replicas}
    num_held = dict.fromkeys(specs, 0)
    held_bytes = dict.fromkeys(specs, 0)
    takes = {
        key: min(spec.max_lora_rank, plan.max_lora_ranks.get(key, spec.max_lora_rank))
        for key, spec in specs.items()
    }
    # Many adapters may share one tuple of holders.
    flaws: dict[int, str | None] = {}
    for version, holders in plan.holders.items():
        adapter = adapters.get(version)
        if adapter is None:
            return f"it places {version}, which is not registered"
        for holder in holders:
            replica = holder.replica_id
            if replica not in specs:
                return f"it places {version} on {replica}, which is not ready"
            if adapter.rank > takes[replica]:
                return (
                    f"it places {version} of rank {adapter.rank} on {replica}, which takes {takes[replica]}"
                )
            num_held[replica] += 1
            held_bytes[replica] += adapter.size_bytes
        if id(holders) not in flaws:
            flaws[id(holders)] = _bad_holders(holders)
        if (reason := flaws[id(holders)]) is not None:
            return f"{version}: {reason}"
    for replica, spec in specs.items():
        if num_held[replica] > spec.pool_adapters:
            return f"it places {num_held[replica]} adapters on {replica}, which holds {spec.pool_adapters}"
        if held_bytes[replica] > spec.pool_bytes:
            return f"it places {held_bytes[replica]} bytes on {replica}, whose pool has {spec.pool_bytes}"
    return _dropped(plan, snapshot) or _bad_ranks(plan, snapshot)


def _dropped(plan: Placement, snapshot: Snapshot) -> str | None:
    known = {spec.replica_id for spec in snapshot.replicas}
    for adapter in snapshot.adapters:
        version = adapter.version_id
        if version not in plan.holders and not snapshot.current.replicas_of(version).isdisjoint(known):
            return f"it drops the last copy of {version}"
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
