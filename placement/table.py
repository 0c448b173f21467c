"""The routing table: a versioned snapshot of which replicas may be sent which adapter.

The cluster's state machine publishes it, routers choose from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from placement.routing.replica_cost import ReplicaCost
from placement.types import AdapterName, Holder, ReplicaId, VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReplica:
    """A replica that takes requests and where its gRPC server listens (host:port); one that is
    draining is there only for the adapters that name it. `cost` is what it takes to serve there, None
    where nobody has measured it."""

    replica_id: ReplicaId
    address: str
    max_lora_rank: int
    draining: bool = False
    cost: ReplicaCost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """The version that a name stands for, and the replicas that acknowledged it, with shares; none
    while the last one is lost and no other has loaded it."""

    name: AdapterName
    version_id: VersionId
    rank: int
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """Version 0 is the empty table that nobody has published; versions only grow.

    Every replica of the table that is not draining serves the base model.
    """

    version: int = 0
    base_model: str = ""
    replicas: Mapping[ReplicaId, TableReplica] = field(default_factory=lambda: MappingProxyType({}))
    entries: Mapping[AdapterName, TableEntry] = field(default_factory=lambda: MappingProxyType({}))

    def same_content(self, other: "RoutingTable") -> bool:
        """Whether the two tables differ in nothing but the version."""
        return (
            self.base_model == other.base_model
            and self.replicas == other.replicas
            and self.entries == other.entries
        )
