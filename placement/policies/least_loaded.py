"""`least-loaded`: every adapter on every replica that has room, requests to the least loaded holder.

The baseline that needs no forecast. Where memory runs short every adapter gets one copy first, the
ones with the fewest possible homes before the others, and then further copies by demand.
"""

from dataclasses import dataclass

from placement.policies.base import Room, equal_shares
from placement.policies.first_copies import first_copies, present_copies
from placement.types import Placement, Snapshot


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Copies wherever they fit; stable: a replica that holds an adapter keeps it."""

    name: str = "least-loaded"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter where it fits, then copies for as long as there is room."""
        everywhere = _everywhere(snapshot)
        if everywhere is not None:
            return equal_shares(everywhere, snapshot.adapters)
        present = present_copies(snapshot)
        copies = first_copies(snapshot, present)
        demand = snapshot.demand_tokens_per_s
        growing = sorted(
            snapshot.adapters, key=lambda adapter: (-demand.get(adapter.version_id, 0.0), adapter.version_id)
        )
        while growing:
            # Rooms only fill: what finds none now finds none later.
            growing = [adapter for adapter in growing if copies.put(adapter, present[adapter.version_id])]
        return equal_shares(copies.rooms.values(), snapshot.adapters)


def _everywhere(snapshot: Snapshot) -> list[Room] | None:
    """Every adapter on every replica that admits it, None if that is more than fits."""
    rooms = list(Room.of(snapshot.replicas).values())
    for room in rooms:
        admitted = [adapter for adapter in snapshot.adapters if room.spec.admits(adapter)]
        room.held.update([adapter.version_id for adapter in admitted])
        room.free_adapters -= len(admitted)
        room.free_bytes -= sum([adapter.size_bytes for adapter in admitted])
        if room.free_adapters < 0 or room.free_bytes < 0:
            return None
    return rooms
