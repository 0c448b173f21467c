"""LoRAServe's steps as pure functions: budgets of replicas per rank, and packing a rank into its budget.

From LoRAServe (arXiv 2511.22880) by its public artifact. Utilisation is tokens/s over the operating point
of the adapter's own rank on that replica, as there. The paper has equal replicas and no memory: here a
replica that cannot take an adapter is passed over, and operating points are the replica's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from placement.policies.base import Room
from placement.types import AdapterVersion, VersionId

REST = 1e-4
"""The utilisation (one replica's operating point is 1) below which a rest of an adapter or of a replica is
not worth splitting for."""


class Ask(NamedTuple):
    """An adapter, its tokens per second, and those of them that are still to be placed."""

    adapter: AdapterVersion
    tokens_per_s: float
    left: float


@dataclass(slots=True)
class Bin:
    """One replica while it is packed: `capacity` are its operating points by rank, `tokens_per_s` what it
    was given of each adapter."""

    room: Room
    capacity: Mapping[int, float]
    util: float = 0.0
    max_rank: int = 0
    tokens_per_s: dict[VersionId, float] = field(default_factory=dict)
    sizes: dict[VersionId, int] = field(default_factory=dict)

    def takes(self, adapter: AdapterVersion) -> bool:
        """Whether it holds the adapter already or has room for it."""
        return adapter.version_id in self.tokens_per_s or self.room.fits(adapter)

    def put(self, adapter: AdapterVersion, tokens_per_s: float) -> None:
        """Serve these tokens/s of the adapter, which it must take."""
        version = adapter.version_id
        if version not in self.tokens_per_s:
            self.room.put(adapter)
            self.tokens_per_s[version] = 0.0
            self.sizes[version] = adapter.size_bytes
        self.tokens_per_s[version] += tokens_per_s
        self.util += tokens_per_s / self.capacity[adapter.rank]
        self.max_rank = max(self.max_rank, adapter.rank)

    def drop(self, version: VersionId) -> None:
        """Hold the adapter no longer; its utilisation and rank stay counted."""
        del self.tokens_per_s[version]
        self.room.held.remove(version)
        self.room.free_adapters += 1
        self.room.free_bytes += self.sizes.pop(version)


def budgets(rank_utils: Mapping[int, float], num_replicas: int) -> dict[int, int]:
    """ROUND: how many replicas each rank gets, `num_replicas` in all, in proportion to its utilisation.

    By largest remainder (Hamilton), where the artifact rounds to nearest and then corrects; of equal
    remainders the higher rank's goes first. A rank that gets none is left over for the replicas of others.
    """
    total = sum(rank_utils.values())
    quotas = {rank: util / total * num_replicas for rank, util in rank_utils.items()}
    seats = {rank: int(quota) for rank, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda rank: (int(quotas[rank]) - quotas[rank], -rank))
    for rank in by_remainder[: num_replicas - sum(seats.values())]:
        seats[rank] += 1
    return seats


def pack_rank(asks: Sequence[Ask], bins: Sequence[Bin], target: float, capacity: float) -> list[Ask]:
    """FRACTIONALBINPACKING of one rank: adapters by tokens/s, the most first, fill the replicas one after
    the other to the target utilisation, split where one is full. Returns what is left over.

    `capacity` is what a replica sustains of this rank, in the mean.
    """
    leftovers: list[Ask] = []
    smallest = min((ask.adapter.size_bytes for ask in asks), default=0)
    begin = 0
    for adapter, wanted, left in sorted(asks, key=most_first):
        for place in range(begin, len(bins)):
            if left <= REST * capacity:
                break
            one = bins[place]
            util = target - one.util
            if util < REST or one.room.free_adapters == 0 or one.room.free_bytes < smallest:
                begin += place == begin
            elif one.room.fits(adapter):
                part = min(left, util * one.capacity[adapter.rank])
                one.put(adapter, part)
                left -= part
        if left == wanted or left > REST * capacity:
            leftovers.append(Ask(adapter, wanted, left))
    return leftovers


def most_first(ask: Ask) -> tuple[float, VersionId]:
    """The order by tokens/s, descending."""
    return -ask.tokens_per_s, ask.adapter.version_id
