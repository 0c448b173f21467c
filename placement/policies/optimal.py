"""`optimal`: tiers of replicas by rank, pools of them inside a tier, and no move that does not pay.

The number of replicas per tier is the one with the smallest highest utilisation (`placement.tiers`); inside a
tier replicas are pooled as far as memory allows (`placement.pooling`), so that a router can choose among
several instead of drawing from fixed shares; adapters get further copies as spill where that is cheap
(`placement.spilling`). The present placement is kept for as long as it is good enough.
"""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from placement.dividing import divide
from placement.fleet import Fleet, Ints, fleet_of
from placement.pooling import Pod, pack
from placement.present import (
    Present,
    bytes_by_level,
    fits,
    present_of,
    tiers_of,
    utilisation_of_shares,
)
from placement.spilling import Layout
from placement.tier_labels import relabelled
from placement.tiers import Tiers, flows, size_tiers, utilisation_of
from placement.types import Holder, Placement, Snapshot

GOOD_ENOUGH = 1.05
"""A placement is kept while its utilisation is within this factor of the best that there is."""

CALM = 0.5
"""Below this utilisation requests hardly wait, so that no move is worth its bytes."""

SOFT_BELOW, STRICT_ABOVE = 0.92, 0.97
"""Spill helps until the cluster is nearly full and hurts beyond: copies outside their tier are marked as
spill below the first, not above the second, and between them as they were."""

BETTER = 0.97
"""A placement that moves bytes has to have at most so much of the present one's utilisation."""


@dataclass(frozen=True, slots=True)
class Optimal:
    """Tiers by capacity, pools by memory, spill by load, and hysteresis; see the module."""

    name: str = "optimal"

    def plan(self, snapshot: Snapshot) -> Placement:
        """The placement for the next epoch; the present one where that is good enough."""
        fleet = fleet_of(snapshot)
        if not fleet.ids:
            return Placement()
        sized = size_tiers(fleet)
        plan, present = snapshot.current, present_of(fleet, snapshot.current)
        is_valid = _is_valid(fleet, plan, present)
        # Each round has to be better than the last, so that an unchanged workload moves nothing.
        while not (is_valid and _is_good(fleet, present, sized)):
            tried = _built(fleet, sized, present if present.num_placed else None)
            found = present_of(fleet, tried)
            if is_valid and not _is_better(fleet, found, present):
                break
            plan, present, is_valid = tried, found, True
        return _marked(plan, fleet, present)


def _is_valid(fleet: Fleet, plan: Placement, present: Present) -> bool:
    return (
        present.whole
        and len(plan.holders) == present.num_placed
        and present.num_placed > 0
        and fits(fleet, present)
    )


def _is_good(fleet: Fleet, present: Present, sized: Tiers) -> bool:
    if present.num_placed < len(fleet.ids) or (present.num_single and len(fleet.replicas) > 1):
        return False
    return utilisation_of_shares(fleet, present) <= max(sized.utilisation * GOOD_ENOUGH, CALM)


def _is_better(fleet: Fleet, tried: Present, than: Present) -> bool:
    """More adapters placed, else clearly less utilisation, else no more of it and fewer single copies."""
    if tried.num_placed != than.num_placed:
        return tried.num_placed > than.num_placed
    before, after = utilisation_of_shares(fleet, than), utilisation_of_shares(fleet, tried)
    if after <= before * BETTER and before > CALM:
        return True
    return after <= before and tried.num_single < than.num_single


def _built(fleet: Fleet, sized: Tiers, present: Present | None) -> Placement:
    """A placement with the tiers that are best, as near to the present one as they allow."""
    tier_of = _tiers(fleet, sized, present)
    groups: list[tuple[int, ...]] = []
    home = np.full(len(fleet.ids), -1, dtype=np.int64)
    home_tier = np.full(len(fleet.ids), -1, dtype=np.int64)
    if present is not None:
        groups, home = _pods_of(present, len(fleet.ids))
        home_tier = np.where(home >= 0, tier_of[home], -1)
    counts = np.zeros_like(fleet.capacity, dtype=np.int64)
    np.add.at(counts, (fleet.kind, tier_of), 1)
    pods: list[Pod] = []
    left: list[int] = []
    for tier in divide(fleet, flows(fleet, counts), tier_of, home_tier):
        own, unplaced = pack(fleet, tier, groups=groups, home=home, slack=0.0 if present is None else 0.04)
        pods += own
        left += unplaced
    return Layout(fleet, pods, tier_of).placement(left)


def _tiers(fleet: Fleet, sized: Tiers, present: Present | None) -> Ints:
    nothing = np.zeros((len(fleet.replicas), fleet.num_levels))
    if present is None:
        return relabelled(fleet, sized.counts, nothing, np.full(len(fleet.replicas), -1))
    now = tiers_of(fleet, present)
    settled = np.maximum(now, 0)
    counts = np.zeros_like(sized.counts)
    np.add.at(counts, (fleet.kind, settled), 1)
    if np.all(now >= 0) and utilisation_of(fleet, counts) <= max(sized.utilisation * GOOD_ENOUGH, CALM):
        return now
    return relabelled(fleet, sized.counts, bytes_by_level(fleet, present), now)


def _pods_of(present: Present, num_adapters: int) -> tuple[list[tuple[int, ...]], Ints]:
    """The sets of replicas that hold the same adapters, those with most of them first, and the first
    replica with a share of each adapter."""
    number = np.bincount(present.of_adapter[present.of_adapter >= 0], minlength=len(present.groups))
    many: dict[tuple[int, ...], int] = {}
    first = np.full(len(present.groups) + 1, -1, dtype=np.int64)
    for place, (group, count) in enumerate(zip(present.groups, number.tolist(), strict=True)):
        served = tuple(sorted(one for one, share, _ in group if share > 0))
        if served:
            many[served] = many.get(served, 0) + count
            first[place] = max((share, -one, one) for one, share, _ in group)[2]
    groups: list[tuple[int, ...]] = []
    taken: set[int] = set()
    for served in sorted(many, key=lambda one: (-many[one], one)):
        if taken.isdisjoint(served):
            groups.append(served)
            taken.update(served)
    return groups, first[present.of_adapter]


def _marked(plan: Placement, fleet: Fleet, present: Present) -> Placement:
    """The plan with its copies without a share marked as spill, or not, by how full the cluster is."""
    utilisation = utilisation_of_shares(fleet, present)
    soft = utilisation < STRICT_ABOVE if present.spills else utilisation < SOFT_BELOW
    if all(spill == (soft and share == 0) for group in present.groups for _, share, spill in group):
        return plan
    made: dict[int, tuple[Holder, ...]] = {}
    holders = {}
    for version, own in plan.holders.items():
        marked = made.get(id(own))
        if marked is None:
            marked = made[id(own)] = tuple(
                Holder(replica_id=one.replica_id, share=one.share, spill=soft and one.share == 0)
                for one in own
            )
        holders[version] = marked
    return Placement(MappingProxyType(holders), plan.max_lora_ranks)
