"""Pools inside a tier: which of its replicas hold which adapter, and the part of its work meant for each.

Memory decides how many copies an adapter gets, those with the most work per byte first. Copies of one adapter
are neighbours on a ring of the tier's replicas: pools overlap, so that shares even out loads all round the
ring, and a replica that comes or goes concerns its neighbours alone. What is held already stays; shares are
adapted before any byte moves.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from placement.pooling.balance import Weights, even_weights
from placement.pooling.fleet import Fleet, Floats, Ints
from placement.pooling.ring_runs import along, begins, run

MAX_POOL = 8
"""Choosing among more replicas than this wins little over choosing among so many, and costs their bytes."""

_FILL = 0.95
"""How full rooms are planned to be where adapters have to be packed."""

_TIGHT = 0.8
"""From this fill on adapters are dealt by size as well as by load."""

_COARSE = 0.04
"""Adapters larger than this part of a room are hard to pack."""

_FEW = 16
"""So many neighbours on a large ring are looked at for one more copy."""

_ENOUGH = 2
"""Neighbours with room for an adapter, from which on no others are looked for."""

_STICKY = 1.5
"""A further copy that is there already counts as so much more useful than one that has to be moved."""

Pool = tuple[int, ...]
"""Places of replicas, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierWork:
    """What one tier has to hold and to do: its replicas by place, adapters, and the work of each here.
    `reserve_bytes` are to be left free for others."""

    tier: int
    replicas: Sequence[int]
    adapters: Ints
    work: Floats
    reserve_bytes: float = 0.0


@dataclass(slots=True, kw_only=True)
class Ring:
    """A tier's replicas and what they hold: the pool of each adapter that found room, the work it brings, the
    weights of the pools' members, and the room that is left on each member, by place."""

    tier: int
    members: Pool
    pools: dict[int, Pool]
    work: dict[int, float]
    weights: Weights
    room_bytes: dict[int, float]
    room_places: dict[int, float]


def pack(
    fleet: Fleet, tier: TierWork, now: Sequence[Pool | None] | None, slack: float
) -> tuple[Ring, list[int]]:
    """The tier's pools, and the adapters for which it has no room.

    `now` are the pools that adapters have at present, by adapter. They are kept, and copies are added where
    loads would differ by more than `slack` from the mean otherwise.
    """
    members = tuple(sorted(tier.replicas))
    size = fleet.size_bytes[tier.adapters]
    ring = Ring(
        tier=tier.tier,
        members=members,
        pools={},
        work=dict(zip(tier.adapters.tolist(), tier.work.tolist(), strict=True)),
        weights={},
        room_bytes={place: float(fleet.replicas[place].pool_bytes) for place in members},
        room_places={place: float(fleet.replicas[place].pool_adapters) for place in members},
    )
    asked, many = float(size.sum()), len(size)
    if (
        len(members) <= MAX_POOL
        and asked + tier.reserve_bytes / len(members) <= min(ring.room_bytes.values())
        and many <= min(ring.room_places.values())
    ):
        ring.pools = dict.fromkeys(tier.adapters.tolist(), members)
        for place in members:
            ring.room_bytes[place] -= asked
            ring.room_places[place] -= many
        able = np.maximum(fleet.capacity[fleet.kind[list(members)], tier.tier], 1e-300)
        ring.weights = {members: tuple((able / able.sum()).tolist())}
        return ring, []
    left = _Dealer(fleet, tier, ring, now).deal()
    even_weights(fleet, ring, slack)
    return ring, left


class _Dealer:
    """Deals one tier's adapters to pools."""

    def __init__(self, fleet: Fleet, tier: TierWork, ring: Ring, now: Sequence[Pool | None] | None) -> None:
        self._ring = ring
        self._members = set(ring.members)
        self._pools = now
        size = fleet.size_bytes[tier.adapters]
        self._size: dict[int, float] = dict(zip(tier.adapters.tolist(), size.tolist(), strict=True))
        self._usual = 1
        copies = self._copies(tier, size)
        self._copies_of: dict[int, int] = dict(zip(tier.adapters.tolist(), copies.tolist(), strict=True))
        room = sum(ring.room_bytes.values()), sum(ring.room_places.values())
        asked = float((size * copies).sum()), float(copies.sum())
        is_full = asked[0] > _TIGHT * room[0] or asked[1] > _TIGHT * room[1]
        is_coarse = float(size.max()) > _COARSE * min(ring.room_bytes.values())
        self._tight = is_full and is_coarse
        self._load_of = dict.fromkeys(ring.members, 0.0)
        self._pool_bytes = dict(ring.room_bytes)
        self._pool_places = dict(ring.room_places)
        self._fair = max(float(tier.work.sum()) / len(ring.members), 1e-300)

    def _copies(self, tier: TierWork, size: Floats) -> Ints:
        """How many copies each of the tier's adapters gets, before rooms are looked at one by one."""
        ring, number, many = self._ring, len(self._ring.members), len(size)
        bytes_ = _FILL * sum(ring.room_bytes.values()) - tier.reserve_bytes
        places = _FILL * sum(ring.room_places.values())
        least, most = min(ring.room_bytes.values()), min(number, MAX_POOL)
        affordable = min(bytes_ / max(float(size.sum()), 1.0), places / max(many, 1))
        base = max(1, min(int(affordable), most))
        self._usual = base
        copies = np.full(many, base, dtype=np.int64)
        # What would load a member with more than half its part by itself goes to more of them.
        fair = float(tier.work.sum()) / number
        hot = np.ceil(tier.work / max(fair / 2, 1e-300)).astype(np.int64)
        wanted = np.maximum(copies, np.minimum(hot, number))
        if base < most:
            wanted = np.maximum(wanted, base + 1)
        density = tier.work / np.maximum(size, 1.0)
        held = self._held(tier.adapters)
        order = np.lexsort((tier.adapters, -density * np.where(held > base, _STICKY, 1.0)))
        more = (wanted - copies)[order]
        enough = (np.cumsum(more * size[order]) <= bytes_ - float((copies * size).sum())) & (
            np.cumsum(more) <= places - float(copies.sum())
        )
        copies[order] += np.where(enough & (size[order] <= least), more, 0)
        return copies

    def _held(self, adapters: Ints) -> Ints:
        pools = self._pools
        if pools is None:
            return np.zeros(len(adapters), dtype=np.int64)
        return np.array([len(pools[one] or ()) for one in adapters.tolist()], dtype=np.int64)

    def deal(self) -> list[int]:
        """A pool to every adapter; those that found no room."""
        loose = self._work_order(list(self._size) if self._pools is None else self._kept(self._pools))
        left = self._packed(loose) if self._tight else self._dealt(loose)
        for adapter in left:
            del self._ring.work[adapter]
        return left

    def _packed(self, loose: list[int]) -> list[int]:
        """By load and size; if some find no room, the largest first instead, if fewer do then."""
        ring = self._ring
        before = dict(ring.pools), dict(ring.room_bytes), dict(ring.room_places)
        left = self._dealt_tightly(loose)
        if left:
            tried = ring.pools, ring.room_bytes, ring.room_places
            ring.pools, ring.room_bytes, ring.room_places = before
            by_size = sorted(loose, key=lambda one: (-self._size[one], -ring.work[one], one))
            left_then = self._dealt_tightly(by_size)
            if len(left_then) < len(left):
                return left_then
            ring.pools, ring.room_bytes, ring.room_places = tried
        return left

    def _dealt(self, loose: list[int]) -> list[int]:
        """Each to neighbours on the ring, from the member on that has the least to do and to hold."""
        ring = self._ring
        copies = [self._copies_of[adapter] for adapter in loose]
        starts = self._starts(loose, copies)
        made: dict[tuple[int, int], Pool] = {}
        pools = []
        for key in zip(starts, copies, strict=True):
            pool = made.get(key)
            if pool is None:
                pool = made[key] = run(ring.members, *key)
            pools.append(pool)
        if self._all_put(loose, starts, copies):
            ring.pools.update(zip(loose, pools, strict=True))
            return []
        return [
            adapter
            for adapter, pool in zip(loose, pools, strict=True)
            if not self._put(adapter, pool) and not self._put_near(adapter, pool)
        ]

    def _starts(self, loose: list[int], copies: list[int]) -> list[int]:
        """Where on the ring each adapter's run of neighbours begins; a place in a pool counts as its part
        of the bytes."""
        ring, fair = self._ring, self._fair
        filled = [
            max(
                1 - ring.room_bytes[place] / max(self._pool_bytes[place], 1.0),
                1 - ring.room_places[place] / max(self._pool_places[place], 1.0),
            )
            for place in ring.members
        ]
        rooms = [_FILL * max(self._pool_bytes[place], 1.0) for place in ring.members]
        least = max(self._pool_bytes[place] / max(self._pool_places[place], 1.0) for place in ring.members)
        return begins(
            [ring.work[one] / fair for one in loose],
            copies,
            [max(self._size[one], least) for one in loose],
            np.array(self._loads()) / fair,
            filled,
            rooms,
            self._usual,
        )

    def _all_put(self, loose: list[int], starts: list[int], copies: list[int]) -> bool:
        """Take the room for these runs of neighbours, if there is room for all of them."""
        ring, number = self._ring, len(self._ring.members)
        begin, many = np.array(starts, dtype=np.int64), np.array(copies, dtype=np.int64)
        bytes_ = along(begin, many, np.array([self._size[one] for one in loose]), number).tolist()
        places = along(begin, many, np.ones(len(loose)), number).tolist()
        asked = list(zip(ring.members, bytes_, places, strict=True))
        if any(
            ring.room_bytes[place] < size or ring.room_places[place] < often for place, size, often in asked
        ):
            return False
        for place, size, often in asked:
            ring.room_bytes[place] -= size
            ring.room_places[place] -= often
        return True

    def _dealt_tightly(self, loose: list[int]) -> list[int]:
        """Where room is short everything gets the copies that it needs, on the members with the least to do
        and to hold, before anything gets another."""
        ring, members, size = self._ring, self._ring.members, self._size
        total, smallest = sum(size.values()) or 1.0, min(size.values())
        whole = sum(ring.work.values()) or 1.0
        loads = [load / whole for load in self._loads()]
        held = [(float(self._pool_bytes[place]) - ring.room_bytes[place]) / total for place in members]
        heap = [(max(loads[place], held[place]), place) for place in range(len(members))]
        heapify(heap)
        left = []
        for adapter in loose:
            copies = self._needed(adapter)
            taken: list[int] = []
            others: list[int] = []
            while heap and len(taken) < copies:
                _, place = heappop(heap)
                member = members[place]
                if ring.room_bytes[member] >= size[adapter] and ring.room_places[member] >= 1:
                    taken.append(place)
                elif ring.room_bytes[member] >= smallest and ring.room_places[member] >= 1:
                    others.append(place)
            if not taken:
                left.append(adapter)
            else:
                self._put(adapter, tuple(sorted(members[place] for place in taken)))
            for place in taken:
                loads[place] += ring.work[adapter] / whole / len(taken)
                held[place] += size[adapter] / total
            for place in (*taken, *others):
                heappush(heap, (max(loads[place], held[place]), place))
        left = [adapter for adapter in left if not self._put_instead(adapter)]
        self._load_of = dict(zip(members, loads, strict=True))
        for adapter in sorted(ring.pools, key=lambda one: (-ring.work[one] / max(size[one], 1.0), one)):
            short = self._copies_of[adapter] - len(ring.pools[adapter])
            if short > 0:
                self._grow(adapter, short)
        return left

    def _put_instead(self, adapter: int) -> bool:
        """In the place of another one's further copy, the one with the least work."""
        ring, size = self._ring, self._size
        others = sorted(
            (one for one, pool in ring.pools.items() if len(pool) > 1), key=lambda one: (ring.work[one], one)
        )
        for other in others:
            for place in ring.pools[other]:
                if ring.room_bytes[place] + size[other] >= size[adapter]:
                    ring.pools[other] = tuple(one for one in ring.pools[other] if one != place)
                    ring.room_bytes[place] += size[other]
                    ring.room_places[place] += 1
                    return self._put(adapter, (place,))
        return False

    def _needed(self, adapter: int) -> int:
        """The copies without which some member would have to do more than its part for this one alone."""
        ring = self._ring
        return min(len(ring.members), int(ring.work[adapter] / self._fair) + 1)

    def _kept(self, now: Sequence[Pool | None]) -> list[int]:
        """Adapters stay where they are, on as many members as they are to have; those that are nowhere."""
        loose = []
        for adapter in self._size:
            here = [place for place in now[adapter] or () if place in self._members]
            if not here or not self._put(adapter, tuple(sorted(here))):
                loose.append(adapter)
        if not self._tight:
            self._load_of = dict(zip(self._ring.members, self._loads(), strict=True))
            for adapter, pool in sorted(self._ring.pools.items()):
                short = self._copies_of[adapter] - len(pool)
                if short > 0 and (len(pool) == 1 or 2 * len(pool) <= self._copies_of[adapter]):
                    self._grow(adapter, short)
        return loose

    def _grow(self, adapter: int, number: int) -> None:
        ring, size = self._ring, self._size[adapter]
        pool = ring.pools[adapter]
        members = ring.members
        if len(members) > _FEW:
            begin = bisect_left(members, pool[-1]) + 1
            members = (members * 2)[begin : begin + _FEW]
        able = [
            place
            for place in members
            if place not in pool and ring.room_bytes[place] >= size and ring.room_places[place] >= 1
        ]
        load = self._load_of
        more = sorted(able, key=lambda place: (load[place], -ring.room_bytes[place], place))[:number]
        for place in more:
            ring.room_bytes[place] -= size
            ring.room_places[place] -= 1
        ring.pools[adapter] = tuple(sorted((*pool, *more)))

    def _loads(self) -> list[float]:
        """How much each place of the ring has to do already, for pools that begin there."""
        ring = self._ring
        by_member = dict.fromkeys(ring.members, 0.0)
        for adapter, pool in ring.pools.items():
            for place in pool:
                by_member[place] += ring.work[adapter] / len(pool)
        return [by_member[place] for place in ring.members]

    def _work_order(self, adapters: list[int]) -> list[int]:
        work, size = self._ring.work, self._size
        if not self._tight:
            each = np.array([work[one] / self._copies_of[one] for one in adapters])
            order = np.lexsort((np.array(adapters), -each))
            return [adapters[at] for at in order.tolist()]
        load, total = sum(work.values()) or 1.0, sum(size.values()) or 1.0
        return sorted(adapters, key=lambda one: (-max(work[one] / load, size[one] / total), one))

    def _put(self, adapter: int, pool: Pool) -> bool:
        ring, size = self._ring, self._size[adapter]
        room_bytes, room_places = ring.room_bytes, ring.room_places
        for place in pool:
            if room_bytes[place] < size or room_places[place] < 1:
                return False
        for place in pool:
            room_bytes[place] -= size
            room_places[place] -= 1
        ring.pools[adapter] = pool
        return True

    def _put_near(self, adapter: int, pool: Pool) -> bool:
        """On those of the pool that have room, if they are enough, else on the members with the most."""
        ring, size = self._ring, self._size[adapter]
        room_bytes, room_places = ring.room_bytes, ring.room_places
        able = [place for place in pool if room_bytes[place] >= size and room_places[place] >= 1]
        if len(able) < min(_ENOUGH, len(pool)):
            able = [place for place in ring.members if room_bytes[place] >= size and room_places[place] >= 1]
            able.sort(key=lambda place: (-room_bytes[place], -room_places[place], place))
        return bool(able) and self._put(adapter, tuple(sorted(able[: len(pool)])))
