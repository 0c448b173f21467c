"""The cluster's state machine: events in, commands out, no I/O and no clock.

It knows which adapters are registered, which copies each replica holds, and what the routers have been
told. The live controller and the simulator run this same object. What an event does to one replica is in
`cluster.replicas` and `cluster.drain`, how tables follow from copies in `cluster.tables`, how copies follow
from the plan in `cluster.settle`; which plan is in force, and was before, in `plans.book`.

A copy's life: (none) → LOADING → HELD → RETIRING → (none). A copy is in the routing table only while it
is HELD; it is retired only after a table without it was published; the last copy of a version that the
table still names is never retired. A plan is checked before it is adopted (`veto`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from placement.cluster import drain as cluster_drain
from placement.cluster import messages
from placement.cluster import replicas as cluster_replicas
from placement.cluster import settle as cluster_settle
from placement.cluster.messages import Command, Event, PublishTable, SaveAdapter
from placement.cluster.records import CopyPhase, DrainOrder, Holdings, ReplicaPhase, ReplicaRecord
from placement.cluster.resize import Resizer
from placement.cluster.tables import TableMaker
from placement.plans.book import EarlierPlan, PlanBook
from placement.plans.repair import repaired
from placement.plans.veto import veto
from placement.policies.base import PlacementPolicy
from placement.profile import Profile
from placement.routing.replica_cost import CostBook
from placement.table import RoutingTable, TableEntry
from placement.types import (
    AdapterName,
    AdapterTerms,
    AdapterVersion,
    Placement,
    ReplicaId,
    Snapshot,
    VersionId,
)


class ClusterState:
    """One door: `handle(event) -> commands`, `handle_many` for many at once; commands are to run in order."""

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
        earlier_plans: Iterable[EarlierPlan] = (),
        frozen_plan: Placement | None = None,
        max_loads: int = cluster_settle.MAX_LOADS,
        resizer: Resizer | None = None,
        max_lora_ranks: Mapping[ReplicaId, int] = MappingProxyType({}),
        terms: Mapping[AdapterName, AdapterTerms] = MappingProxyType({}),
    ) -> None:
        """Start empty, or from what a store remembers (`adapters` in order of registration).

        `recovering`: replicas of an earlier controller may still be running and routers on its tables.
        """
        self.policy = policy
        self.base_model = base_model
        self.seed = seed
        self.max_restarts = max_restarts
        self.profiles = profiles
        self._tables = TableMaker(CostBook(profiles))
        self.epoch_s = epoch_s
        self.max_loads = max_loads
        self.resizer = resizer or Resizer()
        self.book = PlanBook(plan, earlier=earlier_plans, frozen=frozen_plan)
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
        self.terms = {name: terms[name] for name in terms if name in self.active}
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
        for replica in max_lora_ranks.keys() & self.replicas.keys():
            self.replicas[replica].max_lora_rank = max_lora_ranks[replica]

    def handle(self, event: Event) -> list[Command]:
        """Take one event in and say what is to be done about it."""
        before = self.plan
        commands = self._take_in(event)
        if self._is_starting():
            return commands
        is_chosen = isinstance(event, messages.PlanGiven) and self.book.frozen is None
        follows = self._follow(event, plans=not is_chosen and not isinstance(event, messages.Answer))
        # Not before: a plan that cannot be carried out at all makes way at once.
        return commands + self.book.keep(before, event) + follows

    def handle_many(self, events: Sequence[messages.Together]) -> list[Command]:
        """Take several answers and registrations in at once, which takes no longer than one."""
        commands = [command for event in events for command in self._take_in(event)]
        if not events or self._is_starting():
            return commands
        plans = any(isinstance(event, messages.AdapterRegistered) for event in events)
        return commands + self._follow(events[-1], plans=plans)

    def _follow(self, event: Event, *, plans: bool) -> list[Command]:
        commands = self.resizer.take_in(event, self.replicas, self.snapshot, self.book.frozen)
        return commands + (self._replan() if plans else []) + self._settle()

    def _take_in(self, event: Event) -> list[Command]:
        match event:
            case messages.ReplicaReady(spec=spec):
                replica_id = spec.replica_id
                first = ReplicaRecord(replica_id, ReplicaPhase.READY)
                record = self.replicas.setdefault(replica_id, first)
                return cluster_replicas.ready(record, event, self.adapters)
            case messages.ReplicaLost(replica_id=replica_id, reason=reason):
                return cluster_replicas.lost(self.replicas[replica_id], reason, self.max_restarts)
            case messages.ReplicaGivenUp(replica_id=replica_id, reason=reason):
                cluster_replicas.given_up(self.replicas[replica_id], reason)
            case messages.AdapterRegistered(adapter=adapter):
                self._adopt(adapter)
                return [SaveAdapter(adapter)]
            case messages.AdapterTermsChanged(name=name, terms=terms) if name in self.active:
                self.terms[name] = terms
            case messages.AdapterRemoved(name=name):
                return self._on_adapter_removed(name)
            case messages.AdapterWithdrawn(version_id=version):
                return self._on_adapter_withdrawn(version)
            case messages.AdapterLoaded(replica_id=replica_id, version_id=version):
                self.replicas[replica_id].move(version, CopyPhase.LOADING, CopyPhase.HELD)
            case messages.AdapterLoadFailed(replica_id=replica_id, version_id=version, reason=reason):
                cluster_replicas.not_loaded(self.replicas[replica_id], version, reason, self.adapters)
            case messages.AdapterUnloaded(replica_id=replica_id, version_id=version):
                cluster_replicas.unloaded(self.replicas[replica_id], version, self.adapters)
            case messages.EpochElapsed(demand_tokens_per_s=demand):
                self.demand_tokens_per_s = demand
                return cluster_replicas.epoch_elapsed(self.replicas.values())
            case messages.DrainRequested(replica_id=replica_id, order=order):
                return cluster_drain.request(self.replicas[replica_id], order)
            case messages.ReplicaDrained(replica_id=replica_id):
                return cluster_drain.drained(self.replicas[replica_id])
            case messages.UndrainRequested(replica_id=replica_id):
                return cluster_drain.take_back(self.replicas[replica_id])
            case messages.PlanGiven() | messages.FreezeRequested() | messages.RollbackRequested():
                return self._on_plan_wish(event)
        return []

    def _on_plan_wish(
        self, event: messages.PlanGiven | messages.FreezeRequested | messages.RollbackRequested
    ) -> list[Command]:
        """What an operator wants of the plan; `_replan` follows from what is frozen then."""
        match event:
            case messages.PlanGiven(frozen=False) if self.book.frozen is not None:
                pass  # What is frozen stays, and no plan is kept that was never in force.
            case messages.PlanGiven(plan=plan, frozen=frozen) if self.plan_problem(plan) is None:
                kept = self.book.freeze(plan) if frozen else []
                return kept + self.book.adopt(plan)
            case messages.FreezeRequested(frozen=frozen):
                return self.book.freeze(self.plan if frozen else None)
            case messages.RollbackRequested() if not self._is_starting():
                before, commands = self.book.go_back()
                return commands if before is None else commands + self.book.freeze(before)
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
            planned_on=self.book.planned_on,
        )

    @property
    def plan(self) -> Placement:
        """The plan in force."""
        return self.book.plan

    def proposed(self, snapshot: Snapshot | None = None) -> tuple[Placement, str | None]:
        """The plan that the policy would make now, or of another snapshot, and why it would be refused, if
        it would."""
        snapshot = self.snapshot() if snapshot is None else snapshot
        try:
            plan = self.resizer.named(self.policy.plan(snapshot), snapshot)
        except Exception as error:
            # Whatever it is: the cluster goes on with the plan that it has, and says why.
            return self.plan, f"it failed: {type(error).__name__}: {error}"
        return plan, veto(snapshot, plan)

    def plan_problem(self, plan: Placement) -> str | None:
        """Why this plan cannot be adopted now, or None."""
        if self._is_starting():
            return "the replicas are not all there yet"
        return veto(self.snapshot(), plan)

    def snapshot(self, records: Iterable[ReplicaRecord] | None = None) -> Snapshot:
        """What a plan for these replicas, by default the ready ones, is made from; draining ones are never
        among them."""
        records = self._ready() if records is None else records
        adapters = tuple(self.adapters[version] for _, version in sorted(self.active.items()))
        specs = (record.spec for record in records if record.spec is not None)
        return Snapshot(
            adapters=adapters,
            replicas=self.resizer.lowered(specs, adapters),
            current=self.plan,
            demand_tokens_per_s=self.demand_tokens_per_s,
            seed=self.seed,
            profiles=self.profiles,
            epoch_s=self.epoch_s,
            weights={self.active[name]: one.weight for name, one in self.terms.items()},
            slos={self.active[name]: one.slo for name, one in self.terms.items() if one.slo is not None},
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
        names = cluster_drain.homeless(self.holdings, self._planned_on(self.snapshot(staying)).holders)
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

    def _on_adapter_removed(self, name: AdapterName) -> list[Command]:
        version = self.active.pop(name, None)
        gone = self.superseded.pop(name, [])
        self.terms.pop(name, None)
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
            self.terms.pop(adapter.name, None)
        return self._forget([version])

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
            commands += cluster_replicas.forgotten(self.replicas.values(), version)
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
        return self.book.adopt(self._planned_on(self.snapshot(), is_final=True))

    def _planned_on(self, snapshot: Snapshot, *, is_final: bool = False) -> Placement:
        """What is to be in force with these replicas; `is_final` notes what the policy got wrong."""
        frozen, plan, problem = self.book.frozen, self.plan, None
        if frozen is None:
            plan, problem = self.proposed(snapshot)
        if is_final:
            self.book.problem = problem and f"the plan of policy {self.policy.name} is refused: {problem}"
        if frozen is None and problem is None:
            return plan
        return repaired(snapshot, frozen or self.plan, self.holdings.all_holders())

    def _settle(self) -> list[Command]:
        """Publish what is true now, let go of what nobody is sent to, load what is planned."""
        commands: list[Command] = []
        for _ in range(2):
            holdings = self.holdings
            waiting = cluster_settle.waiting_copies(holdings)
            full = cluster_settle.crowded(holdings, waiting)
            commands += self._publish(holdings, full) + self._forget_superseded()
            commands += cluster_drain.leave(self.replicas.values(), self.table)
            commands += cluster_drain.close(holdings)
            commands += cluster_settle.retire(holdings, self.table)
            commands += cluster_settle.load(holdings, waiting, self.max_loads)
            if not cluster_settle.is_stuck(holdings, waiting):
                break
            way = cluster_settle.make_way(holdings, full)
            if way:
                return commands + way
            plan = cluster_settle.possible(holdings, waiting)
            if plan == self.plan:
                break
            self.book.problem = (
                "no replica has a free place to exchange copies over: some stay where they are"
            )
            commands += self.book.adopt(plan)
        return commands

    def _publish(self, holdings: Holdings, full: frozenset[ReplicaId]) -> list[Command]:
        """The table that follows from the copies held now, unless it is the one published."""
        table = self._tables.make(holdings, self.table, full)
        if self.published and table.same_content(self.table):
            return []
        self.table, self.published = table, True
        return [PublishTable(table)]

    def _forget_superseded(self) -> list[Command]:
        """Drop from the registry the old versions that the published table has a newer one of, held by
        somebody, in place of."""
        commands: list[Command] = []
        for name, older in self.superseded.items():
            entry = self.table.entries.get(name)
            if not older or entry is None or not entry.holders:
                continue
            chain = [*older, self.active[name]]
            obsolete = chain.index(entry.version_id)
            commands += self._forget(older[:obsolete])
            del older[:obsolete]
        return commands

    def _ready(self) -> list[ReplicaRecord]:
        return [record for record in self.replicas.values() if record.phase is ReplicaPhase.READY]
