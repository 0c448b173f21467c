"""The cluster's state machine: events in, commands out, no I/O and no clock.

It knows which adapters are registered, which copies each replica holds, and what the routers have been
told. The live controller and the simulator run this same object. How tables follow from copies is in
`cluster_table`, how replicas are drained in `cluster_drain`.

A copy's life: (none) → LOADING → HELD → RETIRING → (none). A copy is in the routing table only while it
is HELD; it is retired only after a table without it was published; the last copy of a version that the
table still names is never retired.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from placement import cluster_drain
from placement.cluster_messages import (
    AdapterLoaded,
    AdapterLoadFailed,
    AdapterRegistered,
    AdapterRemoved,
    AdapterUnloaded,
    AdapterWithdrawn,
    Command,
    DeleteAdapter,
    DrainRequested,
    EpochElapsed,
    Event,
    LoadAdapter,
    PublishTable,
    ReplicaDrained,
    ReplicaGivenUp,
    ReplicaLost,
    ReplicaReady,
    SaveAdapter,
    SavePlan,
    StartReplica,
    StopReplica,
    UndrainRequested,
    UnloadAdapter,
)
from placement.cluster_records import Copy, CopyPhase, DrainOrder, Holdings, ReplicaPhase, ReplicaRecord
from placement.cluster_table import table_of
from placement.policies.base import PlacementPolicy
from placement.profile import Profile
from placement.table import RoutingTable, TableEntry
from placement.types import (
    AdapterName,
    AdapterVersion,
    Placement,
    ReplicaId,
    Snapshot,
    VersionId,
)


class ClusterState:
    """One door: `handle(event) -> commands`. Commands are to be executed in their order."""

    def __init__(
        self,
        *,
        replica_ids: Iterable[ReplicaId],
        policy: PlacementPolicy,
        base_model: str = "",
        seed: int = 0,
        max_restarts: int = 3,
        adapters: Iterable[AdapterVersion] = (),
        plan: Placement | None = None,
        table_version: int = 0,
        drains: Mapping[ReplicaId, DrainOrder] = MappingProxyType({}),
        recovering: bool = False,
        profiles: Mapping[str, Profile] = MappingProxyType({}),
        epoch_s: float = 60.0,
    ) -> None:
        """Start empty, or from what a store remembers (`adapters` in order of registration).

        `recovering`: replicas of an earlier controller may still be running and routers on its tables.
        """
        self.policy = policy
        self.base_model = base_model
        self.seed = seed
        self.max_restarts = max_restarts
        self.profiles = profiles
        self.epoch_s = epoch_s
        self.plan = plan if plan is not None else Placement()
        self.table = RoutingTable(version=table_version, base_model=base_model)
        self.published = False
        self._recovering = recovering
        first = ReplicaPhase.UNKNOWN if recovering else ReplicaPhase.STARTING
        self.replicas = {replica: ReplicaRecord(replica, first) for replica in sorted(replica_ids)}
        self.adapters: dict[VersionId, AdapterVersion] = {}
        self.active: dict[AdapterName, VersionId] = {}
        self.superseded: dict[AdapterName, list[VersionId]] = {}
        self.demand_tokens_per_s: Mapping[VersionId, float] = MappingProxyType({})
        for adapter in adapters:
            self._adopt(adapter)
        # To routers these names are registered, before anybody is found to hold them.
        waiting = {
            name: TableEntry(name=name, version_id=key, rank=self.adapters[key].rank, holders=())
            for name, key in self.active.items()
        }
        self.table = replace(self.table, entries=MappingProxyType(waiting))
        for replica in drains.keys() & self.replicas.keys():
            record = self.replicas[replica]
            record.drain = drains[replica]
            if record.drain.done:
                record.phase = ReplicaPhase.DRAINED

    def handle(self, event: Event) -> list[Command]:
        """Take one event in and say what is to be done about it."""
        commands = self._take_in(event)
        if self._is_starting():
            return commands
        if not isinstance(event, AdapterLoaded | AdapterUnloaded):
            commands += self._replan()
        return commands + self._settle()

    def _take_in(self, event: Event) -> list[Command]:
        match event:
            case ReplicaReady():
                return self._on_replica_ready(event)
            case ReplicaLost():
                return self._on_replica_lost(event)
            case ReplicaGivenUp(replica_id=replica_id, reason=reason):
                record = self.replicas[replica_id]
                if record.phase in (ReplicaPhase.STARTING, ReplicaPhase.UNKNOWN):
                    record.phase, record.reason = ReplicaPhase.FAILED, reason
            case AdapterRegistered(adapter=adapter):
                self._adopt(adapter)
                return [SaveAdapter(adapter)]
            case AdapterRemoved(name=name):
                return self._on_adapter_removed(name)
            case AdapterWithdrawn(version_id=version):
                return self._on_adapter_withdrawn(version)
            case AdapterLoaded(replica_id=replica_id, version_id=version):
                self.replicas[replica_id].move(version, CopyPhase.LOADING, CopyPhase.HELD)
            case AdapterLoadFailed(replica_id=replica_id, version_id=version, reason=reason):
                if self.replicas[replica_id].move(version, CopyPhase.LOADING, None):
                    self.replicas[replica_id].refused[version] = reason
            case AdapterUnloaded(replica_id=replica_id, version_id=version):
                self.replicas[replica_id].move(version, CopyPhase.RETIRING, None)
            case EpochElapsed(demand_tokens_per_s=demand):
                self.demand_tokens_per_s = demand
                return self._on_epoch_elapsed()
            case DrainRequested(replica_id=replica_id, order=order):
                return cluster_drain.request(self.replicas[replica_id], order)
            case ReplicaDrained(replica_id=replica_id):
                return cluster_drain.drained(self.replicas[replica_id])
            case UndrainRequested(replica_id=replica_id):
                return cluster_drain.take_back(self.replicas[replica_id])
        return []

    # -- what others ask -----------------------------------------------------------------------

    @property
    def holdings(self) -> Holdings:
        """Who holds what, as it is now and as it changes."""
        return Holdings(
            replicas=self.replicas,
            adapters=self.adapters,
            active=self.active,
            superseded=self.superseded,
            plan=self.plan,
        )

    def holders(self, version: VersionId) -> tuple[ReplicaId, ...]:
        """The replicas that acknowledged this version and are not dropping it."""
        return self.holdings.holders(version)

    def is_served(self, version: VersionId) -> bool:
        """Whether the published table names this version and a holder of it."""
        adapter = self.adapters.get(version)
        entry = self.table.entries.get(adapter.name) if adapter is not None else None
        return entry is not None and entry.version_id == version and bool(entry.holders)

    def refusal(self, version: VersionId) -> str | None:
        """Why no replica holds or is loading this version, or None while there is hope."""
        records = self.replicas.values()
        if self._is_starting() or any(version in record.copies for record in records):
            return None
        reasons = sorted({reason for record in records if (reason := record.refused.get(version))})
        if reasons:
            return "; ".join(reasons)
        phases = {copy.phase for record in records for copy in record.copies.values()}
        if phases & {CopyPhase.LOADING, CopyPhase.RETIRING} and self.plan.replicas_of(version):
            return None
        return self.holdings.why_no_room(version)

    def drain_problem(self, leaving: Collection[ReplicaId]) -> str | None:
        """What would be lost if these replicas were drained now, or None: no replica would be left, or
        adapters that are held now would find no room on the others."""
        staying = [record for record in self._ready() if record.replica_id not in leaving]
        if not staying:
            return "no replica would be left that is ready"
        names = cluster_drain.homeless(self.holdings, self._planned_on(staying).holders)
        return None if names is None else f"no other replica has room for {names}"

    def drain_waits_for(self, replica: ReplicaId) -> tuple[VersionId, ...]:
        """The versions that keep a draining replica from leaving: no other replica holds them yet."""
        record = self.replicas[replica]
        if record.gone:
            return cluster_drain.missing(self.holdings)
        if record.phase is not ReplicaPhase.DRAINING or record.leaving:
            return ()
        return tuple(
            entry.version_id
            for entry in self.table.entries.values()
            if any(holder.replica_id == replica for holder in entry.holders)
        )

    # -- events --------------------------------------------------------------------------------

    def _on_replica_ready(self, event: ReplicaReady) -> list[Command]:
        replica_id = event.spec.replica_id
        record = self.replicas.setdefault(replica_id, ReplicaRecord(replica_id, ReplicaPhase.READY))
        if record.phase is ReplicaPhase.DRAINED:
            return [StopReplica(replica_id)]
        record.phase, record.spec, record.address = ReplicaPhase.READY, event.spec, event.address
        record.reason, record.leaving, record.gone = "", False, False
        record.copies = {
            version: Copy(CopyPhase.HELD, self._size_bytes(version)) for version in sorted(event.resident)
        }
        record.refused.clear()
        return self._resume(record, event) + cluster_drain.ready(record, is_draining=event.draining)

    def _resume(self, record: ReplicaRecord, event: ReplicaReady) -> list[Command]:
        """Ask again for what an earlier controller had asked for, to hear how it ends."""
        commands: list[Command] = []
        for version in sorted(event.loading | event.dropping):
            adapter = self.adapters.get(version)
            record.copies[version] = Copy(CopyPhase.RETIRING, self._size_bytes(version))
            if adapter is None or version in event.dropping:
                commands.append(UnloadAdapter(record.replica_id, version))
            else:
                record.copies[version].phase = CopyPhase.LOADING
                commands.append(LoadAdapter(record.replica_id, adapter))
        return commands

    def _on_replica_lost(self, event: ReplicaLost) -> list[Command]:
        record = self.replicas[event.replica_id]
        if record.phase is ReplicaPhase.DRAINED:
            return []
        record.copies.clear()
        record.refused.clear()
        record.reason = event.reason
        if record.drain is not None:
            cluster_drain.lost(record)
            return []
        record.leaving = False
        if record.restarts >= self.max_restarts:
            record.phase = ReplicaPhase.FAILED
            return []
        record.phase = ReplicaPhase.STARTING
        record.restarts += 1
        return [StartReplica(record.replica_id, record.restarts)]

    def _on_adapter_removed(self, name: AdapterName) -> list[Command]:
        version = self.active.pop(name, None)
        gone = self.superseded.pop(name, [])
        return self._forget(gone if version is None else [*gone, version])

    def _on_adapter_withdrawn(self, version: VersionId) -> list[Command]:
        """Take a registration back: the version before it, if it is still there, is active again."""
        adapter = self.adapters.get(version)
        if adapter is None or self.active.get(adapter.name) != version:
            return []
        older = self.superseded.get(adapter.name, [])
        if older:
            self.active[adapter.name] = older.pop()
        else:
            del self.active[adapter.name]
        return self._forget([version])

    def _on_epoch_elapsed(self) -> list[Command]:
        """Give refused loads another chance, ask again for drops that nobody confirmed, and let a
        replica that lasted an epoch earn one restart back."""
        commands: list[Command] = []
        for record in self.replicas.values():
            record.refused.clear()
            if record.phase is ReplicaPhase.READY:
                record.restarts = max(0, record.restarts - 1)
                commands += [
                    UnloadAdapter(record.replica_id, version)
                    for version, copy in sorted(record.copies.items())
                    if copy.phase is CopyPhase.RETIRING
                ]
        return commands

    def _adopt(self, adapter: AdapterVersion) -> None:
        before = self.active.get(adapter.name)
        if before == adapter.version_id:
            return
        older = self.superseded.setdefault(adapter.name, [])
        if before is not None:
            older.append(before)
        if adapter.version_id in older:
            older.remove(adapter.version_id)
        self.adapters[adapter.version_id] = adapter
        self.active[adapter.name] = adapter.version_id

    def _forget(self, versions: Iterable[VersionId]) -> list[Command]:
        commands: list[Command] = []
        for version in versions:
            del self.adapters[version]
            commands.append(DeleteAdapter(version))
        return commands

    # -- decisions -----------------------------------------------------------------------------

    def _is_starting(self) -> bool:
        """Nothing is planned or published before every replica is known to be there or not: the first
        table shows all, and a restarted controller does not move adapters it has not looked for."""
        waiting_for = {ReplicaPhase.UNKNOWN}
        if not self._recovering and not self.published:
            waiting_for.add(ReplicaPhase.STARTING)
        return any(record.phase in waiting_for for record in self.replicas.values())

    def _replan(self) -> list[Command]:
        plan = self._planned_on(self._ready())
        if plan == self.plan:
            return []
        self.plan = plan
        return [SavePlan(plan)]

    def _planned_on(self, records: Iterable[ReplicaRecord]) -> Placement:
        """What the policy makes of these replicas; draining ones are never among them."""
        return self.policy.plan(
            Snapshot(
                adapters=tuple(self.adapters[version] for _, version in sorted(self.active.items())),
                replicas=tuple(record.spec for record in records if record.spec is not None),
                current=self.plan,
                demand_tokens_per_s=self.demand_tokens_per_s,
                seed=self.seed,
                profiles=self.profiles,
                epoch_s=self.epoch_s,
            )
        )

    def _settle(self) -> list[Command]:
        """Publish what is true now, let go of what nobody is sent to, load what is planned."""
        commands = self._forget_superseded()
        table = self._next_table()
        if table is not None:
            self.table, self.published = table, True
            commands.append(PublishTable(table))
        commands += cluster_drain.leave(self.replicas.values(), self.table)
        commands += cluster_drain.close(self.holdings)
        commands += self._retire()
        commands += self._load()
        return commands

    def _next_table(self) -> RoutingTable | None:
        """The table that follows from the copies held now, or None if it is the one published."""
        table = table_of(self.holdings, self.table)
        return None if self.published and table.same_content(self.table) else table

    def _forget_superseded(self) -> list[Command]:
        """Drop from the registry the old versions that a newer one with a holder has replaced."""
        commands: list[Command] = []
        for name, older in self.superseded.items():
            if not older:
                continue
            chain = [*older, self.active[name]] if name in self.active else older
            served = next((i for i in reversed(range(len(chain))) if self.holders(chain[i])), 0)
            obsolete = min(served, len(older))
            commands += self._forget(older[:obsolete])
            del older[:obsolete]
        return commands

    def _retire(self) -> list[Command]:
        """Drop the held copies that the published table sends nobody to."""
        commands: list[Command] = []
        active = set(self.active.values())
        needed = {
            (entry.version_id, holder.replica_id)
            for entry in self.table.entries.values()
            for holder in entry.holders
        }
        needed.update(
            (version, holder.replica_id)
            for version, holders in self.plan.holders.items()
            if version in active
            for holder in holders
        )
        for record in self._ready():
            for version in sorted(record.copies):
                if (version, record.replica_id) not in needed and record.holds(version):
                    record.copies[version].phase = CopyPhase.RETIRING
                    commands.append(UnloadAdapter(record.replica_id, version))
        return commands

    def _load(self) -> list[Command]:
        """Load what is planned and absent, where there is room now; the rest waits for an unload."""
        commands: list[Command] = []
        for version in sorted(self.active.values()):
            adapter = self.adapters[version]
            for replica in sorted(self.plan.replicas_of(version)):
                record = self.replicas[replica]
                if version in record.copies or version in record.refused or not record.has_room(adapter):
                    continue
                record.copies[version] = Copy(CopyPhase.LOADING, adapter.size_bytes)
                commands.append(LoadAdapter(replica, adapter))
        return commands

    def _size_bytes(self, version: VersionId) -> int:
        """What is registered; nothing for a stray version, which is dropped at once."""
        adapter = self.adapters.get(version)
        return adapter.size_bytes if adapter is not None else 0

    def _ready(self) -> list[ReplicaRecord]:
        return [record for record in self.replicas.values() if record.phase is ReplicaPhase.READY]
