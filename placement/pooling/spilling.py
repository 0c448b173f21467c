"""From pools to a placement: what had no room, second copies, spill, and shares."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from types import MappingProxyType

import numpy as np

from placement.pooling.fleet import Fleet, Floats, Ints
from placement.pooling.pools import MAX_POOL, Pool, Ring
from placement.pooling.present import Present
from placement.types import Holder, Placement, VersionId

UP, DOWN = 2, 1
"""How many replicas of higher and of lower tiers a pool's adapters may spill to. Upwards costs few bytes,
since low ranks are small, and no padding; downwards both."""

HOLDERS = 4
"""Where that makes fewer holders there are more: while popularity moves from rank to rank plans lag behind,
and what helps then is to choose among many."""

WIDE, SMALL = 8, 0.5
"""Where every replica could hold every adapter, memory is no reason to choose among few. So many holders an
adapter gets there, but one less than there are replicas at most; the smallest, which together are this part
of all bytes, get twice as many, or all there are."""

FEWEST = 3
"""So many holders an adapter has to have before one is left out."""

LEFT_OUT = 0.1
"""So much of the highest tier, by bytes, has no copy on the last replica downwards, of the highest ranks the
coldest adapters: their bytes are the most, and their requests the dearest there."""


class Layout:
    """The rings of all tiers while copies outside of their pools are added, as spill.

    Also where the cluster is overfull: strict tiers are for routing that cannot tell what a request costs.
    """

    def __init__(
        self, fleet: Fleet, rings: Sequence[Ring], tier_of: Ints, present: Present | None = None
    ) -> None:
        self._fleet = fleet
        self._present = present
        self._rings = list(rings)
        self._tier_of = tier_of
        self._bytes = np.array([float(spec.pool_bytes) for spec in fleet.replicas])
        self._places = np.array([float(spec.pool_adapters) for spec in fleet.replicas])
        self._size: list[float] = fleet.size_bytes.tolist()
        self._served: list[Ring | None] = [None] * len(fleet.ids)
        self._split: dict[int, list[Ring]] = {}
        self._extra: dict[int, Pool] = {}
        for ring in self._rings:
            for place in ring.members:
                self._bytes[place] = ring.room_bytes[place]
                self._places[place] = ring.room_places[place]
            for adapter in ring.pools:
                before = self._served[adapter]
                if before is not None:
                    self._split.setdefault(adapter, [before]).append(ring)
                self._served[adapter] = ring
        self._alone: dict[int, int] = {}

    def placement(self, left: Iterable[int]) -> Placement:
        """The placement, with `left` placed wherever there is room."""
        rooms = _Rooms(self._fleet, self._tier_of, self._bytes, self._places)
        for adapter in sorted(set(left), key=lambda one: (-self._size[one], one)):
            if self._served[adapter] is None:
                self._place_alone(adapter, rooms)
        self._second_copies(rooms)
        self._spill()
        if self._is_plentiful():
            self._widen()
        return self._made()

    def _is_plentiful(self) -> bool:
        """Whether every replica could hold every adapter."""
        fleet = self._fleet
        asked = float(fleet.size_bytes.sum())
        return all(
            spec.pool_bytes >= asked and spec.pool_adapters >= len(fleet.ids) for spec in fleet.replicas
        ) and bool((fleet.capacity > 0).all())

    def _widen(self) -> None:
        """Further copies: those that are there already, which costs no bytes, else in the nearest tiers."""
        fleet, places = self._fleet, np.arange(len(self._tier_of))
        nearest = [
            np.lexsort((places, self._tier_of < level, np.abs(self._tier_of - level)))[: 2 * WIDE].tolist()
            for level in range(fleet.num_levels)
        ]
        groups = [-1] * len(fleet.ids) if self._present is None else self._present.of_adapter.tolist()
        # Adapters that share a pool are widened alike, and share what they get.
        made: dict[tuple[Pool, Pool, int, int, int], Pool] = {}
        for adapter, key in enumerate(zip(groups, fleet.level.tolist(), self._most(), strict=True)):
            held, (group, level, most) = self._held(adapter), key
            if not 0 < len(held) < most:
                continue
            extra = self._extra.get(adapter, ())
            after = made.get((held, extra, *key))
            if after is None:
                wanted = dict.fromkeys((*self._there(group), *nearest[level]))
                more = [place for place in wanted if place not in held][: most - len(held)]
                after = made[held, extra, *key] = (*extra, *more)
            self._extra[adapter] = after

    def _most(self) -> list[int]:
        """How many holders each adapter gets where memory is free."""
        fleet, number = self._fleet, len(self._fleet.replicas)
        order = np.lexsort((np.arange(len(fleet.ids)), fleet.size_bytes))
        sums = np.cumsum(fleet.size_bytes[order])
        most = np.full(len(order), min(WIDE, number - 1))
        most[order[sums <= SMALL * sums[-1]]] = min(2 * WIDE, number)
        found: list[int] = most.tolist()
        return found

    def _there(self, group: int) -> list[int]:
        """Who holds the adapters of a group at present."""
        return [place for place, _, _ in self._present.groups[group]] if self._present and group >= 0 else []

    def _place_alone(self, adapter: int, rooms: "_Rooms") -> None:
        """On the replica of the nearest tier above with room, else below."""
        place = rooms.take(adapter, ())
        if place is not None:
            self._alone[adapter] = place

    def _second_copies(self, rooms: "_Rooms") -> None:
        singles = [
            adapter
            for ring in self._rings
            for adapter, pool in ring.pools.items()
            if len(pool) == 1 and adapter not in self._split
        ]
        density = (self._fleet.work / np.maximum(self._fleet.size_bytes, 1.0)).tolist()
        for adapter in sorted((*singles, *self._alone), key=lambda one: (-density[one], one)):
            place = rooms.take(adapter, self._held(adapter))
            if place is not None:
                self._extra[adapter] = (*self._extra.get(adapter, ()), place)

    def _held(self, adapter: int) -> Pool:
        if adapter in self._alone:
            return (self._alone[adapter], *self._extra.get(adapter, ()))
        rings = self._split.get(adapter)
        if rings is None:
            ring = self._served[adapter]
            return (*(ring.pools[adapter] if ring is not None else ()), *self._extra.get(adapter, ()))
        return (*(place for ring in rings for place in ring.pools[adapter]), *self._extra.get(adapter, ()))

    def _spill(self) -> None:
        """Copies outside the tier, the most work per byte first: upwards, then downwards."""
        fleet = self._fleet
        last: tuple[Ring, int] | None = None
        for ring in sorted(self._rings, key=lambda ring: -ring.tier):
            targets = self._targets(ring)
            if not targets or not ring.pools:
                continue
            if last is None and self._tier_of[targets[-1]] < ring.tier:
                last = ring, targets[-1]
            if self._all_spilt(targets, ring):
                continue
            adapters = np.array(sorted(ring.pools), dtype=np.int64)
            size = fleet.size_bytes[adapters]
            order = np.lexsort((adapters, -fleet.work[adapters] / np.maximum(size, 1.0)))
            ordered = adapters[order].tolist()
            for place in targets:
                self._spill_to(place, ordered, float(size.min()))
        if last is not None:
            self._leave_out(*last)

    def _leave_out(self, ring: Ring, place: int) -> None:
        """Some of the ring's copies there, the dearest, if all adapters have one. Demand that is nearly
        alike is taken for equal, so that not every forecast makes another choice."""
        fleet = self._fleet
        if not all(place in (held := self._held(one)) and len(held) >= FEWEST for one in ring.pools):
            return
        adapters = np.array(sorted(ring.pools), dtype=np.int64)
        size = fleet.size_bytes[adapters]
        density = np.round(np.log2(np.maximum(fleet.work[adapters], 1e-300) / np.maximum(size, 1.0)) / 2)
        order = np.lexsort((adapters, density, -fleet.level[adapters]))
        number = int(np.searchsorted(np.cumsum(size[order]), LEFT_OUT * float(size.sum()))) + 1
        for adapter in adapters[order[:number]].tolist():
            self._extra[adapter] = tuple(one for one in self._extra.get(adapter, ()) if one != place)

    def _targets(self, ring: Ring) -> list[int]:
        fleet, tiers = self._fleet, self._tier_of
        if len(ring.members) >= MAX_POOL:
            # There are enough to choose from in the tier.
            return []
        able = fleet.capacity[fleet.kind, ring.tier] > 0
        targets: list[int] = []
        for side, most in ((able & (tiers > ring.tier), UP), (able & (tiers < ring.tier), DOWN)):
            places = np.flatnonzero(side)
            order = np.lexsort((places, -self._bytes[places], np.abs(tiers[places] - ring.tier)))
            targets += places[order[: max(most, HOLDERS - len(ring.members) - len(targets))]].tolist()
        return targets

    def _all_spilt(self, targets: list[int], ring: Ring) -> bool:
        """All of the ring's adapters on all of the targets, if they have none but their pool and fit."""
        adapters = ring.pools.keys()
        asked, many = float(self._fleet.size_bytes[list(adapters)].sum()), len(adapters)
        if not (
            adapters.isdisjoint(self._extra)
            and adapters.isdisjoint(self._split)
            and asked <= float(self._bytes[targets].min())
            and many <= float(self._places[targets].min())
        ):
            return False
        self._extra.update(dict.fromkeys(adapters, tuple(targets)))
        self._bytes[targets] -= asked
        self._places[targets] -= many
        return True

    def _spill_to(self, place: int, adapters: list[int], smallest: float) -> None:
        extra, size = self._extra, self._size
        there = {adapter for adapter in self._split if place in self._held(adapter)}
        bytes_, places = float(self._bytes[place]), float(self._places[place])
        made: dict[Pool, Pool] = {}
        for adapter in adapters:
            if bytes_ < smallest or places < 1:
                break
            before = extra.get(adapter, ())
            if size[adapter] > bytes_ or place in before or adapter in there:
                continue
            after = made.get(before)
            if after is None:
                after = made[before] = (*before, place)
            extra[adapter] = after
            bytes_ -= size[adapter]
            places -= 1
        self._bytes[place], self._places[place] = bytes_, places

    def _made(self) -> Placement:
        # By object first: most pools are one for all that share them, and hashing long ones is slow.
        by_object: dict[tuple[int, int], tuple[Holder, ...]] = {}
        by_value: dict[tuple[Pool, Pool], tuple[Holder, ...]] = {}
        holders: dict[VersionId, tuple[Holder, ...]] = {}
        extra_of, split = self._extra.get, self._split
        for adapter, (version, ring) in enumerate(zip(self._fleet.ids, self._served, strict=True)):
            extra = extra_of(adapter, ())
            if ring is None:
                if adapter in self._alone:
                    holders[version] = self._tuple({self._alone[adapter]: 1.0}, extra)
            elif adapter in split:
                holders[version] = self._tuple(self._shares(adapter, split[adapter]), extra)
            else:
                pool = ring.pools[adapter]
                found = by_object.get((id(pool), id(extra)))
                if found is None:
                    found = by_value.get((pool, extra))
                    if found is None:
                        found = self._tuple(self._shares(adapter, (ring,)), extra)
                        by_value[pool, extra] = found
                    by_object[id(pool), id(extra)] = found
                holders[version] = found
        return Placement(MappingProxyType(holders))

    def _shares(self, adapter: int, rings: Sequence[Ring]) -> dict[int, float]:
        total = sum(ring.work[adapter] for ring in rings)
        shares: dict[int, float] = {}
        for ring in rings:
            pool = ring.pools[adapter]
            part = ring.work[adapter] / total if total > 0 else 1.0 / len(rings)
            for place, weight in zip(pool, ring.weights[pool], strict=True):
                shares[place] = part * weight
        return shares

    def _tuple(self, shares: dict[int, float], extra: Pool) -> tuple[Holder, ...]:
        replicas = self._fleet.replicas
        found = shares | dict.fromkeys([place for place in extra if place not in shares], 0.0)
        return tuple(
            [
                Holder(
                    replica_id=replicas[place].replica_id,
                    share=found[place],
                    spill=found[place] == 0,
                )
                for place in sorted(found)
            ]
        )


class _Rooms:
    """The rooms of all replicas, in each tier and kind the roomiest first; the arrays of what is left are
    kept up to date."""

    def __init__(self, fleet: Fleet, tier_of: Ints, bytes_: Floats, places: Floats) -> None:
        self._fleet = fleet
        self._bytes, self._places = bytes_, places
        self._of: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for place, key in enumerate(zip(tier_of.tolist(), fleet.kind.tolist(), strict=True)):
            if places[place] >= 1:
                self._of.setdefault(key, []).append((-float(bytes_[place]), place))
        for rooms in self._of.values():
            rooms.sort()
        self._near: dict[int, list[list[tuple[int, int]]]] = {}

    def take(self, adapter: int, but: Pool) -> int | None:
        """Room for the adapter on the roomiest replica, none of `but`, of the nearest tier from its level
        upwards that has any, else below; None if there is none."""
        size, level = float(self._fleet.size_bytes[adapter]), int(self._fleet.level[adapter])
        near = self._near.get(level)
        if near is None:
            near = self._near[level] = self._by_distance(level)
        for keys in near:
            found = [one for key in keys if (one := self._first(key, size, but)) is not None]
            if found:
                room, place, key = min(found)
                rooms = self._of[key]
                del rooms[bisect_left(rooms, (room, place))]
                self._bytes[place] -= size
                self._places[place] -= 1
                if self._places[place] >= 1:
                    insort(rooms, (-float(self._bytes[place]), place))
                return place
        return None

    def _by_distance(self, level: int) -> list[list[tuple[int, int]]]:
        """The tiers with the kinds that may serve the level there, the nearest first, those below last."""
        able = self._fleet.capacity[:, level] > 0
        found: dict[tuple[bool, int], list[tuple[int, int]]] = {}
        for tier, kind in sorted(self._of):
            if able[kind]:
                found.setdefault((tier < level, abs(tier - level)), []).append((tier, kind))
        return [keys for _, keys in sorted(found.items())]

    def _first(
        self, key: tuple[int, int], size: float, but: Pool
    ) -> tuple[float, int, tuple[int, int]] | None:
        for room, place in self._of[key]:
            if -room < size:
                return None
            if place not in but:
                return room, place, key
        return None
