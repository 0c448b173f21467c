"""Plans and what they change, as messages and as values."""

from types import MappingProxyType

from loraserve.rpc.v1 import management_pb2
from placement.plans.diff import PlanDiff, ReplicaChange, ShareChange
from placement.plans.skew import Skew
from placement.types import Holder, Placement, ReplicaId, VersionId


def encode_plan(plan: Placement) -> management_pb2.Plan:
    """The plan as a message."""
    return management_pb2.Plan(
        adapters=[
            management_pb2.PlannedAdapter(
                version=version, holders=[encode_holder(holder) for holder in holders]
            )
            for version, holders in plan.holders.items()
        ],
        max_lora_ranks={str(replica): rank for replica, rank in plan.max_lora_ranks.items()},
    )


def decode_plan(message: management_pb2.Plan) -> Placement:
    """The plan in a message; of two entries of one adapter the last counts."""
    return Placement(
        MappingProxyType(
            {
                VersionId(one.version): tuple(_holder(holder) for holder in one.holders)
                for one in message.adapters
            }
        ),
        MappingProxyType({ReplicaId(replica): rank for replica, rank in message.max_lora_ranks.items()}),
    )


def encode_holder(holder: Holder) -> management_pb2.Holder:
    """A holder as a message."""
    return management_pb2.Holder(replica_id=holder.replica_id, share=holder.share, spill=holder.spill)


def _holder(message: management_pb2.Holder) -> Holder:
    return Holder(replica_id=ReplicaId(message.replica_id), share=message.share, spill=message.spill)


def encode_skew(skew: Skew) -> management_pb2.Skew:
    """The skew as a message."""
    return management_pb2.Skew(total=skew.total, load=skew.load, rank=skew.rank)


def decode_skew(message: management_pb2.Skew) -> Skew:
    """The skew in a message; an absent one is none."""
    return Skew(load=message.load or 1.0, rank=message.rank or 1.0)


def encode_diff(diff: PlanDiff) -> management_pb2.PlanDiff:
    """What a plan changes, as a message."""
    return management_pb2.PlanDiff(
        replicas=[_encode_change(change) for change in diff.replicas],
        bytes_to_move=diff.bytes_to_move,
        highest_utilisation_before=diff.highest_utilisation_before,
        highest_utilisation_after=diff.highest_utilisation_after,
        skew_before=encode_skew(diff.skew_before),
        skew_after=encode_skew(diff.skew_after),
        unplaced=diff.unplaced,
        measured=diff.is_measured,
    )


def decode_diff(message: management_pb2.PlanDiff) -> PlanDiff:
    """What a plan changes, from a message."""
    return PlanDiff(
        replicas=tuple(_change(one) for one in message.replicas),
        bytes_to_move=message.bytes_to_move,
        highest_utilisation_before=message.highest_utilisation_before,
        highest_utilisation_after=message.highest_utilisation_after,
        skew_before=decode_skew(message.skew_before),
        skew_after=decode_skew(message.skew_after),
        unplaced=tuple(VersionId(version) for version in message.unplaced),
        is_measured=message.measured,
    )


def _encode_change(change: ReplicaChange) -> management_pb2.ReplicaChange:
    return management_pb2.ReplicaChange(
        replica_id=change.replica_id,
        added=change.added,
        added_bytes=change.added_bytes,
        dropped=change.dropped,
        dropped_bytes=change.dropped_bytes,
        shares=[
            management_pb2.ShareChange(version=one.version_id, before=one.before, after=one.after)
            for one in change.shares
        ],
        max_lora_rank_before=change.max_lora_rank_before,
        max_lora_rank_after=change.max_lora_rank_after,
        utilisation_before=change.utilisation_before,
        utilisation_after=change.utilisation_after,
    )


def _change(message: management_pb2.ReplicaChange) -> ReplicaChange:
    return ReplicaChange(
        replica_id=ReplicaId(message.replica_id),
        added=tuple(VersionId(version) for version in message.added),
        added_bytes=message.added_bytes,
        dropped=tuple(VersionId(version) for version in message.dropped),
        dropped_bytes=message.dropped_bytes,
        shares=tuple(
            ShareChange(version_id=VersionId(one.version), before=one.before, after=one.after)
            for one in message.shares
        ),
        max_lora_rank_before=message.max_lora_rank_before,
        max_lora_rank_after=message.max_lora_rank_after,
        utilisation_before=message.utilisation_before,
        utilisation_after=message.utilisation_after,
    )
