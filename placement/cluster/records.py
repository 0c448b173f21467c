"""What the cluster's state machine keeps of each replica and each copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from placement.types import AdapterName, AdapterVersion, Placement, ReplicaId, ReplicaSpec, VersionId


class ReplicaPhase(Enum):
    """Where a replica stands. UNKNOWN: a restarted controller has not looked for it yet; STARTING
    also covers one that is being started again. DRAINING: it gets no new copies and leaves the table as
    soon as no adapter depends on it; DRAINED: it was ended and stays so until it is undrained."""

    UNKNOWN = "unknown"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOrder:
    """An operator's wish that a replica be drained: what running work gets once the replica takes no
    more, whether adapters that have no other home may be lost, and whether it is done."""

    deadline_s: float
    force: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeOrder:
    """That a replica be drained and started again with another engine setting: which, the one that was
    remembered `before` (None: the configuration's), what running work gets, and whether it has come to the
    start with the new one."""

    max_lora_rank: int
    before: int | None
    deadline_s: float
    is_started: bool = False


@dataclass(slots=True)
class ReplicaRecord:
    """What is known of one replica. `spec` is None and `address` empty until it was ready once.

    `refused` holds the versions that it would not load, with the reason, until the next epoch. `drain`
    is set from the request to drain until it is taken back; `leaving` once the replica is out of the
    table for it and finishes its work; `gone` if its process ended in the middle. It starts with
    `max_lora_rank`, None: the configuration's; `resize` is set until it is up with another one.
    """

    replica_id: ReplicaId
    phase: ReplicaPhase
    spec: ReplicaSpec | None = None
    address: str = ""
    restarts: int = 0
    reason: str = ""
    copies: dict[VersionId, Copy] = field(default_factory=dict)
    refused: dict[VersionId, str] = field(default_factory=dict)
    drain: DrainOrder | None = None
    leaving: bool = False
    gone: bool = False
    max_lora_rank: int | None = None
    resize: ResizeOrder | None = None

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests: ready, or draining and still needed."""
        return self.phase is ReplicaPhase.READY or (self.phase is ReplicaPhase.DRAINING and not self.leaving)

    def holds(self, version: VersionId) -> bool:
        """Whether this replica acknowledged the version, is not dropping it, and takes requests."""
        copy = self.copies.get(version)
        return self.is_serving and copy is not None and copy.phase is CopyPhase.HELD

    def has_room(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter can be loaded now; what is loading and what is draining counts as taken."""
        if self.phase is not ReplicaPhase.READY or self.spec is None:
            return False
        # The bytes last, which take longest to look up.
        return (
            self.spec.admits(adapter)
            and len(self.copies) < self.spec.pool_adapters
            and sum([copy.size_bytes for copy in self.copies.values()]) + adapter.size_bytes
            <= self.spec.pool_bytes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Who holds what under which names, and the plan: a view of the state machine's own records.
    `planned_on` is the plan's versions by replica."""

    replicas: Mapping[ReplicaId, ReplicaRecord]
    adapters: Mapping[VersionId, AdapterVersion]
    active: Mapping[AdapterName, VersionId]
    superseded: Mapping[AdapterName, Sequence[VersionId]]
    plan: Placement
    planned_on: Mapping[ReplicaId, frozenset[VersionId]]

    def holders(self, version: VersionId) -> tuple[ReplicaId, ...]:
        """The replicas that acknowledged this version and are not dropping it."""
        return tuple(record.replica_id for record in self.replicas.values() if record.holds(version))

    def all_holders(self) -> dict[VersionId, tuple[ReplicaId, ...]]:
        """The holders of every version that has any, as `holders` gives them one by one."""
        found: dict[VersionId, list[ReplicaId]] = {}
        for record in self.replicas.values():
            if record.is_serving:
                for version, copy in record.copies.items():
                    if copy.phase is CopyPhase.HELD:
                        found.setdefault(version, []).append(record.replica_id)
        return {version: tuple(replicas) for version, replicas in found.items()}

    def may_come(self, version: VersionId) -> bool:
        """Whether a planned replica has not refused this version, so that it may hold it yet."""
        planned = self.plan.replicas_of(version)
        return any(
            record.replica_id in planned and version not in record.refused
            for record in self.replicas.values()
            if record.phase is ReplicaPhase.READY
        )

    def why_no_room(self, version: VersionId) -> str:
        """What keeps a version that nobody has refused from being planned anywhere."""
        adapter = self.adapters.get(version)
        ready = [record for record in self.replicas.values() if record.phase is ReplicaPhase.READY]
        highest = max((record.spec.max_lora_rank for record in ready if record.spec is not None), default=0)
        if adapter is not None and ready and adapter.rank > highest:
            return f"its rank {adapter.rank} is above {highest}, the highest that a replica takes"
        return "no replica has room for one more adapter of its size"

    def versions_of(self, name: AdapterName) -> tuple[VersionId, ...]:
        """The versions of a registered name, newest first."""
        return (self.active[name], *reversed(self.superseded.get(name, ())))
