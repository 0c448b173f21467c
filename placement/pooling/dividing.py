"""Which adapters go to which tier, from how much of each level's work each tier is to do."""

from collections.abc import Mapping

import numpy as np

from placement.pooling.fleet import Fleet, Floats, Ints, usable_bytes
from placement.pooling.pools import TierWork

_FULL = 0.95
"""How full a tier is planned to be before its coldest adapters go to a higher one."""

_NEGLIGIBLE = 0.005
"""A tier helps a lower level out only if that is more of its own capacity than this: each such adapter
costs bytes there."""


def divide(fleet: Fleet, flow: Floats, tier_of: Ints, home_tier: Ints) -> list[TierWork]:
    """The work of every tier that has replicas, the highest last.

    Where higher tiers help a level out they get the adapters with the most work per byte, first of all
    those that they serve now (`home_tier`); at a border one adapter is served by two tiers.
    """
    given = np.bincount(tier_of, weights=fleet.capacity[fleet.kind, tier_of], minlength=fleet.num_levels)
    found: list[list[tuple[Ints, Floats]]] = [[] for _ in range(fleet.num_levels)]
    for level in range(fleet.num_levels):
        adapters = np.flatnonzero(fleet.level == level)
        if not len(adapters):
            continue
        amounts = np.where(flow[level] > _NEGLIGIBLE * given, flow[level], 0.0)
        if given[level] > 0:
            amounts[level] = max(flow[level, level], 1e-300)
        tiers = np.flatnonzero(amounts > 0)
        if len(tiers) <= 1:
            tier = int(tiers[0]) if len(tiers) else int(np.flatnonzero(given[level:] > 0)[0]) + level
            found[tier].append((adapters, fleet.work[adapters]))
            continue
        for tier, own, work in _parted(fleet, adapters, tiers[::-1], amounts, home_tier):
            found[tier].append((own, work))
    shares = {
        tier: (np.concatenate([own for own, _ in parts]), np.concatenate([work for _, work in parts]))
        for tier, parts in enumerate(found)
        if parts
    }
    replicas = {tier: np.flatnonzero(tier_of == tier).tolist() for tier in set(tier_of.tolist())}
    usable = np.minimum(usable_bytes(fleet), _FULL * usable_bytes(fleet).max(axis=1, keepdims=True))
    pool_bytes = {tier: float(usable[fleet.kind[own], tier].sum()) for tier, own in replicas.items()}
    places = {
        tier: sum(float(fleet.replicas[one].pool_adapters) for one in own) for tier, own in replicas.items()
    }
    _push_up(fleet, shares, pool_bytes, fleet.size_bytes)
    _push_up(fleet, shares, places, np.ones(len(fleet.ids)))
    return [
        TierWork(tier=tier, replicas=replicas[tier], adapters=own, work=work)
        for tier, (own, work) in sorted(shares.items())
        if len(own)
    ]


def _push_up(
    fleet: Fleet, tiers: dict[int, tuple[Ints, Floats]], room: Mapping[int, float], size: Floats
) -> None:
    """Where a tier has not room for its adapters, those with the least work go to higher ones that have."""
    nothing = np.zeros(0, dtype=np.int64), np.zeros(0)
    for tier in sorted(room):
        own, work = tiers.get(tier, nothing)
        for higher in sorted(one for one in room if one > tier):
            excess = float(size[own].sum()) - room[tier]
            above, its_work = tiers.get(higher, nothing)
            spare = room[higher] - float(size[above].sum())
            if excess <= 0:
                break
            if higher != max(room):
                # What is too much there goes on from there.
                spare += sum(
                    max(0.0, room[one] - float(size[tiers.get(one, nothing)[0]].sum()))
                    for one in room
                    if one > higher
                )
            order = np.lexsort((own, work / np.maximum(size[own], 1.0)))
            ends = np.cumsum(size[own[order]])
            number = min(
                int(np.searchsorted(ends, excess)) + 1, int(np.searchsorted(ends, spare, side="right"))
            )
            moved = np.sort(order[:number])
            kept = np.sort(order[number:])
            tiers[higher] = np.concatenate((above, own[moved])), np.concatenate((its_work, work[moved]))
            own, work = own[kept], work[kept]
            tiers[tier] = own, work


def _parted(
    fleet: Fleet, adapters: Ints, tiers: Ints, amounts: Floats, home_tier: Ints
) -> list[tuple[int, Ints, Floats]]:
    """The level's adapters over `tiers`, highest first, each tier with its part of their work."""
    density = fleet.work[adapters] / np.maximum(fleet.size_bytes[adapters], 1.0)
    order = adapters[np.lexsort((adapters, -density, -home_tier[adapters]))]
    work = fleet.work[order]
    ends = np.cumsum(work)
    cuts = np.cumsum(amounts[tiers])
    cuts *= ends[-1] / cuts[-1]
    cuts[-1] = ends[-1]
    parts = []
    start = 0.0
    for tier, cut in zip(tiers.tolist(), cuts.tolist(), strict=True):
        own = np.minimum(ends, cut) - np.maximum(ends - work, start)
        here = own > 1e-9 * work
        parts.append((tier, order[here], own[here]))
        start = cut
    return parts
