"""`slora-random`: adapters shuffled once and dealt to the replicas in equal chunks, one copy each.

The static baseline of the LoRAServe paper's artifact (S-LoRA Random, seed 42 there). The shuffle is
a keyed hash per adapter, so that a new adapter does not reshuffle the others.
"""

import hashlib
from dataclasses import dataclass

from placement.policies.base import Room, equal_shares
from placement.types import AdapterVersion, Placement, Snapshot


@dataclass(frozen=True, slots=True)
class SloraRandom:
    """One copy per adapter on a random replica, evenly many per replica; moves only to stay even."""

    name: str = "slora-random"

    def plan(self, snapshot: Snapshot) -> Placement:
        """Keep what is placed up to an equal chunk, then deal the rest to the emptiest replicas."""
        rooms = Room.of(snapshot.replicas)
        chunk = -(-len(snapshot.adapters) // max(1, len(rooms)))
        homeless: list[AdapterVersion] = []
        for adapter in sorted(snapshot.adapters, key=lambda adapter: _draw(adapter, snapshot.seed)):
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
        for adapter in homeless:
            fitting = [room for room in rooms.values() if room.fits(adapter)]
            if fitting:
                min(fitting, key=lambda room: _order(adapter, room, snapshot.seed)).put(adapter)
        return equal_shares(rooms.values(), snapshot.adapters)


def _draw(adapter: AdapterVersion, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{adapter.version_id}".encode(), digest_size=8).digest()


def _order(adapter: AdapterVersion, room: Room, seed: int) -> tuple[int, bytes]:
    key = f"{seed}/{adapter.version_id}/{room.spec.replica_id}"
    return len(room.held), hashlib.blake2b(key.encode(), digest_size=8).digest()
