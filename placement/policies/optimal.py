"""`optimal`: tiers of replicas by rank, pools of them inside a tier, and no move that does not pay.

The number of replicas per tier is the one with the smallest highest utilisation (`placement.pooling.tiers`);
inside a tier replicas are pooled as far as memory allows (`placement.pooling.pools`), so that a router can
choose among several instead of drawing from fixed shares; adapters get further copies as spill where that is
cheap (`placement.pooling.spilling`). The present placement is kept for as long as it is good enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from placement.pooling.dividing import divide
from placement.pooling.fleet import Fleet, Floats, Ints, fleet_of
from placement.pooling.labels import relabelled
from placement.pooling.pools import Pool, Ring, pack
from placement.pooling.present import (
    Present,
    bytes_by_level,
    fits,
    has_room_for_seconds,
    idle_of_tiers,
    present_of,
    tiers_of,
    usable_of_tiers,
    utilisation_of_shares,
)
from placement.pooling.spilling import Layout
from placement.pooling.tiers import Tiers, flows, neighbours, size_tiers, utilisation_of
from placement.types import Placement, Snapshot

GOOD_ENOUGH = 1.05
"""A placement is kept while its utilisation is within this factor of the best that there is."""

CALM = 0.5
"""Below this utilisation requests hardly wait, so that no move is worth its bytes."""

CLOSE, NEAR = 1.02, 1.05
"""A placement so near to the smallest utilisation is not searched further, nor, for more than `FEW`
adapters, one as near as the second: each try takes its time there."""

FEW, MANY = 2000, 5000

SIMILAR, STEPS = 3, 5
"""Up to `MANY` adapters, divisions into tiers like the best one are tried where memory spoils it: so many at
a time, and again from the best of these, so often."""

UNEVEN, ROUNDS = 1.05, 3
"""Above this factor of the best utilisation a placement is tried again, with less asked of the tiers that
memory keeps from doing their part; so often in all."""

FAR = 1.2
"""Above this factor of the best utilisation what was made of the present placement gives way to one made from
scratch that is clearly better, whatever that moves: the demand has little to do with it any more."""

_SMALL = 64

BETTER = 0.97
"""A placement that moves bytes has to have at most so much of the present one's utilisation."""


@dataclass(frozen=True, slots=True)
class Optimal:
    """Tiers by capacity, pools by memory, spill, and hysteresis; see the module.

    Unless it `keeps` what there is, every plan is made from scratch, whatever that moves: what hysteresis is
    to be measured against.
    """

    name: str = "optimal"
    keeps: bool = True

    def plan(self, snapshot: Snapshot) -> Placement:
        """The placement for the next epoch; the present one where that is good enough."""
        fleet = fleet_of(snapshot)
        if not fleet.ids:
            return Placement()
        sizes = size_tiers(fleet)
        least = sizes[0].utilisation
        plan = snapshot.current if self.keeps else Placement()
        present = present_of(fleet, plan)
        is_valid = _is_valid(fleet, plan, present)
        # Each round has to be better than the last, so that an unchanged workload moves nothing.
        while not (is_valid and _is_good(fleet, present, least)):
            tried, found = _best(fleet, sizes, present if present.num_placed else None)
            if present.num_placed and utilisation_of_shares(fleet, found) > max(least * FAR, CALM):
                anew = _best(fleet, sizes, None)
                tried, found = anew if _is_better(fleet, anew[1], found) else (tried, found)
            if is_valid and not _is_better(fleet, found, present):
                break
            plan, present, is_valid = tried, found, True
        return _marked(plan, present)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A placement, and the tiers that it was made with; the lower its rank, the better."""

    rank: tuple[int, float]
    counts: Ints
    plan: Placement
    found: Present

    @property
    def made(self) -> tuple[Placement, Present]:
        """The placement, and what it comes to."""
        return self.plan, self.found


def _is_valid(fleet: Fleet, plan: Placement, present: Present) -> bool:
    return (
        present.whole
        and len(plan.holders) == present.num_placed
        and present.num_placed > 0
        and fits(fleet, present)
    )


def _is_good(fleet: Fleet, present: Present, least: float) -> bool:
    if present.num_placed < len(fleet.ids):
        return False
    if present.num_single and has_room_for_seconds(fleet, present):
        return False
    return utilisation_of_shares(fleet, present) <= max(least * GOOD_ENOUGH, CALM)


def _is_better(fleet: Fleet, tried: Present, than: Present) -> bool:
    """More adapters placed, else clearly less utilisation, else no more of it and fewer single copies."""
    if tried.num_placed != than.num_placed:
        return tried.num_placed > than.num_placed
    before, after = utilisation_of_shares(fleet, than), utilisation_of_shares(fleet, tried)
    if after <= before * BETTER and before > CALM:
        return True
    return after <= before and tried.num_single < than.num_single


def _best(fleet: Fleet, sizes: Sequence[Tiers], present: Present | None) -> tuple[Placement, Present]:
    """The best placement with any of these tiers, first of all with the present ones, if these are good
    enough; where memory spoils all of them, with similar ones."""
    tried: list[_Tried] = []
    least = sizes[0].utilisation
    enough = least * (CLOSE if len(fleet.ids) <= FEW else NEAR)

    def is_enough(sized: Tiers) -> bool:
        for plan, found, used in _fed_back(fleet, sized, present, least):
            tried.append(_Tried((-found.num_placed, used), sized.counts, plan, found))
        return min(one.rank for one in tried) <= (-len(fleet.ids), enough)

    kept = _kept(fleet, least, present)
    if kept is not None:
        is_enough(kept)
        if min(one.rank for one in tried) <= (-len(fleet.ids), max(least * GOOD_ENOUGH, CALM)):
            return min(tried, key=lambda one: one.rank).made
    if not any(is_enough(sized) for sized in sizes):
        for _ in range(STEPS if len(fleet.ids) <= MANY else 0):
            best = min(tried, key=lambda one: one.rank)
            similar = _similar(fleet, best, [one.counts for one in tried])
            if any(is_enough(sized) for sized in similar) or min(one.rank for one in tried) == best.rank:
                break
    return min(tried, key=lambda one: one.rank).made


def _fed_back(
    fleet: Fleet, sized: Tiers, present: Present | None, least: float
) -> Iterator[tuple[Placement, Present, float]]:
    """Placements with these tiers, where memory keeps some replicas from taking their part: their tiers are
    asked for less each time."""
    usable = np.ones(fleet.num_levels)
    for _ in range(ROUNDS if len(fleet.ids) <= MANY else 1):
        plan = _built(fleet, sized, present, usable)
        found = present_of(fleet, plan)
        used = utilisation_of_shares(fleet, found)
        yield plan, found, used
        if used <= least * UNEVEN or not np.isfinite(used):
            return
        usable = usable * usable_of_tiers(fleet, found, max(sized.utilisation, least))


def _similar(fleet: Fleet, best: "_Tried", known: Sequence[Ints]) -> list[Tiers]:
    """Tiers with one replica elsewhere that promise the least utilisation, what memory makes go to higher
    tiers included, and less than the best has. Some of them have one more in the tier whose replicas are
    the farthest from doing their part, as where few large adapters fill one."""
    seen = {counts.tobytes() for counts in known}
    promised: list[tuple[float, int, Ints]] = []
    for counts in neighbours(fleet, best.counts):
        if counts.tobytes() not in seen:
            used = _promised(fleet, counts)
            if used < best.rank[1] or (best.rank[0] > -len(fleet.ids) and np.isfinite(used)):
                promised.append((used, len(promised), counts))
    promised.sort(key=lambda one: one[:2])
    idle = int(np.argmax(idle_of_tiers(fleet, best.found)))
    before = int(best.counts[:, idle].sum())
    helped = [one for one in promised if int(one[2][:, idle].sum()) > before]
    chosen = {place: counts for _, place, counts in (*promised[:SIMILAR], *helped[:SIMILAR])}
    return [Tiers(counts=counts, utilisation=utilisation_of(fleet, counts)) for counts in chosen.values()]


def _promised(fleet: Fleet, counts: Ints) -> float:
    if not np.isfinite(utilisation_of(fleet, counts)):
        return float("inf")
    nothing = np.full(len(fleet.ids), -1, dtype=np.int64)
    tier_of = relabelled(fleet, counts, np.zeros((len(fleet.replicas), fleet.num_levels)), nothing)
    used = [0.0]
    for tier in divide(fleet, flows(fleet, counts), tier_of, nothing):
        able = fleet.capacity[fleet.kind[tier.replicas], tier.tier]
        room = sum(float(fleet.replicas[place].pool_bytes) for place in tier.replicas)
        full = float(fleet.size_bytes[tier.adapters].sum()) > room
        used.append(float("inf") if full else float(tier.work.sum()) / float(able.sum()))
    return max(used)


def _built(fleet: Fleet, sized: Tiers, present: Present | None, usable: Floats) -> Placement:
    """A placement with these tiers, as near to the present one as they allow."""
    tier_of = _tiers(fleet, sized.counts, present)
    pools = None if present is None else _pools(present)
    home_tier = np.full(len(fleet.ids), -1, dtype=np.int64)
    if pools is not None:
        home_tier = np.array([max(tier_of[list(pool)]) if pool else -1 for pool in pools], dtype=np.int64)
    rings: list[Ring] = []
    left: list[int] = []
    # What is there already may be less even, and in a large fleet evenness takes longest to plan.
    slack = 0.04 if present is not None else 0.01 if len(fleet.replicas) <= _SMALL else 0.02
    for tier in divide(fleet, flows(fleet, sized.counts, usable), tier_of, home_tier):
        ring, unplaced = pack(fleet, tier, pools, slack)
        rings.append(ring)
        left += unplaced
    return Layout(fleet, rings, tier_of, present).placement(left)


def _tiers(fleet: Fleet, counts: Ints, present: Present | None) -> Ints:
    if present is None:
        nothing = np.zeros((len(fleet.replicas), fleet.num_levels))
        return relabelled(fleet, counts, nothing, np.full(len(fleet.replicas), -1))
    now = tiers_of(fleet, present)
    if np.all(now >= 0) and np.array_equal(_counts(fleet, now), counts):
        return now
    return relabelled(fleet, counts, bytes_by_level(fleet, present), now)


def _kept(fleet: Fleet, least: float, present: Present | None) -> Tiers | None:
    """The present tiers, if every replica has one and together they are good enough."""
    if present is None:
        return None
    now = tiers_of(fleet, present)
    if np.any(now < 0) or np.any(fleet.capacity[fleet.kind, now] <= 0):
        return None
    counts = _counts(fleet, now)
    used = utilisation_of(fleet, counts)
    return Tiers(counts=counts, utilisation=used) if used <= max(least * GOOD_ENOUGH, CALM) else None


def _counts(fleet: Fleet, tier_of: Ints) -> Ints:
    counts = np.zeros_like(fleet.capacity, dtype=np.int64)
    np.add.at(counts, (fleet.kind, tier_of), 1)
    return counts


def _pools(present: Present) -> list[Pool | None]:
    """The replicas that serve each adapter."""
    served: list[Pool | None] = [
        tuple(sorted(place for place, share, _ in group if share > 0)) for group in present.groups
    ]
    served.append(None)
    return [served[group] for group in present.of_adapter.tolist()]


def _marked(plan: Placement, present: Present) -> Placement:
    """The plan with all copies without a share marked as spill, also those that another policy made."""
    if all(spill == (share == 0) for group in present.groups for _, share, spill in group):
        return plan
    made = {
        id(own): tuple(replace(one, spill=one.share == 0) for one in own) for own in plan.holders.values()
    }
    holders = {version: made[id(own)] for version, own in plan.holders.items()}
    return Placement(MappingProxyType(holders), plan.max_lora_ranks)
