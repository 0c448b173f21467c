"""One copy of every adapter that has room anywhere, before any gets a second one."""

from collections.abc import Collection, Iterable, Mapping

from placement.policies.roomiest import Admission, Roomiest
from placement.types import AdapterVersion, ReplicaId, Snapshot, VersionId

Present = Mapping[VersionId, Collection[ReplicaId]]


def present_copies(snapshot: Snapshot) -> Present:
    """Which of the replicas there are hold each adapter by the current placement."""
    here = {spec.replica_id for spec in snapshot.replicas}
    return {
        adapter.version_id: snapshot.current.replicas_of(adapter.version_id) & here
        for adapter in snapshot.adapters
    }


def first_copies(snapshot: Snapshot, present: Present) -> Roomiest:
    """One copy of each where there is most room: those that are placed keep their room, unless more fit when
    all are packed anew, the hardest to place first."""
    admission = Admission(snapshot.replicas)
    by_need = sorted(
        snapshot.adapters,
        key=lambda adapter: (admission.count(adapter), -adapter.size_bytes, adapter.version_id),
    )
    placed_first = sorted(by_need, key=lambda adapter: not present[adapter.version_id])
    kept, packed = (_place(order, snapshot, present) for order in (placed_first, by_need))
    return packed if packed.num_held > kept.num_held else kept


def _place(order: Iterable[AdapterVersion], snapshot: Snapshot, present: Present) -> Roomiest:
    copies = Roomiest(snapshot.replicas)
    for adapter in order:
        copies.put(adapter, present[adapter.version_id])
    return copies
