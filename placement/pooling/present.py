"""What a placement comes to on a fleet: who holds what, loads, and what may be kept of it.

Adapters that share one tuple of holders are looked at together, as `optimal` makes such plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from placement.pooling.fleet import Fleet, Floats, Ints
from placement.types import Holder, Placement, ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """`groups` are the different tuples of holders, by replica's place; `of_adapter` says which is an
    adapter's, -1 for none. `whole` is False if a holder is no replica of the fleet."""

    groups: tuple[tuple[tuple[int, float, bool], ...], ...]
    of_adapter: Ints
    whole: bool

    @property
    def num_placed(self) -> int:
        """Adapters with at least one holder."""
        return int(np.count_nonzero(self.of_adapter >= 0))

    @property
    def num_single(self) -> int:
        """Adapters with exactly one holder."""
        single = np.array([len(group) == 1 for group in self.groups], dtype=bool)
        return int(np.count_nonzero(single[self.of_adapter[self.of_adapter >= 0]])) if len(single) else 0


def present_of(fleet: Fleet, placement: Placement) -> Present:
    """The placement on the fleet; holders that are not of the fleet are left out."""
    if not placement.holders:
        return Present(groups=(), of_adapter=np.full(len(fleet.ids), -1, dtype=np.int64), whole=True)
    place_of = {spec.replica_id: place for place, spec in enumerate(fleet.replicas)}
    held = list(map(placement.holders.get, fleet.ids))
    by_object: dict[int, int] = {}
    by_value: dict[tuple[tuple[int, float, bool], ...], int] = {}
    whole = True
    # The same tuple is looked at once, however many adapters share it.
    for key, holders in dict(zip(map(id, held), held, strict=True)).items():
        known = _known(holders, place_of) if holders is not None else ()
        whole = whole and len(known) == len(holders or ())
        by_object[key] = by_value.setdefault(known, len(by_value)) if known else -1
    of_adapter = np.array([by_object[id(holders)] for holders in held], dtype=np.int64)
    return Present(groups=tuple(by_value), of_adapter=of_adapter, whole=whole)


def _known(
    holders: tuple[Holder, ...], place_of: Mapping[ReplicaId, int]
) -> tuple[tuple[int, float, bool], ...]:
    return tuple(
        [
            (place_of[holder.replica_id], holder.share, holder.spill)
            for holder in holders
            if holder.replica_id in place_of
        ]
    )


def _by_group(present: Present, weights: Floats) -> Floats:
    placed = present.of_adapter >= 0
    sums = np.bincount(present.of_adapter[placed], weights=weights[placed], minlength=len(present.groups))
    return sums.astype(np.float64)


def tiers_of(fleet: Fleet, present: Present) -> Ints:
    """Each replica's tier: the highest level that it has a share of, -1 if it has none."""
    top = np.full(len(present.groups), -1, dtype=np.int64)
    placed = present.of_adapter >= 0
    np.maximum.at(top, present.of_adapter[placed], fleet.level[placed])
    tiers = np.full(len(fleet.replicas), -1, dtype=np.int64)
    for group, highest in zip(present.groups, top.tolist(), strict=True):
        for place, share, _ in group:
            if share > 0 and highest > tiers[place]:
                tiers[place] = highest
    return tiers


def usable_of_tiers(fleet: Fleet, present: Present, utilisation: float) -> Floats:
    """By level, the part of a tier's capacity that its replicas give if none may exceed `utilisation` and
    each is asked for as much as now; 1 for tiers where none does."""
    tiers, loads = tiers_of(fleet, present), _loads(fleet, present)
    able = np.where(tiers >= 0, fleet.capacity[fleet.kind, tiers], 0.0) * utilisation
    usable = np.ones(fleet.num_levels)
    for tier in np.unique(tiers[(tiers >= 0) & (loads > able)]).tolist():
        own = tiers == tier
        whole = float(able[own].sum())
        usable[tier] = float(np.minimum(loads, able)[own].sum()) / whole if whole > 0 else 1.0
    return usable


def idle_of_tiers(fleet: Fleet, present: Present) -> Floats:
    """By level, what the tier's replicas could do besides their work if all were as busy as the busiest."""
    tiers, loads = tiers_of(fleet, present), _loads(fleet, present)
    used = utilisation_of_shares(fleet, present)
    placed = np.flatnonzero(tiers >= 0)
    able = fleet.capacity[fleet.kind[placed], tiers[placed]] * (used if np.isfinite(used) else 0.0)
    idle = np.bincount(tiers[placed], weights=able - loads[placed], minlength=fleet.num_levels)
    return idle.astype(np.float64)


def utilisation_of_shares(fleet: Fleet, present: Present) -> float:
    """The highest utilisation of any replica if requests follow the shares."""
    loads, tiers = _loads(fleet, present), tiers_of(fleet, present)
    able = np.where(tiers >= 0, fleet.capacity[fleet.kind, tiers], 1.0)
    if np.any((able <= 0) & (loads > 0)):
        return float("inf")
    return float(np.max(np.divide(loads, able, out=np.zeros_like(loads), where=able > 0), initial=0.0))


def _loads(fleet: Fleet, present: Present) -> Floats:
    """The work that each replica is asked for if requests follow the shares."""
    loads = np.zeros(len(fleet.replicas))
    for group, asked in zip(present.groups, _by_group(present, fleet.work).tolist(), strict=True):
        for place, share, _ in group:
            loads[place] += share * asked
    return loads


def fits(fleet: Fleet, present: Present) -> bool:
    """Whether every replica has room for what it is to hold and admits its ranks."""
    rank = np.zeros(len(present.groups), dtype=np.int64)
    placed = present.of_adapter >= 0
    np.maximum.at(rank, present.of_adapter[placed], fleet.rank[placed])
    for group, highest in zip(present.groups, rank.tolist(), strict=True):
        for place, _, _ in group:
            if highest > fleet.replicas[place].max_lora_rank:
                return False
    bytes_, places = _rooms(fleet, present)
    return bool(np.all(bytes_ >= 0) and np.all(places >= 0))


def has_room_for_seconds(fleet: Fleet, present: Present) -> bool:
    """Whether some adapter has a single copy though another replica has room for it, ranks aside."""
    single = np.array([group[0][0] if len(group) == 1 else -1 for group in present.groups] or [-1])
    own = np.where(present.of_adapter >= 0, single[present.of_adapter], -1)
    alone = np.flatnonzero(own >= 0)
    bytes_, places = _rooms(fleet, present)
    bytes_ = np.where(places >= 1, bytes_, -1.0)
    size = fleet.size_bytes[alone]
    rooms = len(bytes_) - np.searchsorted(np.sort(bytes_), size) - (bytes_[own[alone]] >= size)
    return bool(np.any(rooms > 0))


def _rooms(fleet: Fleet, present: Present) -> tuple[Floats, Floats]:
    """The bytes and places that are left on each replica."""
    size, number = _by_group(present, fleet.size_bytes), _by_group(present, np.ones(len(fleet.ids)))
    bytes_ = np.array([float(spec.pool_bytes) for spec in fleet.replicas])
    places = np.array([float(spec.pool_adapters) for spec in fleet.replicas])
    for group, own_bytes, own_places in zip(present.groups, size.tolist(), number.tolist(), strict=True):
        for place, _, _ in group:
            bytes_[place] -= own_bytes
            places[place] -= own_places
    return bytes_, places


def bytes_by_level(fleet: Fleet, present: Present) -> Floats:
    """Bytes of each level's adapters (column) that each replica (row) holds."""
    levels = fleet.num_levels
    placed = present.of_adapter >= 0
    key = present.of_adapter[placed] * levels + fleet.level[placed]
    sums = np.bincount(key, weights=fleet.size_bytes[placed], minlength=len(present.groups) * levels)
    by_group = sums.reshape(len(present.groups), levels)
    held = np.zeros((len(fleet.replicas), levels))
    for group, row in zip(present.groups, by_group, strict=True):
        for place, _, _ in group:
            held[place] += row
    return held
