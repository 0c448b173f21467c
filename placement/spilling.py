"""From pods to a placement: what had no room, second copies, spill, and shares."""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

import numpy as np

from placement.fleet import Fleet, Ints
from placement.pooling import Pod
from placement.types import Holder, Placement, VersionId

UP, DOWN = 4, 1
"""How many replicas of higher and of lower tiers a pod's adapters may spill to. Upwards costs few bytes,
since low ranks are small, and no padding; downwards both."""


class Layout:
    """The pods of all tiers while copies outside of them are added."""

    def __init__(self, fleet: Fleet, pods: Sequence[Pod], tier_of: Ints) -> None:
        self._fleet = fleet
        self._pods = list(pods)
        self._tier_of = tier_of
        self._bytes = np.array([float(spec.pool_bytes) for spec in fleet.replicas])
        self._places = np.array([float(spec.pool_adapters) for spec in fleet.replicas])
        self._of: dict[int, list[Pod]] = {}
        for pod in self._pods:
            for place, member in enumerate(pod.members):
                self._bytes[member] = pod.room_bytes[place]
                self._places[member] = pod.room_places[place]
            for adapter in pod.parts:
                self._of.setdefault(adapter, []).append(pod)
        self._only: dict[int, int] = {}
        self._extra: dict[int, list[int]] = {}
        self._wide: dict[int, list[int]] = {id(pod): [] for pod in self._pods}

    def placement(self, left: Iterable[int]) -> Placement:
        """The placement, with `left` placed wherever there is room."""
        for adapter in sorted(set(left) - self._of.keys(), key=self._largest_first):
            self._place_alone(adapter)
        self._second_copies()
        self._spill()
        return self._made()

    def _largest_first(self, adapter: int) -> tuple[float, int]:
        return -float(self._fleet.size_bytes[adapter]), adapter

    def _place_alone(self, adapter: int) -> None:
        """On the replica of the nearest tier above with room, else below."""
        place = self._roomiest(adapter, frozenset())
        if place is not None:
            self._put(adapter, place)
            self._only[adapter] = place

    def _second_copies(self) -> None:
        for adapter in sorted(self._of.keys() | self._only.keys()):
            held = self._held(adapter)
            if len(held) == 1 and (place := self._roomiest(adapter, held)) is not None:
                self._put(adapter, place)
                self._extra.setdefault(adapter, []).append(place)

    def _held(self, adapter: int) -> frozenset[int]:
        if adapter in self._only:
            return frozenset((self._only[adapter], *self._extra.get(adapter, ())))
        held = set(self._extra.get(adapter, ()))
        for pod in self._of[adapter]:
            held.update((pod.alone[adapter],) if adapter in pod.alone else pod.members)
            held.update(self._wide[id(pod)])
        return frozenset(held)

    def _roomiest(self, adapter: int, but: frozenset[int]) -> int | None:
        fleet, size = self._fleet, float(self._fleet.size_bytes[adapter])
        level = int(fleet.level[adapter])
        fitting = (self._places >= 1) & (self._bytes >= size) & (fleet.capacity[fleet.kind, level] > 0)
        found = [place for place in np.flatnonzero(fitting).tolist() if place not in but]
        return min(
            found, key=lambda place: (*self._distance(place, level), -self._bytes[place], place), default=None
        )

    def _distance(self, place: int, level: int) -> tuple[bool, int]:
        tier = int(self._tier_of[place])
        return tier < level, abs(tier - level)

    def _put(self, adapter: int, place: int) -> None:
        self._bytes[place] -= self._fleet.size_bytes[adapter]
        self._places[place] -= 1

    def _spill(self) -> None:
        """Copies outside the tier, the most work per byte first: upwards, then downwards."""
        fleet = self._fleet
        for pod in sorted(self._pods, key=lambda pod: (-pod.tier, pod.members)):
            adapters = np.array(sorted(pod.parts), dtype=np.int64)
            if not len(adapters):
                continue
            size = fleet.size_bytes[adapters]
            order = np.lexsort((adapters, -fleet.work[adapters] / np.maximum(size, 1.0)))
            adapters, size = adapters[order], np.cumsum(size[order])
            for place in self._targets(pod):
                self._spill_to(pod, place, adapters, size)

    def _targets(self, pod: Pod) -> list[int]:
        outside = [place for place in range(len(self._tier_of)) if self._tier_of[place] != pod.tier]
        able = [place for place in outside if self._fleet.capacity[self._fleet.kind[place], pod.tier] > 0]
        by_distance = sorted(
            able, key=lambda place: (*self._distance(place, pod.tier), -self._bytes[place], place)
        )
        up = [place for place in by_distance if self._tier_of[place] > pod.tier]
        down = [place for place in by_distance if self._tier_of[place] < pod.tier]
        return up[:UP] + down[:DOWN]

    def _spill_to(self, pod: Pod, place: int, adapters: Ints, ends: np.ndarray) -> None:
        has_room = bool(self._bytes[place] >= ends[-1] and self._places[place] >= len(adapters))
        if has_room and not self._extra and all(len(self._of[one]) == 1 for one in adapters.tolist()):
            self._wide[id(pod)].append(place)
            self._bytes[place] -= ends[-1]
            self._places[place] -= len(adapters)
            return
        for adapter in adapters.tolist():
            if self._places[place] < 1:
                return
            if place not in self._held(adapter) and self._bytes[place] >= self._fleet.size_bytes[adapter]:
                self._put(adapter, place)
                self._extra.setdefault(adapter, []).append(place)

    def _made(self) -> Placement:
        fleet = self._fleet
        shared: dict[tuple[object, ...], tuple[Holder, ...]] = {}
        holders: dict[VersionId, tuple[Holder, ...]] = {}
        weights = {id(pod): self._weights(pod) for pod in self._pods}
        for adapter, version in enumerate(fleet.ids):
            pods = self._of.get(adapter, [])
            extra = tuple(self._extra.get(adapter, ()))
            if not pods:
                if adapter in self._only:
                    holders[version] = self._tuple({self._only[adapter]: 1.0}, extra)
                continue
            if len(pods) == 1:
                pod = pods[0]
                key = (id(pod), pod.alone.get(adapter), extra)
                if key not in shared:
                    shared[key] = self._tuple(
                        self._shares(adapter, pods, weights), (*self._wide[id(pod)], *extra)
                    )
                holders[version] = shared[key]
            else:
                holders[version] = self._tuple(self._shares(adapter, pods, weights), extra)
        return Placement(MappingProxyType(holders))

    def _weights(self, pod: Pod) -> list[float]:
        """What part of an adapter on every member each member serves, so that all are loaded alike."""
        fleet = self._fleet
        able = [float(fleet.capacity[fleet.kind[one], pod.tier]) for one in pod.members]
        alone = dict.fromkeys(pod.members, 0.0)
        for adapter, member in pod.alone.items():
            alone[member] += pod.parts[adapter]
        fair = [
            max(pod.load * own / pod.capacity - alone[one], 0.0)
            for one, own in zip(pod.members, able, strict=True)
        ]
        total = sum(fair)
        if total <= 0:
            fair, total = able, sum(able)
        least = 0.01 * total / len(fair)
        fair = [max(one, least) for one in fair]
        return [one / sum(fair) for one in fair]

    def _shares(self, adapter: int, pods: Sequence[Pod], weights: dict[int, list[float]]) -> dict[int, float]:
        total = sum(pod.parts[adapter] for pod in pods)
        shares: dict[int, float] = {}
        for pod in pods:
            part = pod.parts[adapter] / total if total > 0 else 1.0 / len(pods)
            if adapter in pod.alone:
                shares[pod.alone[adapter]] = part
                continue
            for member, weight in zip(pod.members, weights[id(pod)], strict=True):
                shares[member] = part * weight
        return shares

    def _tuple(self, shares: dict[int, float], extra: Iterable[int]) -> tuple[Holder, ...]:
        replicas = self._fleet.replicas
        found = shares | dict.fromkeys([place for place in extra if place not in shares], 0.0)
        return tuple(
            [Holder(replica_id=replicas[place].replica_id, share=found[place]) for place in sorted(found)]
        )
