"""`dlora`: copies for the most under-represented adapter, for as long as the worst off does not lose by it.

dLoRA's (OSDI'24) initial placement by its artifact: every adapter once, then copies by expected load onto
the replica with the most places left, while the lowest bound over all adapters, the memory that is free
where it is over its part of the load, does not fall; at least replicas + adapters - 1 copies in all. Memory
is the replica's pool here, as KV caches do not shrink by adapters; and those of the least number go to the
most under-represented before the bound is looked at, where the artifact draws them by lot. Copies stay: what
it does while it runs is its dispatch and its migration.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from placement.policies.base import Room, equal_shares
from placement.policies.first_copies import Present, first_copies, present_copies
from placement.policies.room_arrays import RoomArrays
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot

_LEAST = 1e-7
"""What an adapter without load is expected to have, in tokens per second."""


@dataclass(frozen=True, slots=True)
class DLora:
    """Greedy replication; stable: copies that there are stay."""

    name: str = "dlora"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each, then those that there are, then new ones as far as the bound allows."""
        present = present_copies(snapshot)
        rooms = first_copies(snapshot, present).rooms
        adapters = sorted(snapshot.adapters, key=lambda adapter: adapter.version_id)
        _keep(adapters, present, rooms)
        growth = _Growth(snapshot, adapters, list(rooms.values()))
        while growth.num_copies < len(rooms) + len(adapters) - 1 and growth.step(bounded=False):
            pass
        while growth.step(bounded=True):
            pass
        return equal_shares(rooms.values(), snapshot.adapters)


def _keep(adapters: list[AdapterVersion], present: Present, rooms: Mapping[ReplicaId, Room]) -> None:
    for adapter in adapters:
        for replica in sorted(present[adapter.version_id]):
            if rooms[replica].fits(adapter):
                rooms[replica].put(adapter)


class _Growth:
    """Further copies, one at a time; places are indices into the adapters and the rooms.

    An adapter's bound is the memory that is free in its rooms over its part of the load.
    """

    def __init__(self, snapshot: Snapshot, adapters: list[AdapterVersion], rooms: list[Room]) -> None:
        self._adapters = adapters
        self._arrays = RoomArrays(rooms)
        demand = snapshot.demand_tokens_per_s
        loads = np.array([demand.get(adapter.version_id, 0.0) + _LEAST for adapter in adapters])
        self._expected = loads / max(loads.sum(), _LEAST)
        places = {adapter.version_id: index for index, adapter in enumerate(adapters)}
        self._held = [np.array(sorted(places[version] for version in room.held), dtype=int) for room in rooms]
        self._memory = np.zeros(len(adapters))
        counts = np.zeros(len(adapters), dtype=int)
        for held, room in zip(self._held, rooms, strict=True):
            counts[held] += 1
            self._memory[held] += room.free_bytes
        self.num_copies = int(counts.sum())
        self._bounds = self._memory / self._expected
        # What is placed nowhere fits nowhere; it would hold the lowest bound at zero.
        self._bounds[counts == 0] = np.inf
        self._lowest = float(self._bounds.min(initial=np.inf))
        self._waiting: dict[int, list[tuple[float, int]]] = {}
        """Those that may get more, by the copies they have, the most expected first."""
        for index in np.flatnonzero(counts).tolist():
            self._wait(int(counts[index]), index)

    def step(self, *, bounded: bool) -> bool:
        """One copy more of the most under-represented adapter that has room; False if there is none, or if
        the lowest bound would fall wherever it went."""
        while self._waiting:
            _, _, count = max(
                (-top[0][0] * self.num_copies - c, -top[0][1], c) for c, top in self._waiting.items()
            )
            index = self._waiting[count][0][1]
            has_room = False
            for room in self._free(index):
                has_room = True
                if self._try(index, room, bounded=bounded):
                    self._take(count)
                    self._wait(count + 1, index)
                    return True
            if has_room:
                return False
            self._take(count)
        return False

    def _wait(self, count: int, index: int) -> None:
        heappush(self._waiting.setdefault(count, []), (-float(self._expected[index]), index))

    def _take(self, count: int) -> None:
        heappop(self._waiting[count])
        if not self._waiting[count]:
            del self._waiting[count]

    def _free(self, index: int) -> Iterator[int]:
        """The rooms that could take one more copy, those with the most places left first."""
        arrays = self._arrays
        adapter = self._adapters[index]
        fitting = np.flatnonzero(arrays.fitting(adapter))
        order = np.lexsort((fitting, -arrays.free_bytes[fitting], -arrays.free_adapters[fitting]))
        for room in fitting[order].tolist():
            if adapter.version_id not in arrays.rooms[room].held:
                yield room

    def _try(self, index: int, room: int, *, bounded: bool) -> bool:
        adapter, held = self._adapters[index], self._held[room]
        memory = self._memory[held] - adapter.size_bytes
        bounds = memory / self._expected[held]
        own_memory = self._memory[index] + self._arrays.rooms[room].free_bytes - adapter.size_bytes
        own = float(own_memory / self._expected[index])
        # The bounds of all others stay, and none of them is below the lowest.
        lowest = min(float(bounds.min(initial=np.inf)), own)
        if bounded and lowest < self._lowest:
            return False
        was_lowest = self._bounds[index] <= self._lowest
        self._memory[held], self._bounds[held] = memory, bounds
        self._memory[index], self._bounds[index] = own_memory, own
        self._arrays.put(room, adapter)
        self._held[room] = np.append(held, index)
        self.num_copies += 1
        self._lowest = float(self._bounds.min()) if was_lowest else min(self._lowest, lowest)
        return True
