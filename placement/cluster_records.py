"""What the cluster's state machine keeps of each replica and each copy."""

from dataclasses import dataclass, field
from enum import Enum

from placement.types import AdapterVersion, ReplicaId, ReplicaSpec, VersionId


class ReplicaPhase(Enum):
    """Where a replica stands. UNKNOWN: a restarted controller has not looked for it yet; STARTING
    also covers one that is being started again."""

    UNKNOWN = "unknown"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


class CopyPhase(Enum):
    """Where one copy of one version on one replica stands."""

    LOADING = "loading"
    HELD = "held"
    RETIRING = "retiring"


@dataclass(slots=True)
class Copy:
    """One copy on one replica, and the bytes it takes there until it is gone."""

    phase: CopyPhase
    size_bytes: int


@dataclass(slots=True)
class ReplicaRecord:
    """What is known of one replica. `spec` is None and `address` empty until it was ready once.

    `refused` holds the versions that it would not load, with the reason, until the next epoch.
    """

    replica_id: ReplicaId
    phase: ReplicaPhase
    spec: ReplicaSpec | None = None
    address: str = ""
    restarts: int = 0
    reason: str = ""
    copies: dict[VersionId, Copy] = field(default_factory=dict)
    refused: dict[VersionId, str] = field(default_factory=dict)

    def holds(self, version: VersionId) -> bool:
        """Whether this replica acknowledged the version and is not dropping it."""
        copy = self.copies.get(version)
        return self.phase is ReplicaPhase.READY and copy is not None and copy.phase is CopyPhase.HELD

    def has_room(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter can be loaded now; what is loading and what is draining counts as taken."""
        if self.phase is not ReplicaPhase.READY or self.spec is None:
            return False
        used_bytes = sum(copy.size_bytes for copy in self.copies.values())
        return (
            self.spec.admits(adapter)
            and len(self.copies) < self.spec.adapter_slots
            and used_bytes + adapter.size_bytes <= self.spec.pool_bytes
        )

    def move(self, version: VersionId, before: CopyPhase, after: CopyPhase | None) -> bool:
        """Move a copy between phases; False if it is not in `before`, as after a late answer."""
        copy = self.copies.get(version)
        if copy is None or copy.phase is not before:
            return False
        if after is None:
            del self.copies[version]
        else:
            copy.phase = after
        return True
