"""Weights of the members of pools, so that all members of a tier are loaded alike."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from placement.pooling.fleet import Fleet, Floats

Weights = dict[tuple[int, ...], tuple[float, ...]]
"""By pool: the part of its adapters' work that each member is meant for, adding up to one."""

_ROUNDS = 120
_EVEN = 0.002
_LEAST_WEIGHT = 0.01
"""A member's least weight, of an equal one: who holds a copy may serve it."""
_REPAIRS = 8
_PARTNERS = 3
_FEW_UNDER, _FEW, _TRIES = 16, 64, 50
"""So many members are considered for a copy more, and so many adapters of one (the last); in tiers larger
than the second a single exchange is no matter."""

_MANY = 2000
"""Among more adapters than this no pairs are looked for: they are fine enough without."""


class Pools(Protocol):
    """What is balanced: a ring, see `placement.pooling.pools`."""

    tier: int
    members: tuple[int, ...]
    pools: dict[int, tuple[int, ...]]
    work: dict[int, float]
    weights: Weights
    room_bytes: dict[int, float]
    room_places: dict[int, float]


def even_weights(fleet: Fleet, ring: Pools, slack: float) -> None:
    """Set the ring's weights; where they cannot even out loads up to `slack`, add or move copies first."""
    able = fleet.capacity[fleet.kind[list(ring.members)], ring.tier]
    for _ in range(_REPAIRS):
        loads = _weigh(ring, able)
        if float(able.sum()) <= 0 or not _repaired(fleet, ring, loads, able, max(slack, 5 * _EVEN)):
            return
    _weigh(ring, able)


def _weigh(ring: Pools, able: Floats) -> Floats:
    """Scale weights by how loaded members are until all are alike; the loads."""
    asked: dict[tuple[int, ...], float] = {}
    for adapter, pool in ring.pools.items():
        asked[pool] = asked.get(pool, 0.0) + ring.work[adapter]
    at = {place: index for index, place in enumerate(ring.members)}
    lengths = np.array([len(pool) for pool in asked], dtype=np.int64)
    member = np.array([at[place] for pool in asked for place in pool], dtype=np.int64)
    of = np.repeat(np.arange(len(asked)), lengths)
    work = np.array(list(asked.values()))[of] if asked else np.zeros(0)
    weights = able[member]
    total = np.bincount(of, weights=weights, minlength=len(asked))
    weights = np.where(total[of] > 0, weights / np.maximum(total[of], 1e-300), 1.0 / lengths[of])
    least = _LEAST_WEIGHT * weights
    mean = float(work @ weights) / float(able.sum()) if able.sum() > 0 else 0.0
    loads = np.bincount(member, weights=work * weights, minlength=len(able)).astype(np.float64)
    for _ in range(_ROUNDS):
        used = np.divide(loads, able * mean, out=np.ones_like(loads), where=able * mean > 0)
        if len(asked) <= 1 or used.max(initial=0.0) <= 1 + _EVEN:
            break
        weights = np.maximum(weights / np.maximum(used, 0.05)[member], least)
        weights /= np.bincount(of, weights=weights, minlength=len(asked))[of]
        loads = np.bincount(member, weights=work * weights, minlength=len(able)).astype(np.float64)
    ends = np.cumsum(lengths)[:-1]
    parts = [tuple(part.tolist()) for part in np.split(weights, ends)] if asked else []
    ring.weights = dict(zip(asked, parts, strict=True))
    return loads


def _repaired(fleet: Fleet, ring: Pools, loads: Floats, able: Floats, slack: float) -> bool:
    """Let members with too little take adapters from those with too much; whether any did."""
    mean = float(loads.sum()) / float(able.sum())
    over = loads - mean * able
    if float(np.max(over - slack * mean * able)) <= 0:
        return False
    at = {place: index for index, place in enumerate(ring.members)}
    by_member: dict[int, list[int]] = {}
    for adapter, pool in ring.pools.items():
        for place in pool:
            by_member.setdefault(place, []).append(adapter)
    least = float(fleet.size_bytes[list(ring.pools)].min(initial=np.inf))
    few = len(ring.members) <= _FEW and len(ring.pools) <= _MANY
    done = False
    for most in sorted(ring.members, key=lambda place: (-over[at[place]], place)):
        if over[at[most]] <= slack / 2 * mean * able[at[most]]:
            break
        # Ever so many members are not looked at for ever so many adapters.
        order = (ring.members[index] for index in np.argsort(over, kind="stable").tolist())
        roomy = (one for one in order if ring.room_bytes[one] >= least and ring.room_places[one] >= 1)
        under = list(islice(roomy, _FEW_UNDER))
        for adapter in sorted(by_member.get(most, ()), key=lambda one: _worth(fleet, ring, one))[:_TRIES]:
            if over[at[most]] <= 0:
                break
            moved = most in ring.pools[adapter] and _handed(fleet, ring, adapter, most, over, at, under)
            done = done or moved
        if over[at[most]] > slack / 2 * mean * able[at[most]] and few:
            done = _exchanged(fleet, ring, most, over, at, by_member) or done
    return done


def _exchanged(
    fleet: Fleet,
    ring: Pools,
    most: int,
    over: Floats,
    at: Mapping[int, int],
    by_member: Mapping[int, Sequence[int]],
) -> bool:
    """Where there is no room, two members exchange one adapter each, the pair that evens them out best."""
    best: tuple[float, int, int, int] | None = None
    room = ring.room_bytes
    for least in sorted(ring.members, key=lambda place: (over[at[place]], place))[:_PARTNERS]:
        wanted = min(over[at[most]], -over[at[least]])
        if wanted <= 0:
            break
        theirs = [
            (ring.work[one] * _part(ring, one, least), float(fleet.size_bytes[one]), one)
            for one in by_member.get(least, ())
            if most not in ring.pools[one] and least in ring.pools[one]
        ]
        for adapter in by_member.get(most, ()):
            if least in ring.pools[adapter] or most not in ring.pools[adapter]:
                continue
            work, size = ring.work[adapter] * _part(ring, adapter, most), float(fleet.size_bytes[adapter])
            for its_work, its_size, other in theirs:
                miss = abs(work - its_work - wanted) / wanted
                fits = room[most] + size >= its_size and room[least] + its_size >= size
                if miss < 0.8 and fits and (best is None or (miss, adapter, other, least) < best):
                    best = miss, adapter, other, least
    if best is None:
        return False
    _, adapter, other, least = best
    _relocate(fleet, ring, adapter, most, least)
    _relocate(fleet, ring, other, least, most)
    return True


def _relocate(fleet: Fleet, ring: Pools, adapter: int, start: int, end: int) -> None:
    size = float(fleet.size_bytes[adapter])
    ring.room_bytes[start] += size
    ring.room_places[start] += 1
    ring.room_bytes[end] -= size
    ring.room_places[end] -= 1
    ring.pools[adapter] = tuple(sorted((*(one for one in ring.pools[adapter] if one != start), end)))


def _worth(fleet: Fleet, ring: Pools, adapter: int) -> tuple[float, int]:
    return -ring.work[adapter] / max(float(fleet.size_bytes[adapter]), 1.0), adapter


def _handed(
    fleet: Fleet,
    ring: Pools,
    adapter: int,
    most: int,
    over: Floats,
    at: Mapping[int, int],
    under: Sequence[int],
) -> bool:
    """One adapter's copy more on, or moved to, the member with the least to do that has room."""
    size, pool = float(fleet.size_bytes[adapter]), ring.pools[adapter]
    part = ring.work[adapter] * _part(ring, adapter, most)
    able = [place for place in under if over[at[place]] < 0 and _may_take(ring, place, pool, size)]
    if not able or part <= 0:
        return False
    least = min(able, key=lambda place: (over[at[place]], place))
    wanted = min(over[at[most]], -over[at[least]])
    # Small ones are moved, large ones shared; what would only turn the tables is left where it is.
    if part <= wanted * 1.2:
        kept = tuple(place for place in pool if place != most)
        ring.room_bytes[most] += size
        ring.room_places[most] += 1
    else:
        kept, part = pool, min(part, wanted)
    if part < 0.01 * wanted:
        if kept != pool:
            ring.room_bytes[most] -= size
            ring.room_places[most] -= 1
        return False
    ring.room_bytes[least] -= size
    ring.room_places[least] -= 1
    ring.pools[adapter] = tuple(sorted((*kept, least)))
    over[at[most]] -= part
    over[at[least]] += part
    return True


def _may_take(ring: Pools, place: int, pool: tuple[int, ...], size: float) -> bool:
    return place not in pool and ring.room_bytes[place] >= size and ring.room_places[place] >= 1


def _part(ring: Pools, adapter: int, place: int) -> float:
    pool = ring.pools[adapter]
    weights = ring.weights.get(pool)
    return weights[pool.index(place)] if weights is not None else 1.0 / len(pool)
