"""The routing table that follows from what the replicas hold."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from placement.cluster.records import CopyPhase, Holdings, ReplicaPhase
from placement.routing.replica_cost import CostBook
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, Placement, ReplicaId, VersionId

_Held = Mapping[VersionId, tuple[ReplicaId, ...]]


class TableMaker:
    """Makes one table after the other. Between two of them little changes: what is held is compared with the
    last time, and an entry of which nothing has changed is not made again."""

    def __init__(self, costs: CostBook) -> None:
        self._costs = costs
        self._held_on: dict[ReplicaId, set[VersionId]] = {}
        self._held: dict[VersionId, tuple[ReplicaId, ...]] = {}
        self._made_for: tuple[Placement, frozenset[ReplicaId]] | None = None
        self._made: dict[AdapterName, _Made] = {}

    def make(
        self, holdings: Holdings, before: RoutingTable, full: frozenset[ReplicaId] = frozenset()
    ) -> RoutingTable:
        """The table of what is held now, to follow `before`: names by the newest version that somebody
        holds, and the ready replicas with the draining ones that a name still depends on. What is not planned
        on `full` replicas leaves the table there if another holds it, to make room for what is."""
        self._take_held(holdings)
        ready = frozenset(
            [one.replica_id for one in holdings.replicas.values() if one.phase is ReplicaPhase.READY]
        )
        made_for = self._made_for
        is_usual = _is_usual(holdings)
        if not is_usual or made_for is None or made_for[0] is not holdings.plan or made_for[1] != ready:
            self._made_for, self._made = (holdings.plan, ready), {}
        entries: dict[AdapterName, TableEntry] = {}
        for name, version in sorted(holdings.active.items()):
            held = self._held.get(version, ())
            made = self._made.get(name)
            # Of one plan and the same ready replicas, an entry follows from these alone.
            if (
                made is not None
                and made.version is version
                and made.held is held
                and (made.full is None or made.full == full)
            ):
                entries[name] = made.entry
                continue
            entry = self._entry(holdings, before, name, full, ready)
            if entry is not None:
                entries[name] = entry
                if is_usual and held:
                    is_planned = holdings.plan.replicas_of(version).issuperset(held)
                    self._made[name] = _Made(version, held, None if is_planned else full, entry)
        return RoutingTable(
            version=before.version + 1,
            base_model=before.base_model,
            replicas=MappingProxyType(self._replicas(holdings, entries)),
            entries=MappingProxyType(entries),
        )

    def _take_held(self, holdings: Holdings) -> None:
        """What the replicas that take requests hold, as `Holdings.all_holders` has it."""
        changed: set[VersionId] = set()
        is_held = CopyPhase.HELD
        for replica, record in holdings.replicas.items():
            copies = record.copies if record.is_serving else {}
            now = {version for version, copy in copies.items() if copy.phase is is_held}
            then = self._held_on.get(replica)
            if now != then:
                changed |= now if then is None else now ^ then
                self._held_on[replica] = now
        for version in changed:
            self._held[version] = tuple(
                [replica for replica in holdings.replicas if version in self._held_on[replica]]
            )
            if not self._held[version]:
                del self._held[version]

    def _entry(
        self,
        holdings: Holdings,
        before: RoutingTable,
        name: AdapterName,
        full: Collection[ReplicaId],
        ready: Collection[ReplicaId],
    ) -> TableEntry | None:
        version = holdings.active[name]
        settled = _settled(holdings, self._held.get(version, ()), version, before.entries.get(name), ready)
        return settled or _entry(holdings, self._held, name, full) or _waiting(holdings, name, before)

    def _replicas(
        self, holdings: Holdings, entries: Mapping[AdapterName, TableEntry]
    ) -> dict[ReplicaId, TableReplica]:
        records = [record for record in holdings.replicas.values() if record.spec is not None]
        needed: set[ReplicaId] = set()
        if any(record.phase is not ReplicaPhase.READY for record in records):
            needed.update(holder.replica_id for entry in entries.values() for holder in entry.holders)
        return {
            record.replica_id: TableReplica(
                replica_id=record.replica_id,
                address=record.address,
                max_lora_rank=record.spec.max_lora_rank,
                draining=record.phase is ReplicaPhase.DRAINING,
                cost=self._costs.of(record.spec),
            )
            for record in records
            if record.spec is not None and (record.phase is ReplicaPhase.READY or record.replica_id in needed)
        }


class _Made(NamedTuple):
    """An entry, and what it was made of besides the plan and the ready replicas; `full` None: whatever these
    are, since only planned replicas hold it."""

    version: VersionId
    held: tuple[ReplicaId, ...]
    full: frozenset[ReplicaId] | None
    entry: TableEntry


def _is_usual(holdings: Holdings) -> bool:
    """Whether no replica drains or has refused a copy and no name has an older version, on which entries
    depend besides."""
    for record in holdings.replicas.values():
        if record.phase is ReplicaPhase.DRAINING or record.refused:
            return False
    return not any(holdings.superseded.values())


def _settled(
    holdings: Holdings,
    held: tuple[ReplicaId, ...],
    version: VersionId,
    before: TableEntry | None,
    ready: Collection[ReplicaId],
) -> TableEntry | None:
    """What `_entry` makes of a newest version that exactly the planned holders hold, all of them ready: the
    plan as it is, and the entry before if it said so. Nearly all are so, and looked at after every event."""
    planned = holdings.plan.holders.get(version, ())
    if not held or len(planned) != len(held):
        return None
    last, total = "", 0.0
    for one in planned:
        replica, share = one.replica_id, one.share
        if replica <= last or replica not in held or replica not in ready or (one.spill and share > 0):
            return None
        last = replica
        total += share
    if total != 1.0:
        return None
    if before is not None and before.version_id == version and before.holders == planned:
        return before
    adapter = holdings.adapters[version]
    return TableEntry(name=adapter.name, version_id=version, rank=adapter.rank, holders=planned)


def _entry(
    holdings: Holdings, held: _Held, name: AdapterName, full: Collection[ReplicaId]
) -> TableEntry | None:
    for version in holdings.versions_of(name):
        if version not in held:
            continue
        holders = _holders(holdings, held[version], version, full)
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


def _holders(
    holdings: Holdings, held: tuple[ReplicaId, ...], version: VersionId, full: Collection[ReplicaId]
) -> tuple[Holder, ...]:
    """The planned shares of those that hold it already, and what is meant for those that are yet to load it
    with the holders that the plan does without; equal shares if no planned one with a share holds it. A
    draining replica's only where no other holds it."""
    planned = {
        holder.replica_id: holder
        for holder in holdings.plan.holders.get(version, ())
        if _is_ready(holdings, holder.replica_id)
    }
    shares = {key: one.share for key, one in planned.items() if key in held and one.share > 0}
    if shares:
        # Without a share they stand by.
        shares |= {key: 0.0 for key in planned if key in held and key not in shares}
        shares |= _lent(holdings, held, version, full, planned)
    else:
        able = [one for one in held if _is_ready(holdings, one) or _must_stay(holdings, one, version)]
        released = _released(holdings, able, version, full)
        kept = [replica for replica in able if replica not in released]
        shares = dict.fromkeys([one for one in kept if _is_ready(holdings, one)] or kept, 1.0)
    total = sum(shares.values())
    return tuple(
        Holder(
            replica_id=key,
            share=share / total,
            spill=share == 0 and planned[key].spill,
        )
        for key, share in sorted(shares.items())
    )


def _lent(
    holdings: Holdings,
    held: tuple[ReplicaId, ...],
    version: VersionId,
    full: Collection[ReplicaId],
    planned: Mapping[ReplicaId, Holder],
) -> dict[ReplicaId, float]:
    """The shares of planned holders that may load it yet, for as long with those that the plan does without:
    the others would have to carry it all meanwhile."""
    coming = sum(
        holder.share
        for replica, holder in planned.items()
        if replica not in held and version not in holdings.replicas[replica].refused
    )
    old = [
        replica
        for replica in held
        if replica not in planned and replica not in full and _is_ready(holdings, replica)
    ]
    return dict.fromkeys(old, coming / len(old)) if coming > 0 and old else {}


def _is_ready(holdings: Holdings, replica: ReplicaId) -> bool:
    record = holdings.replicas.get(replica)
    return record is not None and record.phase is ReplicaPhase.READY


def _must_stay(holdings: Holdings, replica: ReplicaId, version: VersionId) -> bool:
    """Whether a draining replica keeps its last copy until another has one: with force, only where one
    may still come."""
    order = holdings.replicas[replica].drain
    return order is None or not order.force or holdings.may_come(version)


def _released(
    holdings: Holdings, held: Sequence[ReplicaId], version: VersionId, full: Collection[ReplicaId]
) -> frozenset[ReplicaId]:
    """The holders that must give up their room for what is planned there, never all of them: an old version
    for the new one, and whatever is not planned on a full replica."""
    newer = holdings.adapters[holdings.active[holdings.adapters[version].name]]
    is_old = newer.version_id != version
    planned = holdings.plan.replicas_of(newer.version_id)
    giving = [
        replica
        for replica in held
        if (
            is_old
            and replica in planned
            and newer.version_id not in holdings.replicas[replica].copies
            and not holdings.replicas[replica].has_room(newer)
        )
        or (not is_old and replica in full and replica not in planned)
    ]
    return frozenset(giving[: len(held) - 1])
