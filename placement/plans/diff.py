"""What one plan would change against another: a value that can be printed."""

from collections.abc import Mapping
from dataclasses import dataclass

from placement.plans.skew import Skew, highest_utilisation, skew_of, uses_of
from placement.types import Placement, ReplicaId, Snapshot, VersionId

_SHARE_STEP = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareChange:
    """The share of an adapter's requests meant for a replica that holds it before and after."""

    version_id: VersionId
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaChange:
    """What changes on one replica. The ranks are the engine settings; `utilisation` 1 is its operating
    point, if `Snapshot.profiles` has one."""

    replica_id: ReplicaId
    added: tuple[VersionId, ...]
    added_bytes: int
    dropped: tuple[VersionId, ...]
    dropped_bytes: int
    shares: tuple[ShareChange, ...]
    max_lora_rank_before: int
    max_lora_rank_after: int
    utilisation_before: float
    utilisation_after: float

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done there."""
        return not (self.added or self.dropped or self.shares) and (
            self.max_lora_rank_before == self.max_lora_rank_after
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """What a plan would change, replica by replica, those with nothing to do left out; `bytes_to_move` are
    those that replicas would load. `unplaced` are registered adapters that it has no place for. Unless all
    capacities are `is_measured`, utilisations can only be compared."""

    replicas: tuple[ReplicaChange, ...]
    bytes_to_move: int
    highest_utilisation_before: float
    highest_utilisation_after: float
    skew_before: Skew
    skew_after: Skew
    unplaced: tuple[VersionId, ...]
    is_measured: bool

    @property
    def is_empty(self) -> bool:
        """Whether the plans are the same."""
        return not self.replicas


def diff_of(snapshot: Snapshot, after: Placement, before: Placement | None = None) -> PlanDiff:
    """What `after` changes against `before`, by default the snapshot's current plan, under the snapshot's
    demand; only its replicas and adapters count."""
    before = snapshot.current if before is None else before
    uses_before, uses_after = uses_of(snapshot, before), uses_of(snapshot, after)
    shares_before, shares_after = _by_replica(before), _by_replica(after)
    sizes = {adapter.version_id: adapter.size_bytes for adapter in snapshot.adapters}
    changes = []
    for spec in sorted(snapshot.replicas, key=lambda spec: spec.replica_id):
        replica = spec.replica_id
        old, new = shares_before.get(replica, {}), shares_after.get(replica, {})
        added = tuple(sorted(version for version in new if version not in old))
        dropped = tuple(sorted(version for version in old if version not in new and version in sizes))
        change = ReplicaChange(
            replica_id=replica,
            added=added,
            added_bytes=sum(sizes.get(version, 0) for version in added),
            dropped=dropped,
            dropped_bytes=sum(sizes[version] for version in dropped),
            shares=tuple(
                ShareChange(version_id=version, before=old[version], after=new[version])
                for version in sorted(old.keys() & new.keys())
                if abs(old[version] - new[version]) > _SHARE_STEP
            ),
            max_lora_rank_before=before.max_lora_ranks.get(replica, spec.max_lora_rank),
            max_lora_rank_after=after.max_lora_ranks.get(replica, spec.max_lora_rank),
            utilisation_before=uses_before[replica].utilisation,
            utilisation_after=uses_after[replica].utilisation,
        )
        if not change.is_empty:
            changes.append(change)
    return PlanDiff(
        replicas=tuple(changes),
        bytes_to_move=sum(change.added_bytes for change in changes),
        highest_utilisation_before=highest_utilisation(uses_before),
        highest_utilisation_after=highest_utilisation(uses_after),
        skew_before=skew_of(snapshot, before),
        skew_after=skew_of(snapshot, after),
        unplaced=tuple(sorted(version for version in sizes if version not in after.holders)),
        is_measured=all(use.is_measured for use in uses_after.values()),
    )


def _by_replica(plan: Placement) -> Mapping[ReplicaId, Mapping[VersionId, float]]:
    found: dict[ReplicaId, dict[VersionId, float]] = {}
    for version, holders in plan.holders.items():
        for holder in holders:
            found.setdefault(holder.replica_id, {})[version] = holder.share
    return found
