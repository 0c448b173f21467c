"""`dlora`: copies for the most under-represented adapter, for as long as the worst off does not lose by it.

dLoRA's (OSDI'24) initial placement by its artifact: every adapter once, then copies by expected load onto
the replica with the most places left, while the lowest bound over all adapters, the memory that is free
where it is over its part of the load, does not fall; at least replicas + adapters - 1 copies in all. Memory
is the replica's pool here, as KV caches do not shrink by adapters; and those of the least number go to the
most under-represented before the bound is looked at, where the artifact draws them by lot. Copies stay: what
it does while it runs is its dispatch and its migration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """Further copies, one at a time; places are indices into the adapters and the rooms."""

    def __init__(self, snapshot: Snapshot, adapters: list[AdapterVersion], rooms: list[Room]) -> None:
        self._adapters = adapters
        self._arrays = RoomArrays(rooms)
        demand = snapshot.demand_tokens_per_s
        loads = np.array([demand.get(adapter.version_id, 0.0) + _LEAST for adapter in adapters])
        self._expected = loads / loads.sum() if len(loads) else loads
        places = {adapter.version_id: index for index, adapter in enumerate(adapters)}
        self._held = [sorted(places[version] for version in room.held) for room in rooms]
        self._counts = np.zeros(len(adapters))
        self._memory = np.zeros(len(adapters))
        """The free bytes of all rooms that each adapter is in."""
        for held, room in zip(self._held, rooms, strict=True):
            self._counts[held] += 1
            self._memory[held] += room.free_bytes
        self.num_copies = int(self._counts.sum())
        # What is placed nowhere fits nowhere, and would hold the bound at zero.
        self._placed = self._counts > 0
        self._counts[~self._placed] = np.inf
        self._bound = self._lowest()

    def step(self, *, bounded: bool) -> bool:
        """One copy more of the most under-represented adapter that has room; False if there is none, or if
        the bound would fall wherever it went."""
        while len(self._adapters):
            index = int(np.argmax(self._expected * self.num_copies - self._counts))
            if self._counts[index] == np.inf:
                return False
            free = self._free(index)
            if len(free):
                return any(self._try(index, int(room), bounded=bounded) for room in free)
            self._counts[index] = np.inf
        return False

    def _free(self, index: int) -> list[int]:
        """The rooms that could take one more copy, those with the most places left first."""
        arrays = self._arrays
        adapter = self._adapters[index]
        fitting = np.flatnonzero(arrays.fitting(adapter)).tolist()
        free = [room for room in fitting if adapter.version_id not in arrays.rooms[room].held]
        free.sort(key=lambda room: (-arrays.rooms[room].free_adapters, -arrays.rooms[room].free_bytes, room))
        return free

    def _try(self, index: int, room: int, *, bounded: bool) -> bool:
        adapter, held = self._adapters[index], self._held[room]
        left = self._arrays.rooms[room].free_bytes - adapter.size_bytes
        after = self._memory[held] - adapter.size_bytes
        # The others' bounds stay, and none of them is below the lowest.
        lowest = min((after / self._expected[held]).min(initial=np.inf), self._bound_with(index, left))
        if bounded and lowest < self._bound:
            return False
        self._memory[held] = after
        self._memory[index] += left
        self._arrays.put(room, adapter)
        held.append(index)
        self._counts[index] += 1
        self.num_copies += 1
        self._bound = self._lowest()
        return True

    def _bound_with(self, index: int, left: int) -> float:
        return float((self._memory[index] + left) / self._expected[index])

    def _lowest(self) -> float:
        bounds = self._memory[self._placed] / self._expected[self._placed]
        return float(bounds.min(initial=np.inf))
