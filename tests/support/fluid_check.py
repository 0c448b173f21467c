"""An independent judge of placements: the smallest fluid utilisation of any tiers, and a plan's own.

Shares no code with `placement` but its values. A fluid allocation may split an adapter's demand and bytes
at will among the replicas of its tier and of higher ones. Up to `EXHAUSTIVE` replicas every division of them
into tiers is tried; above, replicas may be divided too, a linear program for a given utilisation.

Replicas have profiles of the kernels `padded_batch` and `padded_config`, whose operating points name every
rank that there is, or `sum`, if all have the same one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.latency import RankKernel
from placement.profile import Profile
from placement.types import Placement, ReplicaSpec, Snapshot

EXHAUSTIVE = 16
_CHUNK = 1 << 15

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Problem:
    """Work, bytes and copies by rank, lowest first; replicas by kind; capacity by kind and tier's rank."""

    work: Floats
    size_bytes: Floats
    copies: Floats
    number: tuple[int, ...]
    pool_bytes: Floats
    pool_adapters: Floats
    capacity: Floats


def smallest_utilisation(snapshot: Snapshot) -> float:
    """The smallest that the highest utilisation can be, memory included; infinite if nothing fits."""
    problem = _problem(snapshot)
    if not problem.work.sum():
        return 0.0
    if sum(problem.number) <= EXHAUSTIVE:
        return _exhaustive(problem)
    return _relaxed(problem)


def plan_utilisation(snapshot: Snapshot, placement: Placement) -> float:
    """The highest utilisation of a replica if requests follow the plan's shares: what it is asked for over
    what it sustains with the highest rank that it serves."""
    rank_of = {adapter.version_id: adapter.rank for adapter in snapshot.adapters}
    served: dict[str, list[tuple[int, float]]] = {}
    for version, holders in placement.holders.items():
        demand = snapshot.demand_tokens_per_s.get(version, 0.0)
        for holder in holders:
            if holder.share > 0:
                served.setdefault(holder.replica_id, []).append((rank_of[version], holder.share * demand))
    used = [0.0]
    for spec in snapshot.replicas:
        asked = served.get(spec.replica_id, [])
        highest = max((rank for rank, _ in asked), default=0)
        used.append(sum(demand / _sustained(snapshot, spec, rank, highest) for rank, demand in asked))
    missing = [
        version
        for version, demand in snapshot.demand_tokens_per_s.items()
        if demand > 0 and version in rank_of and version not in placement.holders
    ]
    return float("inf") if missing else max(used)


def _sustained(snapshot: Snapshot, spec: ReplicaSpec, rank: int, highest: int) -> float:
    profile = snapshot.profiles[spec.profile]
    points = {point.rank: point.tokens_per_s for point in profile.operating_points}
    match _kernel(profile):
        case RankKernel.SUM:
            return points[rank]
        case RankKernel.PADDED_CONFIG:
            return points[spec.max_lora_rank]
        case _:
            return points[highest]


def _kernel(profile: Profile) -> RankKernel:
    if profile.latency is None:
        raise ValueError("a profile without a latency model has no kernel to check")
    return profile.latency.kernel


def _problem(snapshot: Snapshot) -> _Problem:
    ranks = sorted({adapter.rank for adapter in snapshot.adapters})
    at = {rank: place for place, rank in enumerate(ranks)}
    work, size, copies = np.zeros(len(ranks)), np.zeros(len(ranks)), np.zeros(len(ranks))
    kinds: dict[tuple[str, int, int, int], list[ReplicaSpec]] = {}
    for spec in snapshot.replicas:
        key = (spec.profile, spec.max_lora_rank, spec.pool_bytes, spec.pool_adapters)
        kinds.setdefault(key, []).append(spec)
    own = [specs[0] for specs in kinds.values()]
    sums = {_kernel(snapshot.profiles[spec.profile]) is RankKernel.SUM for spec in own}
    if sums == {True, False}:
        raise ValueError("kernels that charge each rank and kernels that do not cannot be checked together")
    capacity = np.zeros((len(own), len(ranks)))
    for row, spec in enumerate(own):
        for place, rank in enumerate(ranks):
            if rank <= spec.max_lora_rank:
                capacity[row, place] = 1.0 if True in sums else _sustained(snapshot, spec, rank, rank)
    for adapter in snapshot.adapters:
        demand = snapshot.demand_tokens_per_s.get(adapter.version_id, 0.0)
        each = _sustained(snapshot, own[0], adapter.rank, adapter.rank) if True in sums else 1.0
        work[at[adapter.rank]] += demand / each
        size[at[adapter.rank]] += adapter.size_bytes
        copies[at[adapter.rank]] += 1
    return _Problem(
        work,
        size,
        copies,
        tuple(len(specs) for specs in kinds.values()),
        np.array([float(spec.pool_bytes) for spec in own]),
        np.array([float(spec.pool_adapters) for spec in own]),
        capacity,
    )


def _exhaustive(problem: _Problem) -> float:
    """Tiers are nested: an allocation exists if none and those above it are asked for more than they have."""
    best = float("inf")
    work, size, copies = (_above(one) for one in (problem.work, problem.size_bytes, problem.copies))
    divisions = itertools.product(
        *(
            list(_divided(number, row > 0))
            for number, row in zip(problem.number, problem.capacity, strict=True)
        )
    )
    while chunk := list(itertools.islice(divisions, _CHUNK)):
        counts = np.array(chunk, dtype=np.float64)
        given = _above((counts * problem.capacity).sum(axis=1))
        bytes_ = _above(np.einsum("dkt,k->dt", counts, problem.pool_bytes))
        places = _above(np.einsum("dkt,k->dt", counts, problem.pool_adapters))
        able = np.all((bytes_ >= size) & (places >= copies), axis=1)
        used = np.divide(
            work, given, out=np.where(work > 0, np.inf, 0.0) * np.ones_like(given), where=given > 0
        )
        best = min(best, float(np.min(np.where(able, used.max(axis=1), np.inf))))
    return best


def _above(values: Floats) -> Floats:
    sums: Floats = np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
    return sums


def _divided(number: int, allowed: NDArray[np.bool_]) -> Iterator[tuple[int, ...]]:
    """Every way to divide so many replicas among the tiers that are allowed."""
    tiers = np.flatnonzero(allowed).tolist()
    if not tiers:
        yield (0,) * len(allowed)
        return
    for bars in itertools.combinations(range(number + len(tiers) - 1), len(tiers) - 1):
        edges = (-1, *bars, number + len(tiers) - 1)
        counts = [0] * len(allowed)
        for place, tier in enumerate(tiers):
            counts[tier] = edges[place + 1] - edges[place] - 1
        yield tuple(counts)


def _relaxed(problem: _Problem) -> float:
    """By bisection, with tiers of any fraction of replicas."""
    low, high = 0.0, float(problem.work.sum())
    high /= float(min(problem.capacity[problem.capacity > 0]))
    if not _feasible(problem, high * 1.01):
        return float("inf")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _feasible(problem, middle) else (middle, high)
    return high


def _feasible(problem: _Problem, utilisation: float) -> bool:
    """Replicas of each kind in each tier, such that every rank and those above have capacity and memory."""
    from scipy.optimize import linprog

    kinds, tiers = problem.capacity.shape
    rows: list[Any] = []
    limits: list[float] = []
    for tier in range(tiers):
        for each, needed in (
            (problem.capacity * utilisation, problem.work),
            (np.repeat(problem.pool_bytes[:, None], tiers, axis=1), problem.size_bytes),
            (np.repeat(problem.pool_adapters[:, None], tiers, axis=1), problem.copies),
        ):
            scale = max(float(needed.sum()), 1e-300)
            row = np.zeros((kinds, tiers))
            row[:, tier:] = -each[:, tier:] / scale
            rows.append(row.ravel())
            limits.append(-float(needed[tier:].sum()) / scale)
    ones = np.zeros((kinds, kinds * tiers))
    for kind in range(kinds):
        ones[kind, kind * tiers : (kind + 1) * tiers] = 1.0
    bounds: list[tuple[float, float | None]] = [
        (0.0, 0.0 if able <= 0 else None) for able in problem.capacity.ravel().tolist()
    ]
    bounds += [(0.0, None)] * kinds
    solved = linprog(
        np.zeros(kinds * tiers + kinds),
        A_ub=np.hstack((np.array(rows), np.zeros((len(rows), kinds)))),
        b_ub=np.array(limits),
        A_eq=np.hstack((ones, np.eye(kinds))),
        b_eq=np.array(problem.number, dtype=np.float64),
        bounds=bounds,
        method="highs",
    )
    return bool(solved.status == 0)
