"""The cluster as a migration problem sees it, and the plan with the copies that a migration asks for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from placement.cluster.records import ReplicaPhase, ReplicaRecord
from placement.migration.problem import MigratingReplica
from placement.policies.base import Room
from placement.table import RoutingTable
from placement.types import AdapterVersion, Holder, Placement, ReplicaId, Snapshot, VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupation:
    """What a replica has at the moment: requests, and the part of its KV cache of so many blocks."""

    running: int
    waiting: int
    kv_usage: float
    kv_blocks: int


def migrating_replicas(
    records: Iterable[ReplicaRecord],
    table: RoutingTable,
    adapters: Iterable[AdapterVersion],
    occupations: Mapping[ReplicaId, Occupation],
) -> tuple[MigratingReplica, ...]:
    """The replicas that are ready and known to be occupied so. They hold what the table sends them, and have
    room for as many adapters more as their pool takes of the largest."""
    largest_bytes = max((adapter.size_bytes for adapter in adapters), default=1)
    holds: dict[ReplicaId, set[VersionId]] = {}
    for entry in table.entries.values():
        for holder in entry.holders:
            holds.setdefault(holder.replica_id, set()).add(entry.version_id)
    found = []
    for record in records:
        occupation = occupations.get(record.replica_id)
        if record.phase is not ReplicaPhase.READY or record.spec is None or occupation is None:
            continue
        used_bytes = sum(copy.size_bytes for copy in record.copies.values())
        free = min(
            record.spec.pool_adapters - len(record.copies),
            (record.spec.pool_bytes - used_bytes) // max(1, largest_bytes),
        )
        found.append(
            MigratingReplica(
                replica_id=record.replica_id,
                kv_blocks=occupation.kv_blocks,
                kv_blocks_used=round(occupation.kv_usage * occupation.kv_blocks),
                running=occupation.running,
                waiting=occupation.waiting,
                holds=frozenset(holds.get(record.replica_id, ())),
                free_adapters=max(0, free),
                max_lora_rank=record.spec.max_lora_rank,
            )
        )
    return tuple(found)


def with_copies(
    plan: Placement, copies: Iterable[tuple[ReplicaId, VersionId]], snapshot: Snapshot
) -> Placement:
    """The plan with these copies besides, each with an equal part of its adapter's requests, as far as there
    is room beside what the plan has."""
    rooms = Room.of(snapshot.replicas)
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    for version, holders in plan.holders.items():
        adapter = adapters.get(version)
        for holder in holders:
            room = rooms.get(holder.replica_id)
            if room is not None and adapter is not None and room.fits(adapter):
                room.put(adapter)
    changed = dict(plan.holders)
    for replica, version in sorted(copies):
        before = changed.get(version, ())
        room, wanted = rooms.get(replica), adapters.get(version)
        if room is None or wanted is None or not before or not room.fits(wanted):
            continue
        room.put(wanted)
        part = 1 / (len(before) + 1)
        kept = tuple(replace(holder, share=holder.share * (1 - part)) for holder in before)
        changed[version] = (*kept, Holder(replica_id=replica, share=part))
    return replace(plan, holders=MappingProxyType(changed))
