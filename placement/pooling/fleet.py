"""A snapshot as arrays: adapters by id, the replicas that stay by id and by kind, and the levels of rank.

A level is a run of ranks that cost alike on every kind of replica and are admitted by the same kinds; only
levels can make tiers. What a token costs is taken apart into what its rank does (`work`) and what the
replica's tier does (`capacity`), which is exact unless kinds with different kernels are mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from placement.capacity import kernel_of, tokens_per_s
from placement.latency import RankKernel
from placement.types import AdapterVersion, ReplicaSpec, Snapshot, VersionId

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAME_COST = 1.03
"""Ranks whose capacities differ by less than this factor share a level: parting them would win less than
choosing among more replicas does."""

MAX_HEADROOM = 2.0
"""A tighter TTFT target than the profile's counts an adapter's demand at most so many times."""

_NO_DEMAND = 1e-100
"""Tokens/s so few that sums over them are no numbers to compute with."""

DEMAND_FLOOR = 1e-3
"""The least demand that is planned for, as a fraction of the mean: cold adapters spread as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What a plan is made of; adapters without an eligible replica are left out.

    `work` is what an adapter asks for per second, in the units of `capacity[kind, level]`: what one
    replica of a kind gives per second if its highest rank is of that level, 0 where it must not be.
    """

    ids: tuple[VersionId, ...]
    rank: Ints
    size_bytes: Floats
    work: Floats
    level: Ints
    replicas: tuple[ReplicaSpec, ...]
    kind: Ints
    kinds: tuple[ReplicaSpec, ...]
    capacity: Floats

    @property
    def num_levels(self) -> int:
        """How many levels there are, the lowest rank's first."""
        return int(self.capacity.shape[1])

    def totals(self, of_adapters: Floats | None = None) -> Floats:
        """The sum over each level's adapters; without an argument, their number."""
        return np.bincount(self.level, weights=of_adapters, minlength=self.num_levels).astype(np.float64)


def fleet_of(snapshot: Snapshot) -> Fleet:
    """The arrays of a snapshot, the same whatever the order of its tuples.

    Without any demand every adapter counts alike.
    """
    known = sorted(snapshot.adapters, key=attrgetter("version_id"))
    rank = np.array([adapter.rank for adapter in known], dtype=np.int64)
    size_bytes = np.array([adapter.size_bytes for adapter in known], dtype=np.int64)
    kinds, kind = _kinds(snapshot.replicas)
    admitted = [_admitted(spec, rank, size_bytes) for spec in kinds]
    of_use = np.array([bool(able.any()) for able in admitted], dtype=bool)
    replicas = sorted(
        (spec for spec, own in zip(snapshot.replicas, kind.tolist(), strict=True) if bool(of_use[own])),
        key=attrgetter("replica_id"),
    )
    kinds, kind = _kinds(replicas)
    eligible = np.any(admitted, axis=0) if admitted else np.zeros(len(known), dtype=bool)
    adapters = known if eligible.all() else list(compress(known, eligible.tolist()))
    rank, size_bytes = rank[eligible], size_bytes[eligible]
    ranks = np.unique(rank).tolist()
    by_rank, factor = _capacities(snapshot, kinds, ranks)
    level_of, tops = _levels(by_rank)
    at = np.searchsorted(np.array(ranks, dtype=np.int64), rank)
    return Fleet(
        ids=tuple([adapter.version_id for adapter in adapters]),
        rank=rank,
        size_bytes=size_bytes.astype(np.float64),
        work=_demand(snapshot, adapters) * factor[at] if ranks else np.zeros(0),
        level=level_of[at] if ranks else np.zeros(0, dtype=np.int64),
        replicas=tuple(replicas),
        kind=kind,
        kinds=tuple(kinds),
        capacity=by_rank[:, tops],
    )


def _kinds(replicas: Sequence[ReplicaSpec]) -> tuple[list[ReplicaSpec], Ints]:
    found: dict[tuple[str, int, int, int], int] = {}
    kinds: list[ReplicaSpec] = []
    kind = np.zeros(len(replicas), dtype=np.int64)
    for place, spec in enumerate(replicas):
        key = spec.kind
        if key not in found:
            found[key] = len(kinds)
            kinds.append(spec)
        kind[place] = found[key]
    return kinds, kind


def _admitted(spec: ReplicaSpec, rank: Ints, size_bytes: Ints) -> NDArray[np.bool_]:
    """Which adapters the replica admits, see `ReplicaSpec.admits`."""
    return (rank <= spec.max_lora_rank) & (size_bytes <= spec.pool_bytes) & (spec.pool_adapters > 0)


def _demand(snapshot: Snapshot, adapters: Sequence[AdapterVersion]) -> Floats:
    """Tokens/s by adapter, weighted, with headroom for tight targets, and none quite zero."""
    forecast, weights = snapshot.demand_tokens_per_s, snapshot.weights
    demand = np.array([forecast.get(adapter.version_id, 0.0) for adapter in adapters], dtype=np.float64)
    demand = np.where(np.isfinite(demand) & (demand > 0), demand, 0.0)
    if weights or snapshot.slos:
        demand *= np.array([_counts_for(snapshot, adapter.version_id) for adapter in adapters])
    mean = float(demand.mean()) if len(demand) else 0.0
    return np.maximum(demand, DEMAND_FLOOR * mean) if mean > _NO_DEMAND else np.ones(len(adapters))


def _counts_for(snapshot: Snapshot, version: VersionId) -> float:
    factor = max(0.0, snapshot.weights.get(version, 1.0))
    slo = snapshot.slos.get(version)
    usual = [profile.slo.ttft_ms for profile in snapshot.profiles.values() if profile.slo is not None]
    if slo is None or not usual:
        return factor
    return factor * min(MAX_HEADROOM, max(1.0, max(usual) / slo.ttft_ms))


def _capacities(
    snapshot: Snapshot, kinds: Sequence[ReplicaSpec], ranks: Sequence[int]
) -> tuple[Floats, Floats]:
    """Capacity by kind and highest rank, and how much work a token of each rank is."""
    profiles = snapshot.profiles
    summing = [kernel_of(profiles.get(spec.profile)) is RankKernel.SUM for spec in kinds]
    factor = np.ones(len(ranks))
    if kinds and all(summing):
        costs = [[1 / tokens_per_s(profiles, spec, rank, rank) for rank in ranks] for spec in kinds]
        factor = np.array(costs, dtype=np.float64).mean(axis=0) * 1000
    by_rank = np.zeros((len(kinds), len(ranks)))
    for row, spec in enumerate(kinds):
        fits = [place for place, rank in enumerate(ranks) if rank <= spec.max_lora_rank]
        if summing[row] and fits:
            own = [tokens_per_s(profiles, spec, ranks[place], ranks[place]) for place in fits]
            by_rank[row, fits] = float(np.mean(np.array(own) * factor[fits]))
            continue
        for place in fits:
            by_rank[row, place] = tokens_per_s(profiles, spec, ranks[place], ranks[place])
    # No rank is served faster where a higher one is the highest; measurements may say otherwise by noise.
    for place in range(len(ranks) - 2, -1, -1):
        by_rank[:, place] = np.maximum(by_rank[:, place], by_rank[:, place + 1])
    return by_rank, factor


def _levels(by_rank: Floats) -> tuple[Ints, list[int]]:
    """The level of each rank, and the place of each level's highest rank."""
    num = by_rank.shape[1]
    tops: list[int] = []
    for place in range(num - 1, -1, -1):
        if not tops or not _alike(by_rank[:, place], by_rank[:, tops[-1]]):
            tops.append(place)
    tops.reverse()
    return np.searchsorted(np.array(tops, dtype=np.int64), np.arange(num)).astype(np.int64), tops


def _alike(low: Floats, high: Floats) -> bool:
    return bool(np.all((low > 0) == (high > 0)) and np.all(low <= high * SAME_COST))


def usable_bytes(fleet: Fleet) -> Floats:
    """By kind and level, how much of a replica's room the level's largest adapters can fill."""
    largest = np.zeros(fleet.num_levels)
    np.maximum.at(largest, fleet.level, fleet.size_bytes)
    pool = np.array([float(spec.pool_bytes) for spec in fleet.kinds])[:, None]
    number = np.floor(pool / np.maximum(largest, 1.0))
    return np.where(number > 0, number * np.maximum(largest, 1.0), pool)
