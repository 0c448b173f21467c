"""What the news of one replica does to its record: it is up, it is lost, an epoch has passed."""

from collections.abc import Iterable, Mapping

from placement.cluster import drain as cluster_drain
from placement.cluster.messages import (
    Command,
    DeleteAdapter,
    LoadAdapter,
    ReplicaReady,
    StartReplica,
    StopReplica,
    UnloadAdapter,
)
from placement.cluster.records import Copy, CopyPhase, ReplicaPhase, ReplicaRecord
from placement.types import AdapterVersion, VersionId

_Adapters = Mapping[VersionId, AdapterVersion]


def ready(record: ReplicaRecord, event: ReplicaReady, adapters: _Adapters) -> list[Command]:
    """A replica is up, or was found again with what it holds."""
    if record.phase is ReplicaPhase.DRAINED:
        return [StopReplica(record.replica_id)]
    record.phase, record.spec, record.address = ReplicaPhase.READY, event.spec, event.address
    record.reason, record.leaving, record.gone = "", False, False
    record.copies = {
        version: Copy(CopyPhase.HELD, _size_bytes(adapters, version)) for version in sorted(event.resident)
    }
    record.refused.clear()
    commands = _resume(record, event, adapters)
    _reserve_for_strays(record, event.spec.pool_bytes, adapters)
    return commands + cluster_drain.ready(record, is_draining=event.draining)


def _resume(record: ReplicaRecord, event: ReplicaReady, adapters: _Adapters) -> list[Command]:
    """Ask again for what an earlier controller had asked for, to hear how it ends."""
    commands: list[Command] = []
    for version in sorted(event.loading | event.dropping):
        adapter = adapters.get(version)
        record.copies[version] = Copy(CopyPhase.RETIRING, _size_bytes(adapters, version))
        if adapter is None or version in event.dropping:
            commands.append(UnloadAdapter(record.replica_id, version))
        else:
            record.copies[version].phase = CopyPhase.LOADING
            commands.append(LoadAdapter(record.replica_id, adapter))
    return commands


def lost(record: ReplicaRecord, reason: str, max_restarts: int) -> list[Command]:
    """A replica is gone with its copies; it is started again a bounded number of times."""
    if record.phase is ReplicaPhase.DRAINED:
        return []
    record.copies.clear()
    record.refused.clear()
    record.reason = reason
    if record.drain is not None:
        cluster_drain.lost(record)
        return []
    record.leaving = False
    if record.restarts >= max_restarts:
        record.phase = ReplicaPhase.FAILED
        return []
    record.phase = ReplicaPhase.STARTING
    record.restarts += 1
    return [StartReplica(record.replica_id, record.restarts)]


def given_up(record: ReplicaRecord, reason: str) -> None:
    """A replica could not be started."""
    if record.phase in (ReplicaPhase.STARTING, ReplicaPhase.UNKNOWN):
        record.phase, record.reason = ReplicaPhase.FAILED, reason


def unloaded(record: ReplicaRecord, version: VersionId, adapters: _Adapters) -> None:
    """A copy is gone. What was reserved with it for copies of unknown size goes on to the next of them."""
    copy = record.copies.get(version)
    if copy is None or not record.move(version, CopyPhase.RETIRING, None) or version in adapters:
        return
    for other, stray in record.copies.items():
        if other not in adapters and stray.size_bytes == 0:
            stray.size_bytes = copy.size_bytes
            return


def not_loaded(record: ReplicaRecord, version: VersionId, reason: str, adapters: _Adapters) -> None:
    """A replica has refused a load; that is kept as long as somebody wants the version there."""
    if record.move(version, CopyPhase.LOADING, None) and version in adapters:
        record.refused[version] = reason


def forgotten(records: Iterable[ReplicaRecord], version: VersionId) -> list[Command]:
    """Nobody wants the version any more; if it is registered again it is tried again."""
    for record in records:
        record.refused.pop(version, None)
    return [DeleteAdapter(version)]


def epoch_elapsed(records: Iterable[ReplicaRecord]) -> list[Command]:
    """Give refused loads another chance, ask again for drops that nobody confirmed, and let a replica that
    lasted an epoch earn one restart back."""
    commands: list[Command] = []
    for record in records:
        record.refused.clear()
        if record.phase is ReplicaPhase.READY:
            record.restarts = max(0, record.restarts - 1)
            commands += [
                UnloadAdapter(record.replica_id, version)
                for version, copy in sorted(record.copies.items())
                if copy.phase is CopyPhase.RETIRING
            ]
    return commands


def _size_bytes(adapters: _Adapters, version: VersionId) -> int:
    """What is registered, see `_reserve_for_strays` for the others."""
    adapter = adapters.get(version)
    return adapter.size_bytes if adapter is not None else 0


def _reserve_for_strays(record: ReplicaRecord, pool_bytes: int, adapters: _Adapters) -> None:
    """Copies of versions that nobody knows any more, dropped at once, may be of any size: until the last one
    has gone nothing is loaded in place of them. One has all that is free reserved, the others 0 bytes."""
    strays = [copy for version, copy in record.copies.items() if version not in adapters]
    free_bytes = max(0, pool_bytes - sum(copy.size_bytes for copy in record.copies.values()))
    for copy in strays:
        copy.size_bytes, free_bytes = free_bytes, 0
