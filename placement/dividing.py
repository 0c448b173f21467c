"""Which adapters go to which tier, from how much of each level's work each tier is to do."""

import numpy as np

from placement.fleet import Fleet, Floats, Ints
from placement.pooling import TierWork

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
    return [
        TierWork(
            tier=tier,
            replicas=np.flatnonzero(tier_of == tier).tolist(),
            adapters=np.concatenate([own for own, _ in parts]),
            work=np.concatenate([work for _, work in parts]),
        )
        for tier, parts in enumerate(found)
        if parts
    ]


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
