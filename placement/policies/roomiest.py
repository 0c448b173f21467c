"""Finding the replica with the most room for one more copy, among a thousand of them.

Rooms only fill while a plan is made, so each kind of replica has a heap whose entries may promise too much
and are put right when they come up. Replicas that hold a copy already are looked at first, one by one.
"""

from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush, heapreplace

from placement.policies.base import Room
from placement.types import AdapterVersion, ReplicaId, ReplicaSpec

_Key = tuple[int, int, ReplicaId]


class Admission:
    """How many replicas could ever hold an adapter, other adapters aside."""

    def __init__(self, specs: Iterable[ReplicaSpec]) -> None:
        self._kinds: dict[tuple[int, int, bool], tuple[ReplicaSpec, int]] = {}
        for spec in specs:
            kind = (spec.max_lora_rank, spec.pool_bytes, spec.pool_adapters > 0)
            self._kinds[kind] = (spec, self._kinds.get(kind, (spec, 0))[1] + 1)

    def count(self, adapter: AdapterVersion) -> int:
        """The replicas that admit it."""
        return sum(number for spec, number in self._kinds.values() if spec.admits(adapter))


class Roomiest:
    """Puts copies where there is most room; the rooms are filled through `put` alone."""

    def __init__(self, specs: Iterable[ReplicaSpec]) -> None:
        self.rooms = Room.of(specs)
        self._heaps: dict[int, list[_Key]] = {}
        for room in self.rooms.values():
            self._heaps.setdefault(room.spec.max_lora_rank, []).append(_key(room))
        for heap in self._heaps.values():
            heapify(heap)
        self.num_held = 0

    def put(self, adapter: AdapterVersion, present: Collection[ReplicaId]) -> bool:
        """One copy more: on a replica of `present`, else on any, the one with the most adapters, bytes and
        the first id of those that take it; False if none does."""
        rooms = self.rooms
        fitting = [_key(rooms[one]) for one in present if one in rooms and rooms[one].fits(adapter)]
        best = min(fitting) if fitting else self._first(adapter)
        if best is None:
            return False
        rooms[best[2]].put(adapter)
        self.num_held += 1
        return True

    def _first(self, adapter: AdapterVersion) -> _Key | None:
        firsts = (
            self._first_of(heap, adapter)
            for max_rank, heap in self._heaps.items()
            if adapter.rank <= max_rank
        )
        return min((first for first in firsts if first is not None), default=None)

    def _first_of(self, heap: list[_Key], adapter: AdapterVersion) -> _Key | None:
        passed: list[_Key] = []
        found = None
        while heap:
            room = self.rooms[heap[0][2]]
            if room.free_adapters == 0:
                heappop(heap)
                continue
            key = _key(room)
            if key != heap[0]:
                heapreplace(heap, key)
            elif room.fits(adapter):
                found = key
                break
            else:
                passed.append(heappop(heap))
        for key in passed:
            heappush(heap, key)
        return found


def _key(room: Room) -> _Key:
    return (-room.free_adapters, -room.free_bytes, room.spec.replica_id)
