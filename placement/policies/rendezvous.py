"""`rendezvous`: as many copies as an adapter's part of the load, where rendezvous hashing puts them.

After NVIDIA Dynamo's LoRA allocation (its default, HRW): replicas in proportion to load by largest
remainder over all slots, at least one; each adapter asks the replicas in the order of a hash of both names
and passes over full ones; one that has a copy keeps it. It does not know ranks. Where it differs: Dynamo
holds a scale-down back for three ticks, and a policy without memory holds back by `SLACK` copies; Dynamo
gives an adapter without load a place that may not have room, and here memory is respected.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.policies.base import Room, equal_shares
from placement.policies.room_arrays import RoomArrays
from placement.policies.roomiest import Admission
from placement.types import AdapterVersion, Placement, Snapshot, VersionId

SLACK = 1.5
"""An adapter gives up copies when it has as many more than its part of the load asks for."""

_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

_Places = Mapping[VersionId, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Copies by load, places by hash; stable: what holds a copy keeps it while it is asked for."""

    name: str = "rendezvous"

    def plan(self, snapshot: Snapshot) -> Placement:
        """One copy of each adapter, then what is there of further ones, then new ones."""
        present = _present(snapshot)
        ring = _first_copies(snapshot, present)
        counts = _counts(snapshot, present)
        demand = snapshot.demand_tokens_per_s
        by_demand = sorted(
            snapshot.adapters, key=lambda adapter: (-demand.get(adapter.version_id, 0.0), adapter.version_id)
        )
        for adapter in by_demand:
            ring.keep(adapter, present[adapter.version_id], counts[adapter.version_id])
        for adapter in by_demand:
            ring.fill(adapter, counts[adapter.version_id])
        return equal_shares(ring.arrays.rooms, snapshot.adapters)


def _present(snapshot: Snapshot) -> _Places:
    """Where each adapter has a copy now, in its own order of the replicas, as places in their order by id."""
    places = {replica: place for place, replica in enumerate(Room.of(snapshot.replicas))}
    names = [_hash(snapshot.seed, replica) for replica in places]
    present: dict[VersionId, list[int]] = {}
    for adapter in snapshot.adapters:
        here = [
            places[replica]
            for replica in snapshot.current.replicas_of(adapter.version_id)
            if replica in places
        ]
        if len(here) > 1:
            own = _hash(snapshot.seed, adapter.name)
            scores = _mixed(np.array([names[place] ^ own for place in here], dtype=np.uint64)).tolist()
            here = [place for _, place in sorted(zip(scores, here, strict=True), reverse=True)]
        present[adapter.version_id] = here
    return present


def _first_copies(snapshot: Snapshot, present: _Places) -> "_Ring":
    """One copy of each: those that are placed stay, unless more fit when all are packed anew, the hardest
    to place first."""
    admission = Admission(snapshot.replicas)
    by_need = sorted(
        snapshot.adapters,
        key=lambda adapter: (admission.count(adapter), -adapter.size_bytes, adapter.version_id),
    )
    placed_first = sorted(by_need, key=lambda adapter: not present[adapter.version_id])
    kept = _Ring(snapshot)
    if kept.place_all(placed_first, present) == len(by_need):
        return kept
    packed = _Ring(snapshot)
    return packed if packed.place_all(by_need, present) > len(kept.copies) else kept


def _counts(snapshot: Snapshot, present: _Places) -> dict[VersionId, int]:
    """How many copies each adapter is to have."""
    admission = Admission(snapshot.replicas)
    demand = snapshot.demand_tokens_per_s
    counts = {adapter.version_id: 1 for adapter in snapshot.adapters}
    active = [
        adapter
        for adapter in sorted(snapshot.adapters, key=lambda adapter: adapter.version_id)
        if demand.get(adapter.version_id, 0.0) > 0 and admission.count(adapter) > 0
    ]
    slots = sum(spec.pool_adapters for spec in snapshot.replicas) - (len(counts) - len(active))
    total = sum(demand[adapter.version_id] for adapter in active)
    limits = {adapter.version_id: admission.count(adapter) for adapter in active}
    wanted = {
        version: float(max(1, min(limits[version], math.ceil(demand[version] / total * max(slots, 0)))))
        for version in limits
    }
    scale = min(1.0, slots / sum(wanted.values())) if wanted else 1.0
    parts = {version: max(1.0, number * scale) for version, number in wanted.items()}
    spare = slots - sum(int(part) for part in parts.values())
    for version in sorted(parts, key=lambda version: (int(parts[version]) - parts[version], version)):
        one_more = scale < 1.0 and spare > 0 and parts[version] > int(parts[version])
        spare -= one_more
        counts[version] = int(parts[version]) + one_more
        if counts[version] < (now := len(present[version])) < parts[version] + SLACK:
            counts[version] = min(now, limits[version])
    return counts


class _Ring:
    """The replicas, each adapter's in its own order, and the copies put there so far."""

    def __init__(self, snapshot: Snapshot) -> None:
        rooms = Room.of(snapshot.replicas)
        self.arrays = RoomArrays(rooms.values())
        self.copies: dict[VersionId, list[int]] = {}
        self._seed = snapshot.seed
        self._names = np.array([_hash(snapshot.seed, replica) for replica in rooms], dtype=np.uint64)

    def place_all(self, adapters: Sequence[AdapterVersion], present: _Places) -> int:
        """One copy of each that has room, where it has one if it may; how many there are then."""
        for adapter in adapters:
            self.keep(adapter, present[adapter.version_id], 1)
            self.fill(adapter, 1)
        return len(self.copies)

    def keep(self, adapter: AdapterVersion, present: Sequence[int], count: int) -> None:
        """Up to `count` copies in all, in those places alone, the first of them first."""
        held = self.copies.get(adapter.version_id, ())
        for place in present:
            if len(held) >= count:
                return
            if self.arrays.rooms[place].fits(adapter):
                held = self._put(adapter, place)

    def fill(self, adapter: AdapterVersion, count: int) -> None:
        """Up to `count` copies in all, anywhere."""
        held = self.copies.get(adapter.version_id, ())
        missing = count - len(held)
        if missing <= 0:
            return
        mask = self.arrays.fitting(adapter)
        mask[list(held)] = False
        if not mask.any():
            return
        scores = _mixed(self._names ^ np.uint64(_hash(self._seed, adapter.name)))
        scores[~mask] = 0
        best = [int(scores.argmax())] if missing == 1 else np.argsort(scores)[::-1][:missing].tolist()
        for place in best:
            if mask[place]:
                self._put(adapter, place)

    def _put(self, adapter: AdapterVersion, place: int) -> list[int]:
        self.arrays.put(place, adapter)
        held = self.copies.setdefault(adapter.version_id, [])
        held.append(place)
        return held


def _hash(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, which scatters keys that differ in any bit; wraps around."""
    keys = keys ^ (keys >> _SHIFTS[0])
    keys *= _FACTORS[0]
    keys ^= keys >> _SHIFTS[1]
    keys *= _FACTORS[1]
    keys ^= keys >> _SHIFTS[2]
    return keys
