"""Pods: replicas of one tier that hold the same adapters, so that a router can choose among them.

Memory decides how many replicas make a pod. Where it does not suffice for two copies of everything, the
adapters that are asked for most per byte have one on every member and the others one in all. Adapters are
dealt to pods so that loads are even; one that is asked for more than half a pod's load goes to several.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

import numpy as np

from placement.fleet import Fleet, Floats, Ints

MAX_POD = 8
"""Choosing among more replicas than this wins little over choosing among so many, and costs their bytes."""

_FILL = 0.95
"""How full rooms are planned to be where adapters have to be packed."""

_TIGHT = 0.8
"""From this fill on adapters are dealt by size as well as by load."""

EVEN = 0.01
"""Loads of pods that differ by less are even enough."""


@dataclass(slots=True)
class Pod:
    """Replicas (by place) of one tier and what they hold: `parts` is the work that each adapter brings here;
    those in `alone` have a copy on that one member only, all others on every member."""

    tier: int
    members: tuple[int, ...]
    capacity: float
    room_bytes: list[float]
    room_places: list[float]
    parts: dict[int, float] = field(default_factory=dict)
    alone: dict[int, int] = field(default_factory=dict)
    load: float = 0.0

    def put(self, adapter: int, size: float, work: float, *, everywhere: bool) -> bool:
        """Add this work of the adapter, and its copies if it has none here; False if there is no room."""
        if adapter not in self.parts:
            if everywhere:
                if min(self.room_places) < 1 or min(self.room_bytes) < size:
                    return False
                for place in range(len(self.members)):
                    self.room_bytes[place] -= size
                    self.room_places[place] -= 1
            else:
                place = max(range(len(self.members)), key=lambda one: (self.room_bytes[one], -one))
                if self.room_places[place] < 1 or self.room_bytes[place] < size:
                    return False
                self.room_bytes[place] -= size
                self.room_places[place] -= 1
                self.alone[adapter] = self.members[place]
        self.parts[adapter] = self.parts.get(adapter, 0.0) + work
        self.load += work
        return True

    def take(self, adapter: int, size: float) -> float:
        """Remove the adapter; the work that it brought."""
        work = self.parts.pop(adapter)
        self.load -= work
        only = self.alone.pop(adapter, None)
        for place, member in enumerate(self.members):
            if only is None or member == only:
                self.room_bytes[place] += size
                self.room_places[place] += 1
        return work

    @property
    def utilisation(self) -> float:
        """Work over capacity."""
        return self.load / self.capacity if self.capacity > 0 else (np.inf if self.load > 0 else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierWork:
    """What one tier has to hold and to do: its replicas by place, adapters, and the work of each here."""

    tier: int
    replicas: Sequence[int]
    adapters: Ints
    work: Floats


def pack(
    fleet: Fleet, tier: TierWork, *, groups: Sequence[tuple[int, ...]], home: Ints, slack: float
) -> tuple[list[Pod], list[int]]:
    """The tier's pods, and the adapters for which they had no room.

    `groups` are replicas that are a pod at present and `home[adapter]` a replica where it is now, -1 for
    none: adapters stay there for as long as no pod has more than 1 + `slack` times the mean load.
    """
    size = fleet.size_bytes[tier.adapters]
    copies, hot = _copies(fleet, tier, size)
    pods = [_pod(fleet, tier.tier, members) for members in _members(fleet, tier, copies, groups)]
    if len(pods) == 1 and bool(np.all(hot)) and _fits_all(pods[0], size):
        _put_all(pods[0], tier, size)
        return pods, []
    return pods, _Dealer(fleet, tier, pods, hot).deal(home, slack)


def _copies(fleet: Fleet, tier: TierWork, size: Floats) -> tuple[int, np.ndarray]:
    """How many replicas make a pod, and which of the tier's adapters are on all of its members."""
    specs = [fleet.replicas[place] for place in tier.replicas]
    bytes_, places = sum(float(one.pool_bytes) for one in specs), sum(one.pool_adapters for one in specs)
    least = min(float(one.pool_bytes) for one in specs), min(one.pool_adapters for one in specs)
    asked, many, number = float(size.sum()), len(size), len(specs)
    everyone = np.ones(many, dtype=bool)
    if number <= MAX_POD and asked <= least[0] and many <= least[1]:
        return number, everyone
    affordable = min(_FILL * bytes_ / max(asked, 1.0), _FILL * places / max(many, 1))
    if affordable >= 2 or number == 1:
        return max(1, min(int(affordable), number, MAX_POD)), everyone
    order = np.lexsort((tier.adapters, -tier.work / np.maximum(size, 1.0)))
    spare = np.minimum(
        np.cumsum(size[order]) <= _FILL * bytes_ - asked, np.arange(1, many + 1) <= _FILL * places - many
    )
    hot = np.zeros(many, dtype=bool)
    hot[order] = spare
    return 2, hot


def _members(
    fleet: Fleet, tier: TierWork, copies: int, groups: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The tier's replicas in pods of `copies` or one more of one kind, groups of the right size kept."""
    found: list[tuple[int, ...]] = []
    by_kind: dict[int, list[int]] = {}
    for place in tier.replicas:
        by_kind.setdefault(int(fleet.kind[place]), []).append(place)
    for own in by_kind.values():
        number = max(1, len(own) // copies)
        kept: list[tuple[int, ...]] = []
        left = set(own)
        for group in groups:
            sizes = {len(own) // number, -(-len(own) // number)}
            if len(group) in sizes and left.issuperset(group):
                rest, pods = len(left) - len(group), number - len(kept) - 1
                if pods * (len(own) // number) <= rest <= pods * -(-len(own) // number):
                    kept.append(group)
                    left.difference_update(group)
        others = sorted(left)
        pods = number - len(kept)
        kept += [tuple(part) for place in range(pods) if (part := others[place::pods])]
        found += kept
    return found


def _pod(fleet: Fleet, tier: int, members: Iterable[int]) -> Pod:
    places = tuple(sorted(members))
    return Pod(
        tier=tier,
        members=places,
        capacity=float(sum(fleet.capacity[fleet.kind[place], tier] for place in places)),
        room_bytes=[float(fleet.replicas[place].pool_bytes) for place in places],
        room_places=[float(fleet.replicas[place].pool_adapters) for place in places],
    )


def _fits_all(pod: Pod, size: Floats) -> bool:
    return min(pod.room_bytes) >= float(size.sum()) and min(pod.room_places) >= len(size)


def _put_all(pod: Pod, tier: TierWork, size: Floats) -> None:
    asked = float(size.sum())
    pod.parts = dict(zip(tier.adapters.tolist(), tier.work.tolist(), strict=True))
    pod.load = float(tier.work.sum())
    pod.room_bytes = [room - asked for room in pod.room_bytes]
    pod.room_places = [room - len(size) for room in pod.room_places]


class _Dealer:
    """Deals one tier's adapters to its pods."""

    def __init__(self, fleet: Fleet, tier: TierWork, pods: list[Pod], hot: np.ndarray) -> None:
        self._size = dict(zip(tier.adapters.tolist(), fleet.size_bytes[tier.adapters].tolist(), strict=True))
        self._work = dict(zip(tier.adapters.tolist(), tier.work.tolist(), strict=True))
        self._everywhere = dict(zip(tier.adapters.tolist(), hot.tolist(), strict=True))
        self._pods = pods
        self._load = float(tier.work.sum())
        self._capacity = sum(pod.capacity for pod in pods)
        self._rooms = [(sum(pod.room_bytes), sum(pod.room_places)) for pod in pods]
        copies = len(pods[0].members)
        number = {one: copies if on_all else 1 for one, on_all in self._everywhere.items()}
        asked = sum(size * number[one] for one, size in self._size.items())
        bytes_, places = (sum(room[place] for room in self._rooms) for place in range(2))
        self._tight = asked > _TIGHT * bytes_ or sum(number.values()) > _TIGHT * places

    def deal(self, home: Ints, slack: float) -> list[int]:
        """Everything to its pod; those that found no room."""
        at = {member: pod for pod in self._pods for member in pod.members}
        loose: list[tuple[int, float]] = []
        fair = self._load / max(len(self._pods), 1)
        for adapter, work in self._work.items():
            pod = at.get(int(home[adapter]))
            if work > fair / 2 and len(self._pods) > 1:
                parts = min(len(self._pods), int(np.ceil(work / (fair / 4))))
                loose += [(adapter, work / parts)] * parts
            elif pod is None or not self._put(pod, adapter, work):
                loose.append((adapter, work))
        loose += self._released(slack)
        left = self._dealt(loose)
        self._even_out(max(EVEN, slack))
        return left

    def _put(self, pod: Pod, adapter: int, work: float) -> bool:
        return pod.put(adapter, self._size[adapter], work, everywhere=self._everywhere[adapter])

    def _released(self, slack: float) -> list[tuple[int, float]]:
        """What pods with too much give away, the most work per byte first."""
        released = []
        for pod in self._pods:
            most = pod.capacity * self._load / self._capacity * (1 + slack)
            if pod.load <= most:
                continue
            for adapter in sorted(
                pod.parts, key=lambda one: (-pod.parts[one] / max(self._size[one], 1.0), one)
            ):
                if pod.load - pod.parts[adapter] >= most / (1 + slack) * (1 - EVEN):
                    released.append((adapter, pod.take(adapter, self._size[adapter])))
                if pod.load <= most:
                    break
        return released

    def _dealt(self, loose: list[tuple[int, float]]) -> list[int]:
        """Each to the pod with the least, the largest first; those that fit nowhere."""
        total = sum(self._size.values()) or 1.0
        load = self._load or 1.0
        if self._tight:
            loose.sort(key=lambda one: (-max(one[1] / load, self._size[one[0]] / total), one[0]))
        else:
            loose.sort(key=lambda one: (-one[1], -self._size[one[0]], one[0]))
        heap = [(self._key(place), place) for place in range(len(self._pods))]
        heapify(heap)
        left: list[int] = []
        for adapter, work in loose:
            place = heap[0][1]
            pod = self._pods[place]
            if adapter not in pod.parts and self._put(pod, adapter, work):
                heapreplace(heap, (self._key(place), place))
                continue
            for _, place in sorted(heap):
                if adapter not in self._pods[place].parts and self._put(self._pods[place], adapter, work):
                    heap = [(self._key(place), place) for place in range(len(self._pods))]
                    heapify(heap)
                    break
            else:
                holding = [pod for pod in self._pods if adapter in pod.parts]
                if holding:
                    self._put(min(holding, key=lambda pod: pod.utilisation), adapter, work)
                else:
                    left.append(adapter)
        return left

    def _key(self, place: int) -> float:
        pod = self._pods[place]
        used = pod.load / pod.capacity if pod.capacity > 0 else 0.0
        if not self._tight or self._load <= 0:
            return used
        bytes_, places = self._rooms[place]
        full = max(1 - sum(pod.room_bytes) / max(bytes_, 1.0), 1 - sum(pod.room_places) / max(places, 1.0))
        return max(used * self._capacity / self._load, full)

    def _even_out(self, slack: float) -> None:
        """Pods with more than their part share an adapter with one that has less."""
        mean = self._load / self._capacity if self._capacity > 0 else 0.0
        for _ in range(3 * len(self._pods)):
            most = max(self._pods, key=lambda pod: pod.utilisation)
            least = min(self._pods, key=lambda pod: pod.utilisation)
            if most.utilisation <= mean * (1 + slack) or most is least:
                return
            amount = min(most.load - mean * most.capacity, mean * least.capacity - least.load)
            if amount <= 0 or not self._shared(most, least, amount):
                return

    def _shared(self, most: Pod, least: Pod, amount: float) -> bool:
        able = [one for one in most.parts if most.parts[one] >= amount and self._everywhere[one]]
        able = able or sorted(most.parts, key=lambda one: (-most.parts[one], one))[:4]
        for adapter in sorted(able, key=lambda one: (one not in least.parts, self._size[one], one))[:8]:
            moved = min(amount, most.parts[adapter])
            if self._put(least, adapter, moved):
                most.parts[adapter] -= moved
                most.load -= moved
                return True
        return False
