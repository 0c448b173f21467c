"""From the plan to the replicas: which copies to load and to drop now, and a way out where nothing moves.

New copies come before old ones go, and the last copy of a version that the table names never goes. So an
exchange between full replicas needs a third place: a copy waits there until its new home has room. Without
one the copies stay where they are.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from placement.cluster.messages import Command, LoadAdapter, UnloadAdapter
from placement.cluster.records import Copy, CopyPhase, Holdings, ReplicaPhase, ReplicaRecord
from placement.table import RoutingTable
from placement.types import AdapterVersion, Holder, Placement, ReplicaId, VersionId

MAX_LOADS = 8
"""Copies that one replica loads at a time, so that the requests it serves do not wait for all of them."""


Waiting = Mapping[ReplicaId, frozenset[VersionId]]
"""By ready replica the planned copies that are neither there nor on their way, and have not been refused."""


def waiting_copies(holdings: Holdings) -> Waiting:
    """All copies that are yet to be loaded."""
    active = set(holdings.active.values())
    found: dict[ReplicaId, frozenset[VersionId]] = {}
    for record in _ready(holdings):
        # What is there already is nearly everything, and passed over first.
        absent = _planned_on(holdings, record) - record.copies.keys()
        if absent and (absent := (absent & active) - record.refused.keys()):
            found[record.replica_id] = absent
    return found


def _planned_on(holdings: Holdings, record: ReplicaRecord) -> frozenset[VersionId]:
    return holdings.planned_on.get(record.replica_id, frozenset())


def _may_load(record: ReplicaRecord | None, version: VersionId) -> bool:
    if record is None or not _is_ready(record):
        return False
    return version not in record.copies and version not in record.refused


def crowded(holdings: Holdings, waiting: Waiting) -> frozenset[ReplicaId]:
    """The ready replicas without room for a copy planned there, even once all that is being dropped has
    gone: what is not planned there must make room."""
    found: set[ReplicaId] = set()
    retiring = CopyPhase.RETIRING
    for replica, versions in waiting.items():
        record = holdings.replicas[replica]
        if record.spec is None:
            continue
        staying = [copy.size_bytes for copy in record.copies.values() if copy.phase is not retiring]
        largest = max([holdings.adapters[version].size_bytes for version in versions])
        if len(staying) >= record.spec.pool_adapters or sum(staying) + largest > record.spec.pool_bytes:
            found.add(replica)
    return frozenset(found)


def retire(holdings: Holdings, table: RoutingTable) -> list[Command]:
    """Drop the held copies that the published table sends nobody to."""
    commands: list[Command] = []
    active = set(holdings.active.values())
    inactive = holdings.plan.holders.keys() - active
    for record in _ready(holdings):
        # Most copies are as planned; the few others are looked up in the table.
        for version in sorted(record.copies.keys() - (_planned_on(holdings, record) - inactive)):
            if record.holds(version) and not _is_named(table, holdings.adapters, version, record.replica_id):
                record.copies[version].phase = CopyPhase.RETIRING
                commands.append(UnloadAdapter(record.replica_id, version))
    return commands


def _is_named(
    table: RoutingTable,
    adapters: Mapping[VersionId, AdapterVersion],
    version: VersionId,
    replica: ReplicaId,
) -> bool:
    """Whether the table sends requests for the version to the replica."""
    adapter = adapters.get(version)
    entry = None if adapter is None else table.entries.get(adapter.name)
    if entry is None or entry.version_id != version:
        return False
    return any(holder.replica_id == replica for holder in entry.holders)


def load(holdings: Holdings, waiting: Waiting, max_loads: int = MAX_LOADS) -> list[Command]:
    """Load what is planned and absent, where there is room now and few enough loads are under way; the rest
    waits. What no ready replica holds comes first. What none loads either, and none planned for it has room
    for, goes to any that has."""
    if not waiting:
        return []
    commands: list[Command] = []
    roomy: set[VersionId] = set()
    held, under_way, loading = _progress(holdings)
    present = held | under_way
    # Most wait for their turn: whether there is room for them then is not looked up now.
    turns = [
        (version in held, version, replica)
        for replica, versions in waiting.items()
        for version in (versions if loading[replica] < max_loads else versions - present)
    ]
    for _, version, replica in sorted(turns):
        if loading[replica] >= max_loads and version in present:
            continue
        record, adapter = holdings.replicas[replica], holdings.adapters[version]
        if record.has_room(adapter):
            roomy.add(version)
            if loading[replica] < max_loads:
                loading[replica] += 1
                under_way.add(version)
                commands.append(_begin(record, adapter))
    for adapter in _homeless(holdings, waiting, held | under_way):
        place = None if adapter.version_id in roomy else _free_place(holdings, adapter)
        if place is not None and _num_loading(place) < max_loads:
            commands.append(_begin(place, adapter))
    return commands


def _num_loading(record: ReplicaRecord) -> int:
    return sum(copy.phase is CopyPhase.LOADING for copy in record.copies.values())


def _progress(holdings: Holdings) -> tuple[set[VersionId], set[VersionId], dict[ReplicaId, int]]:
    """What ready replicas hold, what they load, and how many copies each of them loads."""
    held: set[VersionId] = set()
    under_way: set[VersionId] = set()
    loading: dict[ReplicaId, int] = {}
    for record in _ready(holdings):
        copies, is_held, is_loading = record.copies, CopyPhase.HELD, CopyPhase.LOADING
        held.update([version for version, copy in copies.items() if copy.phase is is_held])
        begun = [version for version, copy in copies.items() if copy.phase is is_loading]
        under_way.update(begun)
        loading[record.replica_id] = len(begun)
    return held, under_way, loading


def _homeless(holdings: Holdings, waiting: Waiting, present: set[VersionId]) -> list[AdapterVersion]:
    """What waits and is not present: no ready replica holds or loads it."""
    return [holdings.adapters[version] for version in sorted(set().union(*waiting.values()) - present)]


def is_stuck(holdings: Holdings, waiting: Waiting) -> bool:
    """Whether planned copies wait for room, and no copy anywhere is being loaded or dropped."""
    unsettled = {CopyPhase.LOADING, CopyPhase.RETIRING}
    return any(
        _may_load(holdings.replicas.get(replica), version)
        for replica, versions in waiting.items()
        for version in versions
    ) and not any(copy.phase in unsettled for record in _ready(holdings) for copy in record.copies.values())


def make_way(holdings: Holdings, full: frozenset[ReplicaId]) -> list[Command]:
    """Load one copy that is in the way on a `full` replica to one that has room and that nothing waits for,
    so that it can be dropped where it is; empty if there is no such replica."""
    active = set(holdings.active.values())
    for replica in sorted(full):
        record = holdings.replicas[replica]
        for version in sorted(record.copies):
            planned = holdings.plan.replicas_of(version)
            if version not in active or replica in planned or not record.holds(version):
                continue
            place = _free_place(holdings, holdings.adapters[version], full)
            if place is not None:
                return [_begin(place, holdings.adapters[version])]
    return []


def possible(holdings: Holdings, waiting: Waiting) -> Placement:
    """The plan without the copies that wait for room for ever: an adapter that has none of its planned
    holders stays where it is held; one that no ready replica holds takes the place of a copy that is not the
    only one, or is left out."""
    absent: dict[VersionId, set[ReplicaId]] = {}
    for replica, versions in waiting.items():
        for version in versions:
            absent.setdefault(version, set()).add(replica)
    held = holdings.all_holders()
    changed = dict(holdings.plan.holders)
    for version, replicas in sorted(absent.items()):
        there = [holder for holder in holdings.plan.holders[version] if holder.replica_id not in replicas]
        ready = [one for one in held.get(version, ()) if _is_ready(holdings.replicas[one])]
        if sum(holder.share for holder in there) > 0:
            changed[version] = _normalised(there)
        elif ready:
            changed[version] = tuple(Holder(replica_id=one, share=1 / len(ready)) for one in sorted(ready))
    taken: set[ReplicaId] = set()
    ready_held, under_way, _ = _progress(holdings)
    for adapter in _homeless(holdings, waiting, ready_held | under_way):
        copy = _spare_copy(holdings, adapter, changed, taken)
        if copy is not None:
            replica, version = copy
            taken.add(replica)
            changed[version] = _normalised([one for one in changed[version] if one.replica_id != replica])
            changed[adapter.version_id] = (Holder(replica_id=replica, share=1.0),)
        else:
            # A draining replica would wait for it in vain.
            del changed[adapter.version_id]
    return replace(holdings.plan, holders=MappingProxyType(changed))


def _spare_copy(
    holdings: Holdings,
    adapter: AdapterVersion,
    planned: Mapping[VersionId, tuple[Holder, ...]],
    taken: Collection[ReplicaId],
) -> tuple[ReplicaId, VersionId] | None:
    """A copy that makes room for the adapter if it goes, of the version with the most holders left."""
    found: list[tuple[int, ReplicaId, VersionId]] = []
    for version, holders in planned.items():
        others = [
            one
            for one in holders
            if (known := holdings.replicas.get(one.replica_id)) is not None and known.holds(version)
        ]
        for holder in others if len(others) > 1 else ():
            record = holdings.replicas[holder.replica_id]
            if record.replica_id in taken or not _is_ready(record) or record.spec is None:
                continue
            used_bytes = sum(copy.size_bytes for copy in record.copies.values())
            freed_bytes = record.copies[version].size_bytes
            fits = used_bytes - freed_bytes + adapter.size_bytes <= record.spec.pool_bytes
            if fits and record.spec.admits(adapter) and adapter.version_id not in record.refused:
                found.append((-len(others), record.replica_id, version))
    return min(found)[1:] if found else None


def _normalised(holders: Collection[Holder]) -> tuple[Holder, ...]:
    total = sum(holder.share for holder in holders)
    if total <= 0:
        return tuple(replace(holder, share=1 / len(holders), spill=False) for holder in holders)
    return tuple(replace(holder, share=holder.share / total) for holder in holders)


def _free_place(
    holdings: Holdings, adapter: AdapterVersion, full: Collection[ReplicaId] = frozenset()
) -> ReplicaRecord | None:
    """The replica with the fewest copies that has room for one more, but for those that others wait for."""
    version = adapter.version_id
    return min(
        (
            record
            for record in _ready(holdings)
            if record.replica_id not in full
            and version not in record.copies
            and version not in record.refused
            and record.has_room(adapter)
        ),
        key=lambda record: (len(record.copies), record.replica_id),
        default=None,
    )


def _begin(record: ReplicaRecord, adapter: AdapterVersion) -> Command:
    record.copies[adapter.version_id] = Copy(CopyPhase.LOADING, adapter.size_bytes)
    return LoadAdapter(record.replica_id, adapter)


def _ready(holdings: Holdings) -> Iterator[ReplicaRecord]:
    return (record for record in holdings.replicas.values() if _is_ready(record))


def _is_ready(record: ReplicaRecord) -> bool:
    return record.phase is ReplicaPhase.READY
