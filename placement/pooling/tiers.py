"""How many replicas serve which ranks at most, so that the highest utilisation is as low as can be.

A replica of a tier serves requests of its level and of lower ones, at its own level's capacity. For a given
utilisation the highest tiers take the fewest replicas that cover what is asked of them and above; more would
only be slower replicas for those below. So the smallest utilisation is found by bisection. With several
kinds of replicas that is a start, bettered by moving and exchanging single replicas.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from placement.pooling.fleet import Fleet, Floats, Ints, usable_bytes

_BISECTIONS = 40
_MAX_STEPS = 200
_EPS = 1e-9
_FILLS = (1.0, 0.99, 0.95, 0.9, 0.0)
"""How full rooms may be planned, the first with which there is a plan: full ones are hard to pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Replicas by kind and level, and the highest utilisation that a fluid allocation over them has."""

    counts: Ints
    utilisation: float


@dataclass(frozen=True, slots=True)
class _Needs:
    """What each level and those above it need in all, lowest level first: work, bytes and places."""

    work: Floats
    bytes: Floats
    places: Floats
    room: Floats
    """Bytes that a replica of a kind (row) has room for in a tier (column)."""


def size_tiers(fleet: Fleet) -> tuple[Tiers, ...]:
    """Tier counts, those with the smallest utilisation first; one of them wherever memory is no matter.

    They differ in how full replicas may be, as full ones are hard to pack; the first also gives the smallest
    utilisation that there is. Where no counts give every adapter room, memory is left out of account.
    """
    number = np.bincount(fleet.kind, minlength=len(fleet.kinds))
    found: list[Tiers] = []
    for fill in _FILLS:
        if fill == 0 and found:
            break
        need = _needs(fleet, number, fill)
        starts = [
            one for order in _orders(fleet) if (one := _smallest(fleet, number, need, order)) is not None
        ]
        if not starts:
            continue
        best = min(starts, key=lambda counts: _highest(fleet, counts, need))
        if len(fleet.kinds) > 1:
            best = _bettered(fleet, best, need)
        if not any(np.array_equal(best, one.counts) for one in found):
            found.append(Tiers(counts=best, utilisation=utilisation_of(fleet, best)))
        if _has_room(fleet, best, _needs(fleet, number, min(_FILLS[:-1]))):
            break
    return tuple(sorted(found, key=lambda one: one.utilisation))


def neighbours(fleet: Fleet, counts: Ints) -> Iterator[Ints]:
    """Counts with one replica in another tier, or two of different kinds exchanged."""
    return _neighbours(fleet, counts)


def _has_room(fleet: Fleet, counts: Ints, needs: _Needs) -> bool:
    pool_adapters = np.array([float(spec.pool_adapters) for spec in fleet.kinds])
    bytes_, places = _from_top((needs.room * counts).sum(axis=0)), _from_top(pool_adapters @ counts)
    return bool(np.all(bytes_ >= needs.bytes) and np.all(places >= needs.places))


def _needs(fleet: Fleet, number: Ints, fill: float) -> _Needs:
    """Rooms are filled up to `fill`, 0 for no limit; below 1 adapters are whole, and one has as many copies
    as its work needs."""
    work = _from_top(fleet.totals(fleet.work))
    pool = np.array([float(spec.pool_bytes) for spec in fleet.kinds])
    room = np.repeat(pool[:, None], fleet.num_levels, axis=1)
    if fill == 0:
        return _Needs(work, np.zeros_like(work), np.zeros_like(work), room)
    copies = np.ones(len(fleet.ids))
    if fill < 1:
        each = float(work[0]) / max(int(number.sum()), 1)
        copies = np.maximum(np.minimum(fleet.work / max(each, 1e-300), number.sum()), 1.0)
        room = usable_bytes(fleet)
    asked, places = fleet.totals(fleet.size_bytes * copies), fleet.totals(copies)
    return _Needs(work, _from_top(asked) / fill, _from_top(places) / fill, room)


def utilisation_of(fleet: Fleet, counts: Ints) -> float:
    """The highest utilisation of a fluid allocation over these tiers, memory aside."""
    work = _from_top(fleet.totals(fleet.work))
    given = _from_top((fleet.capacity * counts).sum(axis=0))
    endless = np.where(work > 0, np.inf, 0.0)
    return float(np.max(np.divide(work, given, out=endless, where=given > 0), initial=0.0))


def flows(fleet: Fleet, counts: Ints, usable: Floats | None = None) -> Floats:
    """How much of each level's work (row) each tier (column) does, the utilisations as even as can be; of a
    tier's capacity the part `usable`, if that is given.

    From the top, the run of tiers that has to work hardest is evened out, then the rest below it; inside a
    run what a tier cannot do goes to the next higher ones.
    """
    work = fleet.totals(fleet.work)
    given = (fleet.capacity * counts).sum(axis=0) * (1.0 if usable is None else usable)
    flow = np.zeros((len(work), len(work)))
    last = len(work) - 1
    while last >= 0:
        asked, able = np.cumsum(work[last::-1]), np.cumsum(given[last::-1])
        ratio = np.divide(asked, able, out=np.where(asked > 0, np.inf, 0.0), where=able > 0)
        first = last - int(np.flatnonzero(ratio >= ratio.max() * (1 - _EPS))[-1])
        left = given * float(ratio.max())
        for level in range(last, first - 1, -1):
            todo = float(work[level])
            for tier in range(level, last + 1):
                taken = min(todo, float(left[tier]))
                flow[level, tier] = taken
                left[tier] -= taken
                todo -= taken
        last = first - 1
    return flow


def _from_top(values: Floats) -> Floats:
    sums: Floats = np.cumsum(values[::-1])[::-1]
    return sums


def _orders(fleet: Fleet) -> Iterator[Ints]:
    """Orders in which kinds may be taken for high tiers: those that lose least by it first, those that
    give most, those that give least."""
    low = fleet.capacity.max(axis=1)
    high = np.where(fleet.capacity > 0, fleet.capacity, np.inf).min(axis=1)
    if len(fleet.kinds) == 1:
        yield np.zeros(1, dtype=np.int64)
        return
    yield np.lexsort((-low, np.round(low / np.where(np.isfinite(high), high, 1.0), 6)))
    yield np.argsort(-high, kind="stable")
    yield np.argsort(high, kind="stable")


def _smallest(fleet: Fleet, number: Ints, needs: _Needs, order: Ints) -> Ints | None:
    best = _cover(fleet, number, needs, order, np.inf)
    if best is None:
        return None
    high = _highest(fleet, best, needs)
    low = float(needs.work[0]) / float((fleet.capacity.max(axis=1) * number).sum())
    for _ in range(_BISECTIONS):
        if high - low <= 1e-4 * high:
            break
        middle = (low + high) / 2
        counts = _cover(fleet, number, needs, order, middle)
        if counts is None:
            low = middle
        else:
            best, high = counts, min(middle, _highest(fleet, counts, needs))
    return best


def _cover(fleet: Fleet, number: Ints, needs: _Needs, order: Ints, utilisation: float) -> Ints | None:
    """The fewest replicas per tier, highest first, that keep to `utilisation`; None if there are too few.
    What is left over joins the lowest tier."""
    kinds, capacity, rooms = order.tolist(), fleet.capacity.tolist(), needs.room.tolist()
    work, sizes, numbers = needs.work.tolist(), needs.bytes.tolist(), needs.places.tolist()
    counts = [[0] * fleet.num_levels for _ in kinds]
    left = number.tolist()
    given = held = places = 0.0
    for tier in range(fleet.num_levels - 1, -1, -1):
        asked, size, many = work[tier] / utilisation * (1 - _EPS), sizes[tier], numbers[tier]
        for kind in kinds:
            able, room, spec = capacity[kind][tier], rooms[kind][tier], fleet.kinds[kind]
            if able <= 0 or not left[kind]:
                continue
            # A tier without any capacity above it needs at least one replica, however cold it is.
            least = 1e-12 if given == 0 else 0.0
            short = max(
                max(asked - given, least) / able,
                (size - held) / max(room, 1.0),
                (many - places) / max(spec.pool_adapters, 1e-9),
            )
            taken = min(left[kind], max(0, ceil(short)))
            counts[kind][tier] += taken
            left[kind] -= taken
            given += taken * able
            held += taken * room
            places += taken * float(spec.pool_adapters)
        if given < asked or given == 0 or held < size or places < many:
            return None
    for kind, number_left in enumerate(left):
        counts[kind][0] += number_left
    return np.array(counts, dtype=np.int64)


def _highest(fleet: Fleet, counts: Ints, needs: _Needs) -> float:
    given = np.cumsum((fleet.capacity * counts).sum(axis=0)[::-1])[::-1]
    if np.any(given <= 0) or not _has_room(fleet, counts, needs):
        return float("inf")
    return float(np.max(needs.work / given))


def _bettered(fleet: Fleet, counts: Ints, needs: _Needs) -> Ints:
    """Moves of one replica to another tier and exchanges between two kinds, for as long as one helps."""
    best, lowest = counts, _highest(fleet, counts, needs)
    for _ in range(_MAX_STEPS):
        found = None
        for tried in _neighbours(fleet, best):
            value = _highest(fleet, tried, needs)
            if value < lowest * (1 - 1e-6):
                found, lowest = tried, value
        if found is None:
            break
        best = found
    return best


def _neighbours(fleet: Fleet, counts: Ints) -> Iterator[Ints]:
    kinds, levels = counts.shape
    for kind, start in np.argwhere(counts > 0).tolist():
        for end in range(levels):
            if end == start or fleet.capacity[kind, end] <= 0:
                continue
            moved = counts.copy()
            moved[kind, start] -= 1
            moved[kind, end] += 1
            yield moved
            for other in range(kinds):
                if other != kind and counts[other, end] and fleet.capacity[other, start] > 0:
                    exchanged = moved.copy()
                    exchanged[other, end] -= 1
                    exchanged[other, start] += 1
                    yield exchanged
