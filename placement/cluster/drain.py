"""How a replica is drained: what each event does to its record, and when a drain is done.

READY → DRAINING (serves what no other holds) → leaving (out of the table, finishes its work) → DRAINED.
A replica without a process drains at once.
"""

from collections.abc import Iterable
from dataclasses import replace

from placement.cluster.messages import (
    Command,
    DrainReplica,
    SaveDrain,
    SaveMaxLoraRank,
    StartReplica,
    StopReplica,
)
from placement.cluster.records import DrainOrder, Holdings, ReplicaPhase, ReplicaRecord, ResizeOrder
from placement.table import RoutingTable
from placement.types import AdapterName, VersionId

FOUND_DRAINING_S = 30.0
"""What running work gets on a replica that an earlier controller told to drain and nobody wants drained
any more; the replica keeps to the earlier of two deadlines."""

MAX_NAMED = 5


def request(record: ReplicaRecord, order: DrainOrder) -> list[Command]:
    """Begin to drain, or change how; a replica without a process has drained already."""
    match record.phase:
        case ReplicaPhase.DRAINED:
            return []
        case ReplicaPhase.STARTING | ReplicaPhase.FAILED:
            record.drain = order
            return _finish(record)
        case ReplicaPhase.READY:
            record.phase = ReplicaPhase.DRAINING
        case ReplicaPhase.UNKNOWN | ReplicaPhase.DRAINING:
            pass
    record.drain = order
    saved: list[Command] = [SaveDrain(record.replica_id, order)]
    if record.leaving and not record.gone:
        saved.append(DrainReplica(record.replica_id, order.deadline_s))
    return saved


def take_back(record: ReplicaRecord) -> list[Command]:
    """Undrain: serve on if the replica has not left yet, else start it again once it has ended."""
    forget = SaveDrain(record.replica_id, None)
    match record.phase:
        case ReplicaPhase.DRAINED | ReplicaPhase.FAILED:
            return [forget, _start_again(record)]
        case ReplicaPhase.DRAINING if record.gone:
            return [forget, _start_again(record)]
        case ReplicaPhase.DRAINING if not record.leaving:
            record.drain, record.phase = None, ReplicaPhase.READY
        case ReplicaPhase.DRAINING | ReplicaPhase.UNKNOWN if record.drain is not None:
            record.drain = None
        case _:
            return []
    return [forget]


def ready(record: ReplicaRecord, *, is_draining: bool) -> list[Command]:
    """A replica that a drain concerns is up. One that was told to drain refuses new work and cannot be
    told otherwise: if nobody wants it drained any more, it is started again when it has ended."""
    if record.drain is None and not is_draining:
        return []
    record.phase, record.leaving = ReplicaPhase.DRAINING, is_draining
    if not is_draining:
        return []
    deadline_s = FOUND_DRAINING_S if record.drain is None else record.drain.deadline_s
    return [DrainReplica(record.replica_id, deadline_s)]


def lost(record: ReplicaRecord) -> None:
    """A replica with an order to drain died: what only it held has to come up elsewhere first."""
    record.phase, record.leaving, record.gone = ReplicaPhase.DRAINING, True, True


def drained(record: ReplicaRecord) -> list[Command]:
    """Nothing is in flight there any more: end it, and start it again if it was undrained meanwhile."""
    if record.phase is not ReplicaPhase.DRAINING or not record.leaving or record.gone:
        return []
    if record.drain is not None:
        return _finish(record)
    return [StopReplica(record.replica_id), _start_again(record)]


def leave(records: Iterable[ReplicaRecord], table: RoutingTable) -> list[Command]:
    """Have the draining replicas that the table does without finish their work."""
    commands: list[Command] = []
    for record in records:
        order = record.drain or record.resize
        if record.phase is not ReplicaPhase.DRAINING or record.leaving or order is None:
            continue
        if record.replica_id not in table.replicas:
            record.leaving = True
            if isinstance(order, ResizeOrder):
                # Before the drain, which cannot be taken back: however its process ends, the next has it.
                record.max_lora_rank = order.max_lora_rank
                commands.append(SaveMaxLoraRank(record.replica_id, order.max_lora_rank))
            commands.append(DrainReplica(record.replica_id, order.deadline_s))
    return commands


def close(holdings: Holdings) -> list[Command]:
    """End the drains of replicas that died once every adapter that has a home is held somewhere."""
    dead = [record for record in holdings.replicas.values() if record.gone]
    if not dead or missing(holdings):
        return []
    return [command for record in dead for command in _finish(record)]


def missing(holdings: Holdings) -> tuple[VersionId, ...]:
    """The registered versions that nobody holds and somebody is yet to load."""
    return tuple(
        holdings.active[name]
        for name in sorted(holdings.active)
        if not any(holdings.holders(version) for version in holdings.versions_of(name))
        and holdings.may_come(holdings.active[name])
    )


def homeless(holdings: Holdings, placed: Iterable[VersionId]) -> str | None:
    """Which names are held by somebody now and not among those placed; None if there are none."""
    homes = set(placed)
    names: list[AdapterName] = [
        name
        for name, version in sorted(holdings.active.items())
        if version not in homes and any(holdings.holders(one) for one in holdings.versions_of(name))
    ]
    if not names:
        return None
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _finish(record: ReplicaRecord) -> list[Command]:
    done = replace(record.drain or DrainOrder(deadline_s=0.0), done=True)
    _reset(record)
    record.phase, record.drain, record.reason = ReplicaPhase.DRAINED, done, ""
    return [SaveDrain(record.replica_id, done), StopReplica(record.replica_id)]


def _start_again(record: ReplicaRecord) -> Command:
    _reset(record)
    record.phase, record.drain, record.restarts = ReplicaPhase.STARTING, None, 0
    return StartReplica(record.replica_id, 0)


def _reset(record: ReplicaRecord) -> None:
    record.copies.clear()
    record.refused.clear()
    record.leaving, record.gone = False, False
