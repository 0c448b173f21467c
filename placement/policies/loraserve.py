"""`loraserve`: the placement of LoRAServe (arXiv 2511.22880) as its public artifact computes it.

Replicas are divided among ranks in proportion to their demand over the operating point of the rank; each
rank's adapters are packed into its replicas, split where one is full; the rest goes where it raises no
replica's highest rank; the result is relabelled to move little. Shares are the split's. The artifact's
demand is at least `MIN_TOKENS_PER_S` per adapter, so its adapters without demand have a place among their
rank too; a target utilisation above 1 makes every replica overloaded alike, where the artifact gave up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from placement.capacity import tokens_per_s
from placement.policies.base import Room, equal_shares
from placement.policies.contiguous import by_reach, deal_by_rank
from placement.policies.loraserve_leftovers import Leftovers, instead_of_second_copies
from placement.policies.loraserve_packing import Ask, Bin, budgets, pack_rank
from placement.policies.permutation import permuted
from placement.types import AdapterVersion, Holder, Placement, ReplicaId, Snapshot, VersionId

MIN_TOKENS_PER_S = 1.0
"""What an adapter is taken to need at least, as in the artifact's forecast."""


@dataclass(frozen=True, slots=True)
class LoraServe:
    """Replicas by rank, adapters split over them by demand; see the module."""

    name: str = "loraserve"

    def plan(self, snapshot: Snapshot) -> Placement:
        """The packing by demand; contiguous by rank before any demand is known."""
        demand = snapshot.demand_tokens_per_s
        if any(demand.get(adapter.version_id, 0.0) > 0 for adapter in snapshot.adapters):
            plan = _shares(packed(snapshot), snapshot.adapters)
        else:
            rooms = deal_by_rank(snapshot.adapters, snapshot.replicas)
            plan = equal_shares(rooms.values(), snapshot.adapters)
        return permuted(plan, snapshot)


def packed(snapshot: Snapshot) -> list[Bin]:
    """The replicas as the algorithm fills them, before any is relabelled."""
    bins = _bins(snapshot)
    asks = _asks(snapshot)
    capacity = {rank: _mean_capacity(bins, rank) for rank in asks}
    utils = {
        rank: sum(ask.tokens_per_s for ask in asks[rank]) / capacity[rank] for rank in asks if capacity[rank]
    }
    if not utils:
        return bins
    target = sum(utils.values()) / len(bins)
    seats = budgets(utils, len(bins))
    leftovers: list[Ask] = []
    begin = 0
    for rank in sorted(seats):
        own = bins[begin : begin + seats[rank]]
        leftovers += pack_rank(asks[rank], own, target, capacity[rank])
        begin += seats[rank]
    homeless = Leftovers(bins, target, capacity).place(leftovers)
    instead_of_second_copies(homeless, bins)
    return bins


def _asks(snapshot: Snapshot) -> dict[int, list[Ask]]:
    """What is asked for by rank, in an order that is always the same, as sums of floats depend on it."""
    demand = snapshot.demand_tokens_per_s
    asks: dict[int, list[Ask]] = {}
    for adapter in sorted(snapshot.adapters, key=lambda adapter: (adapter.rank, adapter.version_id)):
        wanted = max(MIN_TOKENS_PER_S, demand.get(adapter.version_id, 0.0))
        asks.setdefault(adapter.rank, []).append(Ask(adapter, wanted, wanted))
    return asks


def _bins(snapshot: Snapshot) -> list[Bin]:
    """The empty replicas, the ones that admit the highest ranks last."""
    ranks = sorted({adapter.rank for adapter in snapshot.adapters})
    rooms = Room.of(snapshot.replicas)
    capacities: dict[tuple[str, int], Mapping[int, float]] = {}
    bins: list[Bin] = []
    for spec in by_reach(snapshot.replicas):
        kind = (spec.profile, spec.max_lora_rank)
        if kind not in capacities:
            capacities[kind] = {rank: tokens_per_s(snapshot.profiles, spec, rank, rank) for rank in ranks}
        bins.append(Bin(room=rooms[spec.replica_id], capacity=capacities[kind]))
    return bins


def _mean_capacity(bins: Sequence[Bin], rank: int) -> float:
    """A replica's operating point for the rank, the mean of those that admit it; 0 if none does."""
    admitting = [one.capacity[rank] for one in bins if one.room.spec.max_lora_rank >= rank]
    return sum(admitting) / len(admitting) if admitting else 0.0


def _shares(bins: Sequence[Bin], adapters: Sequence[AdapterVersion]) -> Placement:
    """Each holder's part of the tokens that were placed; equal ones where there are none."""
    parts: dict[VersionId, list[tuple[ReplicaId, float]]] = {}
    for one in bins:
        for version, part in one.tokens_per_s.items():
            parts.setdefault(version, []).append((one.room.spec.replica_id, part))
    placed: dict[VersionId, tuple[Holder, ...]] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.version_id):
        holders = sorted(parts.get(adapter.version_id, ()))
        total = sum(part for _, part in holders)
        if holders:
            placed[adapter.version_id] = tuple(
                Holder(replica_id=replica, share=part / total if total > 0 else 1.0 / len(holders))
                for replica, part in holders
            )
    return Placement(MappingProxyType(placed))
