"""Which replicas make which tier, so that the fewest bytes have to move."""

import numpy as np

from placement.pooling.fleet import Fleet, Floats, Ints

_EXACT = 400
"""From this many replicas of a kind on they are taken in the order of what they hold, not by assignment."""


def relabelled(fleet: Fleet, counts: Ints, held: Floats, now: Ints) -> Ints:
    """The tier of each replica: `counts` by kind and level, `held` the bytes of each level's adapters that a
    replica has, `now` its present tier. What it has of a tier's own level is what needs not to move.
    """
    tiers = np.full(len(fleet.replicas), -1, dtype=np.int64)
    worth = held.copy()
    known = np.flatnonzero(now >= 0)
    # Among tiers that cost as many bytes the present one: its requests are there.
    worth[known, now[known]] += 0.5
    for kind in range(len(fleet.kinds)):
        own = np.flatnonzero(fleet.kind == kind)
        slots = np.repeat(np.arange(fleet.num_levels), counts[kind])
        if not held.any() or len(set(slots.tolist())) == 1:
            tiers[own] = slots[::-1]
        elif len(own) < _EXACT:
            tiers[own] = _assigned(worth[own], slots)
        else:
            tiers[own] = _taken(worth[own], counts[kind])
    return tiers


def _assigned(worth: Floats, slots: Ints) -> Ints:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(worth[:, slots], maximize=True)
    tiers = np.empty(len(slots), dtype=np.int64)
    tiers[rows] = slots[columns]
    return tiers


def _taken(worth: Floats, counts: Ints) -> Ints:
    """Greedily: those that would lose most by not getting their best tier choose first."""
    ranked = np.sort(worth, axis=1)
    regret = ranked[:, -1] - ranked[:, -2] if worth.shape[1] > 1 else ranked[:, -1]
    left = counts.copy()
    tiers = np.empty(len(worth), dtype=np.int64)
    for row in np.argsort(-regret, kind="stable").tolist():
        tier = int(np.argmax(np.where(left > 0, worth[row], -1.0)))
        tiers[row] = tier
        left[tier] -= 1
    return tiers
