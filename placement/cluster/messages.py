"""What the cluster's state machine hears (events, past tense) and asks for (commands, imperative)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from placement.cluster.records import DrainOrder
from placement.table import RoutingTable
from placement.types import (
    AdapterName,
    AdapterTerms,
    AdapterVersion,
    Placement,
    ReplicaId,
    ReplicaSpec,
    VersionId,
)


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica is up (or was found again) and says what it holds.

    One that was found again may be in the middle of what an earlier controller asked for: loading or
    dropping a copy, or draining.
    """

    spec: ReplicaSpec
    address: str
    resident: frozenset[VersionId] = frozenset()
    loading: frozenset[VersionId] = frozenset()
    dropping: frozenset[VersionId] = frozenset()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica died or stopped answering; its copies are gone with it."""

    replica_id: ReplicaId
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaGivenUp:
    """A replica could not be started and will not be tried again."""

    replica_id: ReplicaId
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterRegistered:
    """A validated adapter, or a new version of a registered name."""

    adapter: AdapterVersion


@dataclass(frozen=True, slots=True)
class AdapterTermsChanged:
    """An operator wants something else of a registered adapter from now on; an unknown name is no error."""

    name: AdapterName
    terms: AdapterTerms


@dataclass(frozen=True, slots=True)
class AdapterRemoved:
    """An operator took the name out of service; an unknown name is no error."""

    name: AdapterName


@dataclass(frozen=True, slots=True)
class AdapterWithdrawn:
    """A registration that no replica could take is undone; the version before it serves on."""

    version_id: VersionId


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """A replica acknowledged a load."""

    replica_id: ReplicaId
    version_id: VersionId


@dataclass(frozen=True, slots=True)
class AdapterLoadFailed:
    """A replica refused a load; it is not tried there again before the next epoch."""

    replica_id: ReplicaId
    version_id: VersionId
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterUnloaded:
    """A replica acknowledged that a copy is gone."""

    replica_id: ReplicaId
    version_id: VersionId


Answer = AdapterLoaded | AdapterLoadFailed | AdapterUnloaded
"""What replicas answer to what they were asked; it changes nothing that a plan is made from."""

Together = Answer | AdapterRegistered
"""What may be taken in many at a time."""


@dataclass(frozen=True, slots=True)
class EpochElapsed:
    """It is time to plan again, for this forecast."""

    demand_tokens_per_s: Mapping[VersionId, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator wants a replica to end in order and stay away; see `ClusterState.drain_problem`."""

    replica_id: ReplicaId
    order: DrainOrder


@dataclass(frozen=True, slots=True)
class ReplicaDrained:
    """A replica that was told to drain has nothing in flight any more."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class UndrainRequested:
    """An operator wants a drained, draining or failed replica back; any other is left as it is."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class PlanGiven:
    """An operator wants this plan, now; with `frozen` it stays. One that `ClusterState.plan_problem` refuses
    is not adopted, nor one that is not to stay while another is frozen. `is_reactive`: it is no operator's,
    but the one in force with copies for requests that are to move; a rollback passes over it."""

    plan: Placement
    frozen: bool
    is_reactive: bool = False


@dataclass(frozen=True, slots=True)
class FreezeRequested:
    """An operator wants the plan to stay as it is but for losses, or to be the policy's again."""

    frozen: bool


@dataclass(frozen=True, slots=True)
class RollbackRequested:
    """An operator wants the plan before the present one, and that it stays; without one nothing is done."""


Event = (
    ReplicaReady
    | ReplicaLost
    | ReplicaGivenUp
    | AdapterRegistered
    | AdapterTermsChanged
    | AdapterRemoved
    | AdapterWithdrawn
    | AdapterLoaded
    | AdapterLoadFailed
    | AdapterUnloaded
    | EpochElapsed
    | DrainRequested
    | ReplicaDrained
    | UndrainRequested
    | PlanGiven
    | FreezeRequested
    | RollbackRequested
)


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start this replica; `attempt` counts its restarts, for the shell's backoff."""

    replica_id: ReplicaId
    attempt: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Have this replica load the adapter, and answer with AdapterLoaded or AdapterLoadFailed."""

    replica_id: ReplicaId
    adapter: AdapterVersion


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Have this replica drain and drop the copy, and answer with AdapterUnloaded."""

    replica_id: ReplicaId
    version_id: VersionId


@dataclass(frozen=True, slots=True)
class PublishTable:
    """Remember the table's version durably, then give the table to every router."""

    table: RoutingTable


@dataclass(frozen=True, slots=True)
class SaveAdapter:
    """Make the registration durable before anything after it happens."""

    adapter: AdapterVersion


@dataclass(frozen=True, slots=True)
class DeleteAdapter:
    """Forget the registration."""

    version_id: VersionId


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Remember the plan durably."""

    plan: Placement


@dataclass(frozen=True, slots=True)
class KeepPlan:
    """Remember durably a plan that was in force, and why the next one took its place; None: forget it."""

    number: int
    plan: Placement | None
    ended_by: str = ""


@dataclass(frozen=True, slots=True)
class SaveFreeze:
    """Remember durably that this plan is to stay; None: that none is."""

    plan: Placement | None


@dataclass(frozen=True, slots=True)
class SaveDrain:
    """Remember durably that the replica is to drain or has drained; None: that it is not to."""

    replica_id: ReplicaId
    order: DrainOrder | None


@dataclass(frozen=True, slots=True)
class SaveMaxLoraRank:
    """Remember durably with which setting the replica starts from now on; None: the configuration's."""

    replica_id: ReplicaId
    max_lora_rank: int | None


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Have this replica refuse new work and finish what it has, aborting what is left after
    `deadline_s`, and answer with ReplicaDrained."""

    replica_id: ReplicaId
    deadline_s: float


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End this replica's process, or its start; that it is lost then is no news."""

    replica_id: ReplicaId


Command = (
    StartReplica
    | StopReplica
    | LoadAdapter
    | UnloadAdapter
    | DrainReplica
    | PublishTable
    | SaveAdapter
    | DeleteAdapter
    | SavePlan
    | KeepPlan
    | SaveFreeze
    | SaveDrain
    | SaveMaxLoraRank
)
