"""A plan kept as it is, but for what has gone: the plan that follows where no policy may decide.

Used while the plan is frozen, and where a policy's plan was refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

from placement.policies.base import Room
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, Snapshot, VersionId

_NOBODY: frozenset[ReplicaId] = frozenset()


def repaired(
    snapshot: Snapshot,
    wanted: Placement,
    held: Mapping[VersionId, Collection[ReplicaId]] = MappingProxyType({}),
) -> Placement:
    """`wanted` on the snapshot's replicas: each adapter keeps its holders there are, with their shares.

    An adapter that has none left, or is new, gets one: where the snapshot's plan has it, else where it is
    `held`, else where most bytes are free; one that fits nowhere is left out. A new version of a name takes
    the places of the version that `wanted` has. A valid plan comes back equal.
    """
    rooms = Room.of(snapshot.replicas)
    named = _by_name(wanted)
    kept: dict[VersionId, tuple[Holder, ...]] = {}
    homeless: list[AdapterVersion] = []
    for adapter in sorted(snapshot.adapters, key=lambda one: one.version_id):
        holders = wanted.holders.get(adapter.version_id) or named.get(adapter.name, ())
        remaining = tuple(holder for holder in holders if _take(rooms, holder.replica_id, adapter))
        if remaining:
            kept[adapter.version_id] = _with_shares(remaining, is_whole=len(remaining) == len(holders))
        else:
            homeless.append(adapter)
    # The highest ranks first: they find the fewest places.
    for adapter in sorted(homeless, key=lambda one: (-one.rank, -one.size_bytes, one.version_id)):
        version = adapter.version_id
        home = _home(rooms, adapter, snapshot.current.replicas_of(version), held.get(version, _NOBODY))
        if home is not None:
            rooms[home].put(adapter)
            kept[version] = (Holder(replica_id=home, share=1.0),)
    ranks = {replica: rank for replica, rank in wanted.max_lora_ranks.items() if replica in rooms}
    return Placement(MappingProxyType(dict(sorted(kept.items()))), MappingProxyType(ranks))


def _by_name(plan: Placement) -> dict[AdapterName, tuple[Holder, ...]]:
    return {
        AdapterName(version.rpartition("@")[0]): holders for version, holders in sorted(plan.holders.items())
    }


def _take(rooms: Mapping[ReplicaId, Room], replica: ReplicaId, adapter: AdapterVersion) -> bool:
    room = rooms.get(replica)
    if room is None or not room.fits(adapter):
        return False
    room.put(adapter)
    return True


def _with_shares(holders: tuple[Holder, ...], *, is_whole: bool) -> tuple[Holder, ...]:
    """The shares of those that remain, summing to one again; equal ones if only spares remain."""
    if is_whole:
        return holders
    total = sum(holder.share for holder in holders)
    if total <= 0:
        return tuple(replace(holder, share=1 / len(holders), spill=False) for holder in holders)
    return tuple(replace(holder, share=holder.share / total) for holder in holders)


def _home(
    rooms: Mapping[ReplicaId, Room],
    adapter: AdapterVersion,
    planned: Collection[ReplicaId],
    held: Collection[ReplicaId],
) -> ReplicaId | None:
    def key(replica: ReplicaId) -> tuple[bool, bool, int, int, ReplicaId]:
        room = rooms[replica]
        return replica not in planned, replica not in held, -room.free_bytes, -room.free_adapters, replica

    fitting = [replica for replica, room in rooms.items() if room.fits(adapter)]
    return min(fitting, key=key, default=None)
