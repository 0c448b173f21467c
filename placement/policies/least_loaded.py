"""`least-loaded`: every adapter on every replica that has room, requests to the least loaded holder.

The baseline that needs no forecast. Where memory runs short every adapter gets one copy first, the
ones with the fewest possible homes before the others, and then further copies by demand.
"""

from dataclasses import dataclass

from placement.policies.base import equal_shares
from placement.policies.first_copies import first_copies, present_copies
from placement.types import Placement, Snapshot


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Copies wherever they fit; stable: a replica that holds an adapter keeps it."""

    name: str = "least-loaded"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter where it fits, then copies for as long as there is room."""
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
