"""The values that placement decides over: ids, adapters, replicas, placements, snapshots.

Owns no state and knows no time; everything here is frozen and built by keyword.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NewType

from placement.profile import Profile, Slo

AdapterName = NewType("AdapterName", str)
"""The name a client uses."""

VersionId = NewType("VersionId", str)
"""`name@digest16`: one set of weights under one name, never reused for others."""

ReplicaId = NewType("ReplicaId", str)
NodeId = NewType("NodeId", str)

MAX_WEIGHT = 1e6

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
class AdapterTerms:
    """What an operator wants of an adapter, whichever its version: how many times its tokens count where
    replicas are shared out, and its own targets, None for the usual ones. ValueError for a weight that is
    none."""

    weight: float = 1.0
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight: {self.weight:g}; expected a number above 0, at most {MAX_WEIGHT:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica can hold: no adapter above `max_lora_rank`, no more than `pool_adapters`
    adapters, no more than `pool_bytes` of them. `profile` names its kind in `Snapshot.profiles`."""

    replica_id: ReplicaId
    max_lora_rank: int
    pool_adapters: int
    pool_bytes: int
    node_id: NodeId = NodeId("local")
    profile: str = ""

    @property
    def kind(self) -> tuple[str, int, int, int]:
        """The same for replicas that can stand in for each other."""
        return self.profile, self.max_lora_rank, self.pool_adapters, self.pool_bytes

    def admits(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter could ever live here, other adapters aside."""
        return (
            adapter.rank <= self.max_lora_rank
            and adapter.size_bytes <= self.pool_bytes
            and self.pool_adapters > 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A replica with a copy, and the share of the adapter's requests meant for it.

    With `spill` a holder without a share may take requests where waiting at the others would cost more, if
    the routing policy can tell; without it, only when none of the others can.
    """

    replica_id: ReplicaId
    share: float
    spill: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Which replicas hold each adapter version, with traffic shares that sum to one.

    A version without an entry is unplaced: no replica has room for it. `max_lora_ranks` are the engine
    settings that the plan asks for; a replica without an entry keeps its own.
    """

    holders: Mapping[VersionId, tuple[Holder, ...]] = field(default_factory=lambda: MappingProxyType({}))
    max_lora_ranks: Mapping[ReplicaId, int] = field(default_factory=lambda: MappingProxyType({}))

    def replicas_of(self, version: VersionId) -> frozenset[ReplicaId]:
        """The replicas planned to hold this version."""
        return frozenset(holder.replica_id for holder in self.holders.get(version, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a policy may look at. `demand_tokens_per_s` is the forecast for the next `epoch_s`, prompt
    and output tokens; it misses an adapter that is new.

    `profiles` by `ReplicaSpec.profile`; a replica whose profile is not there is taken to serve every rank
    alike, see `placement.capacity`. Replicas that serve now and are to leave are not among `replicas`;
    `current` may name them. `weights` say how many times an adapter's tokens count (1 where there is none),
    `slos` which adapters have targets other than the profile's.
    """

    adapters: tuple[AdapterVersion, ...]
    replicas: tuple[ReplicaSpec, ...]
    current: Placement = field(default_factory=Placement)
    demand_tokens_per_s: Mapping[VersionId, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
    profiles: Mapping[str, Profile] = field(default_factory=lambda: MappingProxyType({}))
    epoch_s: float = 60.0
    weights: Mapping[VersionId, float] = field(default_factory=lambda: MappingProxyType({}))
    slos: Mapping[VersionId, Slo] = field(default_factory=lambda: MappingProxyType({}))
