"""The values that placement decides over: ids, adapters, replicas, placements, snapshots.

Owns no state and knows no time; everything here is frozen and built by keyword.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NewType

AdapterName = NewType("AdapterName", str)
"""The name a client uses."""

VersionId = NewType("VersionId", str)
"""`name@digest16`: one set of weights under one name, never reused for others."""

ReplicaId = NewType("ReplicaId", str)
NodeId = NewType("NodeId", str)

SHARE_TOLERANCE = 1e-6
"""How far the shares of one adapter may be from summing to one."""


def version_id(name: AdapterName, sha256: str) -> VersionId:
    """The id of the weights with this digest (hex) under this name."""
    return VersionId(f"{name}@{sha256[:16]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """One registered set of LoRA weights; `rank` is the largest tensor rank in it."""

    version_id: VersionId
    name: AdapterName
    sha256: str
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica can hold: no adapter above `max_lora_rank`, no more than `pool_adapters`
    adapters, no more than `pool_bytes` of them."""

    replica_id: ReplicaId
    max_lora_rank: int
    pool_adapters: int
    pool_bytes: int
    node_id: NodeId = NodeId("local")

    def admits(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter could ever live here, other adapters aside."""
        return (
            adapter.rank <= self.max_lora_rank
            and adapter.size_bytes <= self.pool_bytes
            and self.pool_adapters > 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A replica with a copy, and the share of the adapter's requests meant for it."""

    replica_id: ReplicaId
    share: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Which replicas hold each adapter version, with traffic shares that sum to one.

    A version without an entry is unplaced: no replica has room for it.
    """

    holders: Mapping[VersionId, tuple[Holder, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def replicas_of(self, version: VersionId) -> frozenset[ReplicaId]:
        """The replicas planned to hold this version."""
        return frozenset(holder.replica_id for holder in self.holders.get(version, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a policy may look at. `demand_tokens_per_s` misses an adapter that is new."""

    adapters: tuple[AdapterVersion, ...]
    replicas: tuple[ReplicaSpec, ...]
    current: Placement = field(default_factory=Placement)
    demand_tokens_per_s: Mapping[VersionId, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
