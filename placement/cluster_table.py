"""The routing table that follows from what the replicas hold."""

from collections.abc import Mapping
from types import MappingProxyType

from placement.cluster_records import Holdings, ReplicaPhase
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

_Held = Mapping[VersionId, tuple[ReplicaId, ...]]


def table_of(holdings: Holdings, before: RoutingTable) -> RoutingTable:
    """The table of what is held now, to follow `before`: names by the newest version that somebody
    holds, and the ready replicas with the draining ones that a name still depends on."""
    # Gathered once: to look through all replicas for each name takes seconds with a thousand of them.
    held = holdings.all_holders()
    entries = {
        name: entry
        for name in sorted(holdings.active)
        if (entry := _entry(holdings, held, name) or _waiting(holdings, name, before)) is not None
    }
    needed = {holder.replica_id for entry in entries.values() for holder in entry.holders}
    replicas = {
        record.replica_id: TableReplica(
            replica_id=record.replica_id,
            address=record.address,
            max_lora_rank=record.spec.max_lora_rank,
            draining=record.phase is ReplicaPhase.DRAINING,
        )
        for record in holdings.replicas.values()
        if record.spec is not None and (record.phase is ReplicaPhase.READY or record.replica_id in needed)
    }
    return RoutingTable(
        version=before.version + 1,
        base_model=before.base_model,
        replicas=MappingProxyType(replicas),
        entries=MappingProxyType(entries),
    )


def _entry(holdings: Holdings, held: _Held, name: AdapterName) -> TableEntry | None:
    for version in holdings.versions_of(name):
        if version not in held:
            continue
        holders = _shares(holdings, held[version], version)
        if holders:
            rank = holdings.adapters[version].rank
            return TableEntry(name=name, version_id=version, rank=rank, holders=holders)
    return None


def _waiting(holdings: Holdings, name: AdapterName, before: RoutingTable) -> TableEntry | None:
    """The entry of a name that has lost its last holder: its requests wait for the next one. A name
    that has had none yet is not in the table."""
    known = before.entries.get(name)
    if known is None:
        return None
    version = known.version_id if known.version_id in holdings.adapters else holdings.active[name]
    return TableEntry(name=name, version_id=version, rank=holdings.adapters[version].rank, holders=())


def _shares(holdings: Holdings, held: tuple[ReplicaId, ...], version: VersionId) -> tuple[Holder, ...]:
    """The planned shares of those that hold it already; equal ones if none of them is planned; a
    draining replica's only where no other holds it."""
    shares = {
        holder.replica_id: holder.share
        for holder in holdings.plan.holders.get(version, ())
        if holder.replica_id in held
        and holder.share > 0
        and holdings.replicas[holder.replica_id].phase is ReplicaPhase.READY
    }
    if not shares:
        released = _released_for_newer(holdings, held, version)
        kept = [replica for replica in held if replica not in released]
        ready = [replica for replica in kept if holdings.replicas[replica].phase is ReplicaPhase.READY]
        shares = dict.fromkeys(ready or [one for one in kept if _must_stay(holdings, one, version)], 1.0)
    total = sum(shares.values())
    return tuple(Holder(replica_id=key, share=share / total) for key, share in sorted(shares.items()))


def _must_stay(holdings: Holdings, replica: ReplicaId, version: VersionId) -> bool:
    """Whether a draining replica keeps its last copy until another has one: with force, only where one
    may still come."""
    order = holdings.replicas[replica].drain
    return order is None or not order.force or holdings.may_come(version)


def _released_for_newer(
    holdings: Holdings, held: tuple[ReplicaId, ...], version: VersionId
) -> frozenset[ReplicaId]:
    """The holders of an old version that must give up its slot for the new one, never all of them."""
    newer = holdings.adapters[holdings.active[holdings.adapters[version].name]]
    if newer.version_id == version:
        return frozenset()
    full = [
        replica
        for replica in held
        if replica in holdings.plan.replicas_of(newer.version_id)
        and newer.version_id not in holdings.replicas[replica].copies
        and not holdings.replicas[replica].has_room(newer)
    ]
    return frozenset(full[: len(held) - 1])
