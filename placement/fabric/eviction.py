"""Which cached adapters go when room is needed: those that cost least to do without."""

from collections.abc import Iterable
from dataclasses import dataclass

from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedVersion:
    """An adapter version in a replica's memory.

    `idle_s`: since it was last let go of. `fetch_bytes_per_s`: what getting it back would run at.
    `demand_tokens_per_s`: what this replica is expected to be asked for, None if nobody knows. `is_last`: it
    is kept nowhere else.
    """

    version_id: VersionId
    size_bytes: int
    rank: int
    idle_s: float
    fetch_bytes_per_s: float
    demand_tokens_per_s: float | None = None
    is_pinned: bool = False
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionCosts:
    """What a fetch costs beside its bytes, and what makes a request of tokens and of idle time."""

    fetch_s: float = 0.005
    """Asking for a segment and its head, whatever its size."""

    prepare_s_per_rank: float = 0.0005
    """Preparing the matrices in the engine, which grows with the rank."""

    tokens_per_request: float = 500.0
    recent_s: float = 10.0
    """An adapter that was let go of just now is taken to be wanted once in so many seconds; one that has been
    idle for t seconds once in so many more."""


DEFAULT_COSTS = EvictionCosts()


def eviction_cost_s(one: CachedVersion, costs: EvictionCosts = DEFAULT_COSTS) -> float:
    """Seconds of waiting per second that evicting this version is expected to cost: how long a fetch and
    its preparation take, times how often it is likely to be wanted."""
    back_s = costs.fetch_s + one.size_bytes / one.fetch_bytes_per_s + costs.prepare_s_per_rank * one.rank
    wanted_per_s = 1 / (costs.recent_s + one.idle_s)
    if one.demand_tokens_per_s is not None:
        wanted_per_s += one.demand_tokens_per_s / costs.tokens_per_request
    return back_s * wanted_per_s


def choose_evicted(
    cached: Iterable[CachedVersion], *, needed_bytes: int, costs: EvictionCosts = DEFAULT_COSTS
) -> tuple[VersionId, ...] | None:
    """The versions to evict so that at least `needed_bytes` come free, None if that cannot be.

    Never a pinned or last one; none that could be left out. Costs at most twice the cheapest choice there
    is: greedy by cost per byte, each version that would complete the choice tried as its last (Csirik et al.,
    "Heuristics for the 0-1 min-knapsack problem", 1991). The order in which they are given makes no
    difference.
    """
    if needed_bytes <= 0:
        return ()
    free = [one for one in cached if not one.is_pinned and not one.is_last and one.size_bytes > 0]
    cost_of = {one.version_id: eviction_cost_s(one, costs) for one in free}
    free.sort(key=lambda one: (cost_of[one.version_id] / one.size_bytes, one.version_id))
    kept: list[CachedVersion] = []
    kept_bytes, kept_cost = 0, 0.0
    best: tuple[float, int, CachedVersion] | None = None
    for one in free:
        cost = cost_of[one.version_id]
        if kept_bytes + one.size_bytes < needed_bytes:
            kept.append(one)
            kept_bytes += one.size_bytes
            kept_cost += cost
        elif best is None or kept_cost + cost < best[0]:
            best = (kept_cost + cost, len(kept), one)
    if best is None:
        return None
    _, num_kept, last = best
    chosen = [*kept[:num_kept], last]
    return _without_needless(chosen, needed_bytes)


def _without_needless(chosen: list[CachedVersion], needed_bytes: int) -> tuple[VersionId, ...]:
    """The choice without those that the others make up for, the dearest first."""
    spare_bytes = sum(one.size_bytes for one in chosen) - needed_bytes
    needed: list[VersionId] = []
    for one in reversed(chosen):
        if one.size_bytes <= spare_bytes:
            spare_bytes -= one.size_bytes
        else:
            needed.append(one.version_id)
    return tuple(reversed(needed))
