"""What a placement policy is, and the room-keeping that policies share."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from placement.types import AdapterVersion, Holder, Placement, ReplicaId, ReplicaSpec, Snapshot, VersionId


class PlacementPolicy(Protocol):
    """Decides which replicas hold which adapters.

    Guarantees, for every policy: pure, the same plan for the same snapshot whatever the order of its
    tuples, memory, numbers of adapters and ranks respected, shares of one adapter sum to one. An adapter
    that no replica has room for is left out of the placement rather than squeezed in.
    """

    @property
    def name(self) -> str:
        """The name it is registered under."""
        ...

    def plan(self, snapshot: Snapshot) -> Placement:
        """The placement for the next epoch."""
        ...


@dataclass(slots=True)
class Room:
    """What is left of one replica while a plan is being made."""

    spec: ReplicaSpec
    free_adapters: int
    free_bytes: int
    held: set[VersionId] = field(default_factory=set)

    @staticmethod
    def of(replicas: Iterable[ReplicaSpec]) -> "dict[ReplicaId, Room]":
        """Empty rooms for these replicas, in the order of their ids."""
        return {
            spec.replica_id: Room(spec=spec, free_adapters=spec.pool_adapters, free_bytes=spec.pool_bytes)
            for spec in sorted(replicas, key=lambda spec: spec.replica_id)
        }

    def fits(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter may live here beside what is already here."""
        return (
            adapter.version_id not in self.held
            and self.spec.admits(adapter)
            and self.free_adapters > 0
            and self.free_bytes >= adapter.size_bytes
        )

    def put(self, adapter: AdapterVersion) -> None:
        """Take the adapter in; it must fit."""
        if not self.fits(adapter):
            raise ValueError(f"{adapter.version_id} does not fit on {self.spec.replica_id}")
        self.held.add(adapter.version_id)
        self.free_adapters -= 1
        self.free_bytes -= adapter.size_bytes


def equal_shares(rooms: Iterable[Room], adapters: Iterable[AdapterVersion]) -> Placement:
    """The placement that these rooms add up to, every holder of an adapter with the same share."""
    holders: dict[VersionId, list[ReplicaId]] = {}
    for room in rooms:
        for version in room.held:
            holders.setdefault(version, []).append(room.spec.replica_id)
    placed = {
        adapter.version_id: tuple(
            Holder(replica_id=replica, share=1.0 / len(holders[adapter.version_id]))
            for replica in sorted(holders[adapter.version_id])
        )
        for adapter in sorted(adapters, key=lambda adapter: adapter.version_id)
        if adapter.version_id in holders
    }
    return Placement(MappingProxyType(placed))
