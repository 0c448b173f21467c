"""What operators may ask of replicas: drain them, take that back, and see how far it is."""

from collections.abc import Sequence

from loraserve.controller.controller import Controller
from loraserve.controller.store import Changes
from loraserve.errors import BadInputError, NotFoundError, ReplicaStartError, StaleError, UnavailableError
from loraserve.rpc.limits import check_drain_deadline
from loraserve.rpc.v1 import management_pb2
from placement.cluster import messages
from placement.cluster.records import DrainOrder, ReplicaPhase
from placement.types import ReplicaId

RUNNING = (ReplicaPhase.READY, ReplicaPhase.DRAINING)
SETTLED = (*RUNNING, ReplicaPhase.DRAINED)
"""One that is being started again may come up on another node than the one it was on."""


def select(controller: Controller, replica_ids: Sequence[str], node_id: str) -> tuple[ReplicaId, ...]:
    """The replicas named, or those on the node; BadInputError or NotFoundError."""
    replicas = controller.state.replicas
    if bool(replica_ids) == bool(node_id):
        raise BadInputError("replica_ids, node_id: give one of them")
    if node_id:
        nodes = {
            record.replica_id: record.spec.node_id
            for record in replicas.values()
            if record.spec is not None and record.phase in SETTLED
        }
        if node_id not in nodes.values():
            known = ", ".join(sorted(set(nodes.values()))) or "none"
            raise NotFoundError(f"no replica is known on node {node_id}; nodes: {known}")
        return tuple(replica for replica, node in nodes.items() if node == node_id)
    for name in replica_ids:
        if name not in replicas:
            raise NotFoundError(f"no replica {name}; replicas: {', '.join(sorted(replicas))}")
    return tuple(ReplicaId(name) for name in dict.fromkeys(replica_ids))


def begin_drain(controller: Controller, replicas: Sequence[ReplicaId], order: DrainOrder) -> None:
    """Save the wish, then act on it.

    BadInputError for a deadline that is none, UnavailableError before the first table, StaleError if
    adapters or all replicas would be lost and `order` does not force it, WorkFailedError if it cannot be
    saved; nothing is done then.
    """
    check_drain_deadline(order.deadline_s)
    state = controller.state
    if controller.table.version == 0:
        raise UnavailableError("the controller is still looking for its replicas; try again in a moment")
    wanted = [one for one in replicas if state.replicas[one].phase is not ReplicaPhase.DRAINED]
    if wanted and not order.force and (problem := state.drain_problem(wanted)) is not None:
        raise StaleError(
            f"draining {', '.join(wanted)} is refused: {problem}; make room first, or force it (--force)"
        )
    controller.save_wish(Changes(drains=dict.fromkeys(wanted, order)))
    for replica in wanted:
        controller.keeper.moved.pop(replica, None)
        controller.dispatch(messages.DrainRequested(replica, order))


def begin_undrain(controller: Controller, replicas: Sequence[ReplicaId]) -> None:
    """Save that these are wanted again, then act on it; WorkFailedError if it cannot be saved."""
    controller.save_wish(Changes(drains=dict.fromkeys(replicas)))
    for replica in replicas:
        controller.dispatch(messages.UndrainRequested(replica))


def drain_is_done(controller: Controller, replicas: Sequence[ReplicaId]) -> bool:
    """Whether all are drained; StaleError if one of them is not to be drained any more."""
    records = [controller.state.replicas[replica] for replica in replicas]
    for record in records:
        if record.drain is None:
            raise StaleError(f"{record.replica_id}: its drain was taken back; it is {record.phase.value}")
    return all(record.phase is ReplicaPhase.DRAINED for record in records)


def undrain_is_done(controller: Controller, replicas: Sequence[ReplicaId]) -> bool:
    """Whether all are ready; StaleError if one is drained again, ReplicaStartError if one has failed."""
    records = [controller.state.replicas[replica] for replica in replicas]
    for record in records:
        if record.drain is not None:
            raise StaleError(f"{record.replica_id}: it is drained again")
        if record.phase is ReplicaPhase.FAILED:
            raise ReplicaStartError(record.replica_id, record.reason)
    return all(record.phase is ReplicaPhase.READY for record in records)


def progress(controller: Controller, replicas: Sequence[ReplicaId]) -> management_pb2.DrainProgress:
    """How far each is."""
    message = management_pb2.DrainProgress()
    for replica in replicas:
        record = controller.state.replicas[replica]
        # A replica that is being ended may still have its last report.
        report = controller.reports.get(replica) if record.phase in RUNNING else None
        message.replicas.add(
            replica_id=replica,
            state=record.phase.value,
            waiting_for=controller.state.drain_waits_for(replica),
            running=0 if report is None else report.running + report.waiting,
            moved=controller.keeper.moved.get(replica, 0),
            reason=record.reason,
        )
    return message
