"""`least-loaded`: every adapter on every replica that has room, requests to the least loaded holder.

The baseline that needs no forecast. Where memory runs short every adapter gets one copy first, the
ones with the fewest possible homes before the others, and then further copies by demand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from placement.policies.base import Room, equal_shares
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Copies wherever they fit; stable: a replica that holds an adapter keeps it."""

    name: str = "least-loaded"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter where it fits, then copies for as long as there is room."""
        rooms = Room.of(snapshot.replicas)
        homes = {
            adapter.version_id: sum(room.spec.admits(adapter) for room in rooms.values())
            for adapter in snapshot.adapters
        }
        by_need = sorted(
            snapshot.adapters,
            key=lambda adapter: (homes[adapter.version_id], -adapter.size_bytes, adapter.version_id),
        )
        for adapter in by_need:
            room = self._roomiest(adapter, rooms, snapshot)
            if room is not None:
                room.put(adapter)
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

    @staticmethod
    def _roomiest(
        adapter: AdapterVersion, rooms: Mapping[ReplicaId, Room], snapshot: Snapshot
    ) -> Room | None:
        """The replica to put the next copy on: a present holder, else the one with most slots free."""
        present = snapshot.current.replicas_of(adapter.version_id)
        fitting = [room for room in rooms.values() if room.fits(adapter)]
        if not fitting:
            return None
        return min(
            fitting,
            key=lambda room: (
                room.spec.replica_id not in present,
                -room.free_slots,
                -room.free_bytes,
                room.spec.replica_id,
            ),
        )
