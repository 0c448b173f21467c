"""Giving a plan's parts to those replicas that hold most of them already, so that little moves.

LoRAServe's PERMUTEASSIGNMENT as it was meant: its artifact finds a relabelling and never applies it. Owns
no plan; any policy whose plan says nothing of which of two equal replicas is which may end with it.
"""

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from placement.types import Holder, Placement, ReplicaId, ReplicaSpec, Snapshot, VersionId

MAX_EXACT = 1024
"""Up to how many replicas of a kind the best assignment is found (0.04 s); above it, greedily."""

_SHARE_WEIGHT = 1e-3
"""What an equal share counts beside equal bytes: it decides between replicas that hold the same."""

_Contents = dict[ReplicaId, dict[VersionId, float]]


def permuted(plan: Placement, snapshot: Snapshot) -> Placement:
    """The plan with its replicas exchanged for equal ones so that the most bytes stay where they are in
    `snapshot.current`.

    Equal are replicas with the same limits and the same profile. The best assignment (Hungarian method) up
    to `MAX_EXACT` of them, above it the largest overlap first. A plan that is a permutation of the current
    one becomes the current one.
    """
    specs = {spec.replica_id: spec for spec in snapshot.replicas}
    old = _contents(snapshot.current, plan, specs)
    if not any(old.values()):
        return plan
    new = _contents(plan, plan, specs)
    names = _twins(new, old, specs)
    sizes = {adapter.version_id: max(1, adapter.size_bytes) for adapter in snapshot.adapters}
    kinds: dict[Hashable, list[ReplicaId]] = {}
    for replica in sorted(specs.keys() - names.keys()):
        kinds.setdefault(specs[replica].kind, []).append(replica)
    taken = set(names.values())
    for kind, rows in kinds.items():
        columns = [one for one in sorted(specs) if specs[one].kind == kind and one not in taken]
        overlaps = _overlaps(rows, columns, new, old, sizes)
        assign = _best if len(rows) <= MAX_EXACT else _greedy
        names.update(assign(rows, columns, overlaps))
    return _renamed(plan, names)


def _contents(of: Placement, plan: Placement, specs: Mapping[ReplicaId, ReplicaSpec]) -> _Contents:
    """The copies and their shares by replica, of the versions that the plan has."""
    contents: _Contents = {replica: {} for replica in specs}
    for version in plan.holders:
        for holder in of.holders.get(version, ()):
            if holder.replica_id in contents:
                contents[holder.replica_id][version] = holder.share
    return contents


def _twins(
    new: _Contents, old: _Contents, specs: Mapping[ReplicaId, ReplicaSpec]
) -> dict[ReplicaId, ReplicaId]:
    """The parts that a replica of their kind has to the letter; no assignment can do better for both."""
    names = {replica: replica for replica in sorted(specs) if new[replica] == old[replica]}
    rest = sorted(specs.keys() - names.keys())
    waiting: dict[Hashable, list[ReplicaId]] = {}
    for replica in reversed(rest):
        waiting.setdefault((specs[replica].kind, frozenset(old[replica].items())), []).append(replica)
    for replica in rest:
        if found := waiting.get((specs[replica].kind, frozenset(new[replica].items()))):
            names[replica] = found.pop()
    return names


def _overlaps(
    rows: Sequence[ReplicaId],
    columns: Sequence[ReplicaId],
    new: _Contents,
    old: _Contents,
    sizes: Mapping[VersionId, int],
) -> dict[tuple[int, int], float]:
    holders: dict[VersionId, list[tuple[int, float]]] = {}
    for column, replica in enumerate(columns):
        for version, share in old[replica].items():
            holders.setdefault(version, []).append((column, share))
    overlaps: dict[tuple[int, int], float] = {}
    for row, replica in enumerate(rows):
        for version, share in new[replica].items():
            for column, before in holders.get(version, ()):
                weight = sizes[version] * (1.0 + _SHARE_WEIGHT * min(share, before))
                overlaps[row, column] = overlaps.get((row, column), 0.0) + weight
    return overlaps


def _best(
    rows: Sequence[ReplicaId], columns: Sequence[ReplicaId], overlaps: Mapping[tuple[int, int], float]
) -> dict[ReplicaId, ReplicaId]:
    if len(rows) <= 1 or not overlaps:
        return dict(zip(rows, columns, strict=True))
    from scipy.optimize import linear_sum_assignment

    kept = np.zeros((len(rows), len(columns)))
    for place, weight in overlaps.items():
        kept[place] = weight
    _, chosen = linear_sum_assignment(kept, maximize=True)
    return {replica: columns[int(column)] for replica, column in zip(rows, chosen, strict=True)}


def _greedy(
    rows: Sequence[ReplicaId], columns: Sequence[ReplicaId], overlaps: Mapping[tuple[int, int], float]
) -> dict[ReplicaId, ReplicaId]:
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    for row, column in sorted(overlaps, key=lambda place: (-overlaps[place], place)):
        if row not in chosen and column not in taken:
            chosen[row] = column
            taken.add(column)
    free = iter([column for column in range(len(columns)) if column not in taken])
    return {
        replica: columns[chosen[row] if row in chosen else next(free)] for row, replica in enumerate(rows)
    }


def _renamed(plan: Placement, names: Mapping[ReplicaId, ReplicaId]) -> Placement:
    holders: dict[VersionId, tuple[Holder, ...]] = {}
    for version, before in plan.holders.items():
        renamed = [
            Holder(replica_id=names[holder.replica_id], share=holder.share, spill=holder.spill)
            for holder in before
        ]
        holders[version] = tuple(sorted(renamed, key=lambda holder: holder.replica_id))
    ranks = {names[replica]: rank for replica, rank in plan.max_lora_ranks.items()}
    return Placement(MappingProxyType(holders), MappingProxyType(ranks))
