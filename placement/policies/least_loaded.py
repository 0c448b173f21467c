"""`least-loaded`: every adapter on every replica that has room, requests to the least loaded holder.

The baseline that needs no forecast. Where memory runs short every adapter gets one copy first, the
ones with the fewest possible homes before the others, and then further copies by demand.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from placement.policies.base import equal_shares
from placement.policies.roomiest import Admission, Roomiest
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot, VersionId

_Present = Mapping[VersionId, Collection[ReplicaId]]


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Copies wherever they fit; stable: a replica that holds an adapter keeps it."""

    name: str = "least-loaded"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter where it fits, then copies for as long as there is room."""
        here = {spec.replica_id for spec in snapshot.replicas}
        present: _Present = {
            adapter.version_id: snapshot.current.replicas_of(adapter.version_id) & here
            for adapter in snapshot.adapters
        }
        copies = self._first_copies(snapshot, present)
        demand = snapshot.demand_tokens_per_s
        growing = sorted(
            snapshot.adapters, key=lambda adapter: (-demand.get(adapter.version_id, 0.0), adapter.version_id)
        )
        while growing:
            # Rooms only fill: what finds none now finds none later.
            growing = [adapter for adapter in growing if copies.put(adapter, present[adapter.version_id])]
        return equal_shares(copies.rooms.values(), snapshot.adapters)

    def _first_copies(self, snapshot: Snapshot, present: _Present) -> Roomiest:
        """One copy of each: those that are placed keep their room, unless more fit when all are packed
        anew, the hardest to place first."""
        admission = Admission(snapshot.replicas)
        by_need = sorted(
            snapshot.adapters,
            key=lambda adapter: (admission.count(adapter), -adapter.size_bytes, adapter.version_id),
        )
        placed_first = sorted(by_need, key=lambda adapter: not present[adapter.version_id])
        kept, packed = (self._place(order, snapshot, present) for order in (placed_first, by_need))
        return packed if packed.num_held > kept.num_held else kept

    @staticmethod
    def _place(order: Iterable[AdapterVersion], snapshot: Snapshot, present: _Present) -> Roomiest:
        copies = Roomiest(snapshot.replicas)
        for adapter in order:
            copies.put(adapter, present[adapter.version_id])
        return copies
