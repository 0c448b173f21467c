"""What must hold of a cluster's state after every event; checkers for tests and for the paranoid."""

from placement.cluster.records import ReplicaPhase, ReplicaRecord
from placement.cluster.state import ClusterState
from placement.types import SHARE_TOLERANCE, Placement, Snapshot


def check_cluster(state: ClusterState) -> None:
    """AssertionError unless counts, bytes, ranks, the published table and the registry agree."""
    for record in state.replicas.values():
        _check_drain(state, record)
        if record.phase not in (ReplicaPhase.READY, ReplicaPhase.DRAINING) or record.gone:
            _require(not record.copies, f"{record.replica_id} is {record.phase.value} and has copies")
            continue
        spec = record.spec
        _require(spec is not None, f"{record.replica_id} is ready without a spec")
        if spec is None:
            continue
        used_bytes = sum(copy.size_bytes for copy in record.copies.values())
        _require(len(record.copies) <= spec.pool_adapters, f"{record.replica_id} holds too many")
        _require(used_bytes <= spec.pool_bytes, f"{record.replica_id} is over its bytes")
        for version in record.copies:
            adapter = state.adapters.get(version)
            _require(
                adapter is None or adapter.rank <= spec.max_lora_rank,
                f"{version} is above the max rank of {record.replica_id}",
            )
    _check_table(state)
    holders = {version: found for version in state.adapters if (found := state.holders(version))}
    gathered = state.holdings.all_holders()
    _require(
        holders == {version: gathered[version] for version in gathered if version in state.adapters},
        "the holders gathered at once are not those asked for one by one",
    )
    for name, version in state.active.items():
        _require(state.adapters[version].name == name, f"{version} is active under {name}")
    registered = set(state.active.values()).union(*state.superseded.values())
    _require(registered == set(state.adapters), "the registry and the names disagree")


def _check_table(state: ClusterState) -> None:
    if not state.published:
        return
    for replica in state.table.replicas:
        _require(state.replicas[replica].is_serving, f"the table names {replica}, which takes no requests")
    for entry in state.table.entries.values():
        _require(entry.name in state.active, f"{entry.name} is in the table and not registered")
        _require(entry.version_id in state.adapters, f"{entry.name}: {entry.version_id} is forgotten")
        total = sum(holder.share for holder in entry.holders)
        _require(
            not entry.holders or abs(total - 1) < SHARE_TOLERANCE,
            f"the shares of {entry.name} sum to {total}",
        )
        for holder in entry.holders:
            _require(
                state.replicas[holder.replica_id].holds(entry.version_id),
                f"the table sends {entry.version_id} to {holder.replica_id}, which has not acknowledged it",
            )


def _check_drain(state: ClusterState, record: ReplicaRecord) -> None:
    """A draining replica is in the table for what nobody else holds, or it is leaving and is not."""
    replica = record.replica_id
    is_draining = record.phase is ReplicaPhase.DRAINING
    _require(is_draining or not (record.leaving or record.gone), f"{replica} leaves without being drained")
    done = record.drain is not None and record.drain.done
    _require(done == (record.phase is ReplicaPhase.DRAINED), f"{replica}: its drain and its phase disagree")
    if not is_draining:
        return
    is_wanted = record.drain is not None or record.resize is not None
    _require(record.leaving or is_wanted, f"{replica} drains for nobody")
    if not state.published:
        return
    _require(record.leaving != (replica in state.table.replicas), f"{replica} neither serves nor leaves")
    for entry in state.table.entries.values():
        holders = {holder.replica_id for holder in entry.holders}
        settled = {one for one in holders if state.replicas[one].phase is ReplicaPhase.READY}
        _require(
            replica not in holders or not settled,
            f"the table sends {entry.name} to draining {replica}, and others hold it",
        )


def check_placement(snapshot: Snapshot, placement: Placement) -> None:
    """AssertionError unless the placement respects counts, bytes and ranks and its shares sum to one."""
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    specs = {spec.replica_id: spec for spec in snapshot.replicas}
    counts = dict.fromkeys(specs, 0)
    used_bytes = dict.fromkeys(specs, 0)
    for version, holders in placement.holders.items():
        adapter = adapters[version]
        _require(bool(holders), f"{version} is placed nowhere and listed")
        _require(len({holder.replica_id for holder in holders}) == len(holders), f"{version} is placed twice")
        total = sum(holder.share for holder in holders)
        _require(abs(total - 1) < SHARE_TOLERANCE, f"the shares of {version} sum to {total}")
        for holder in holders:
            spec = specs[holder.replica_id]
            _require(adapter.rank <= spec.max_lora_rank, f"{version} is above {spec.replica_id}'s rank")
            counts[holder.replica_id] += 1
            used_bytes[holder.replica_id] += adapter.size_bytes
    for replica, spec in specs.items():
        _require(counts[replica] <= spec.pool_adapters, f"{replica} is to hold too many")
        _require(used_bytes[replica] <= spec.pool_bytes, f"{replica} is over its bytes")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
