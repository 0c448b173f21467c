"""`slora-random`: adapters shuffled once and dealt to the replicas in equal chunks, one copy each.

The static baseline of the LoRAServe paper's artifact (S-LoRA Random, seed 42 there). The shuffle is
a keyed hash per adapter, so that a new adapter does not reshuffle the others.
"""

import hashlib
from bisect import bisect, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from placement.policies.base import Room, equal_shares
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot


@dataclass(frozen=True, slots=True)
class SloraRandom:
    """One copy per adapter on a random replica, evenly many per replica; moves only to stay even."""

    name: str = "slora-random"

    def plan(self, snapshot: Snapshot) -> Placement:
        """Keep what is placed up to an equal chunk, then deal the rest to the emptiest replicas."""
        rooms = Room.of(snapshot.replicas)
        chunk = -(-len(snapshot.adapters) // max(1, len(rooms)))
        homeless: list[AdapterVersion] = []
        for adapter in sorted(
            snapshot.adapters, key=lambda adapter: _draw(snapshot.seed, adapter.version_id)
        ):
            present = sorted(snapshot.current.replicas_of(adapter.version_id) & rooms.keys())
            kept = [
                rooms[replica]
                for replica in present
                if rooms[replica].fits(adapter) and len(rooms[replica].held) < chunk
            ]
            if kept:
                kept[0].put(adapter)
            else:
                homeless.append(adapter)
        rings = _Rings(rooms.values(), snapshot.seed)
        for adapter in homeless:
            rings.put(adapter)
        return equal_shares(rooms.values(), snapshot.adapters)


class _Rings:
    """The replicas with so many adapters each, in a random circle; an adapter's own draw says where in the
    circle of the emptiest ones it begins to ask. So a thousand replicas need not be drawn for each adapter.
    """

    def __init__(self, rooms: Iterable[Room], seed: int) -> None:
        self._seed = seed
        self._rooms: dict[ReplicaId, Room] = {}
        self._rings: dict[int, list[tuple[bytes, ReplicaId]]] = {}
        for room in rooms:
            self._rooms[room.spec.replica_id] = room
            self._join((_draw(seed, "replica", room.spec.replica_id), room.spec.replica_id))

    def put(self, adapter: AdapterVersion) -> None:
        """One copy on an emptiest replica that takes it, or none."""
        begin = (_draw(self._seed, "begin", adapter.version_id), ReplicaId(""))
        for level in sorted(self._rings):
            ring = self._rings[level]
            first = bisect(ring, begin)
            for place in chain(range(first, len(ring)), range(first)):
                room = self._rooms[ring[place][1]]
                if room.fits(adapter):
                    room.put(adapter)
                    self._join(ring.pop(place))
                    if not ring:
                        del self._rings[level]
                    return

    def _join(self, member: tuple[bytes, ReplicaId]) -> None:
        room = self._rooms[member[1]]
        if room.free_adapters > 0:
            insort(self._rings.setdefault(len(room.held), []), member)


def _draw(*parts: object) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
