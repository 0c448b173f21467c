"""`least-loaded`: every adapter on every replica that has room, requests to the least loaded holder.

The baseline that needs no forecast. Where memory runs short every adapter gets one copy first, the
ones with the fewest possible homes before the others, and then further copies by demand.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from placement.policies.base import Room, equal_shares
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Copies wherever they fit; stable: a replica that holds an adapter keeps it."""

    name: str = "least-loaded"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter where it fits, then copies for as long as there is room."""
        rooms = self._first_copies(snapshot)
        demand = snapshot.demand_tokens_per_s
        by_demand = sorted(
            snapshot.adapters, key=lambda adapter: (-demand.get(adapter.version_id, 0.0), adapter.version_id)
        )
        grew = True
        while grew:
            grew = False
            for adapter in by_demand:
                room = self._roomiest(adapter, rooms, snapshot)
                if room is not None:
                    room.put(adapter)
                    grew = True
        return equal_shares(rooms.values(), snapshot.adapters)

    def _first_copies(self, snapshot: Snapshot) -> dict[ReplicaId, Room]:
        """One copy of each: those that are placed keep their room, unless more fit when all are packed
        anew, the hardest to place first."""
        by_need = sorted(
            snapshot.adapters,
            key=lambda adapter: (
                sum(spec.admits(adapter) for spec in snapshot.replicas),
                -adapter.size_bytes,
                adapter.version_id,
            ),
        )
        here = {spec.replica_id for spec in snapshot.replicas}
        placed_first = sorted(
            by_need, key=lambda adapter: here.isdisjoint(snapshot.current.replicas_of(adapter.version_id))
        )
        kept, packed = (self._place(order, snapshot) for order in (placed_first, by_need))
        return packed if _num_held(packed) > _num_held(kept) else kept

    def _place(self, order: Iterable[AdapterVersion], snapshot: Snapshot) -> dict[ReplicaId, Room]:
        rooms = Room.of(snapshot.replicas)
        for adapter in order:
            room = self._roomiest(adapter, rooms, snapshot)
            if room is not None:
                room.put(adapter)
        return rooms

    @staticmethod
    def _roomiest(
        adapter: AdapterVersion, rooms: Mapping[ReplicaId, Room], snapshot: Snapshot
    ) -> Room | None:
        """The replica to put the next copy on: a present holder, else the one with room for most."""
        present = snapshot.current.replicas_of(adapter.version_id)
        fitting = [room for room in rooms.values() if room.fits(adapter)]
        if not fitting:
            return None
        return min(
            fitting,
            key=lambda room: (
                room.spec.replica_id not in present,
                -room.free_adapters,
                -room.free_bytes,
                room.spec.replica_id,
            ),
        )


def _num_held(rooms: Mapping[ReplicaId, Room]) -> int:
    return sum(len(room.held) for room in rooms.values())
