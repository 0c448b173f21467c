"""How replicas come to the `max_lora_rank` that the plan names: restarted one at a time, drained first.

READY → DRAINING (serves what no other holds) → leaving (the setting is remembered, it finishes its work) →
STARTING with the setting. The steps are those of an operator's drain (`cluster.drain`); this module decides
when one begins, and takes it back while it can be. What is best follows from `plans.rank_sizing`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from placement.cluster import messages
from placement.cluster.records import ReplicaPhase, ReplicaRecord, ResizeOrder
from placement.plans.rank_sizing import (
    RankPlan,
    RankSizingLimits,
    can_spare,
    holds_all,
    next_restart,
    restart_cost_tokens,
    size_ranks,
)
from placement.plans.restart_debts import RestartDebts
from placement.types import AdapterVersion, Placement, ReplicaId, ReplicaSpec, Snapshot

MAX_WAITING_EPOCHS = 3
"""After so many epochs a replica that others cannot relieve serves on."""

OVERLOADED_EPOCHS = 3
"""So many in a row are no peak of a noisy forecast: the others may be overloaded for a better setting."""

_AT_REST = (ReplicaPhase.READY, ReplicaPhase.DRAINED, ReplicaPhase.FAILED)


class Resizer:
    """Decides at each epoch which replica restarts with which setting. Without `limits` none ever does.

    A replica that did not come up with its new setting is started with the one before, and not resized again;
    one that did is not resized again before it has repaid that. `sizing` is the last decision.
    """

    def __init__(self, limits: RankSizingLimits | None = None, *, deadline_s: float = 30.0) -> None:
        self.limits = limits
        self.sizing = RankPlan()
        self._deadline_s = deadline_s
        self._given_up: set[ReplicaId] = set()
        self._debts = RestartDebts(limits or RankSizingLimits())
        self._costs: dict[ReplicaId, tuple[int, float]] = {}
        """Of the restarts under way: the setting before, and what it costs in tokens."""
        self._num_waited = 0
        self._num_overloaded = 0

    def take_in(
        self,
        event: messages.Event,
        replicas: Mapping[ReplicaId, ReplicaRecord],
        look: Callable[[], Snapshot],
        frozen: Placement | None = None,
    ) -> list[messages.Command]:
        """What an event that the records have heard of means for settings; before plans are made anew.

        `look` gives the replicas that are ready. While a plan is `frozen`, its settings count; replicas that
        it names none for stay as they are.
        """
        if self.limits is None:
            return []
        commands: list[messages.Command] = []
        for record in replicas.values():
            commands += self._mended(record, event)
        waiting = [record for record in replicas.values() if record.resize is not None and _may_stay(record)]
        is_epoch = isinstance(event, messages.EpochElapsed)
        if not waiting and not is_epoch:
            return commands
        snapshot = _as_set(look(), replicas)
        for record in waiting:
            self._reconsider(record, snapshot, is_epoch=is_epoch)
        if is_epoch:
            self._debts.elapse(snapshot)
            held = self._held(snapshot) if frozen is None else frozenset()
            if frozen is not None:
                self.sizing = RankPlan(max_lora_ranks=frozen.max_lora_ranks, reason="the plan is frozen")
            elif all(record.resize is None for record in replicas.values()):
                # Chosen for the replicas that are left, settings would change with each one that is away.
                self.sizing = size_ranks(snapshot, self.limits, begun=self.sizing.max_lora_ranks, held=held)
                self._num_overloaded = self._num_overloaded + 1 if self.sizing.utilisation > 1 else 0
            if all(record.phase in _AT_REST for record in replicas.values()):
                self._begin(replicas, snapshot, held, is_frozen=frozen is not None)
        return commands

    def _held(self, snapshot: Snapshot) -> frozenset[ReplicaId]:
        """Those that have a restart to repay, unless an adapter waits for a replica that takes its rank."""
        return self._debts.owing if holds_all(snapshot.adapters, snapshot.replicas) else frozenset()

    def lowered(
        self, specs: Iterable[ReplicaSpec], adapters: Iterable[AdapterVersion]
    ) -> tuple[ReplicaSpec, ...]:
        """The replicas as plans should take them: those to be set lower as if they were already, if all
        adapters find room so."""
        specs = tuple(specs)
        wanted = self.sizing.max_lora_ranks
        low = tuple(
            replace(
                spec, max_lora_rank=min(spec.max_lora_rank, wanted.get(spec.replica_id, spec.max_lora_rank))
            )
            for spec in specs
        )
        return low if low != specs and holds_all(adapters, low) else specs

    def named(self, plan: Placement, snapshot: Snapshot) -> Placement:
        """The plan with the settings that are wanted of the snapshot's replicas, but for those that are too
        low for what it places there."""
        if self.limits is None or plan.max_lora_ranks or not self.sizing.max_lora_ranks:
            return plan
        ranks = {adapter.version_id: adapter.rank for adapter in snapshot.adapters}
        needed: dict[ReplicaId, int] = {}
        for version, holders in plan.holders.items():
            for holder in holders:
                needed[holder.replica_id] = max(needed.get(holder.replica_id, 0), ranks.get(version, 0))
        named = {
            spec.replica_id: wanted
            for spec in sorted(snapshot.replicas, key=lambda spec: spec.replica_id)
            if (wanted := self.sizing.max_lora_ranks.get(spec.replica_id)) is not None
            and wanted >= needed.get(spec.replica_id, 0)
        }
        return replace(plan, max_lora_ranks=MappingProxyType(named))

    def _mended(self, record: ReplicaRecord, event: messages.Event) -> list[messages.Command]:
        """The order's end: the replica is up with it or did not come up, or an operator has other wishes."""
        order = record.resize
        if order is None:
            return []
        replica = record.replica_id
        match event:
            case messages.ReplicaReady(spec=spec) if spec.replica_id == replica:
                if spec.max_lora_rank != order.max_lora_rank:
                    # Or it would be tried again and again.
                    self._given_up.add(replica)
                elif replica in self._costs:
                    before, tokens = self._costs.pop(replica)
                    self._debts.owe(replica, before=before, tokens=tokens)
            case messages.ReplicaDrained(replica_id=other) if other == replica:
                record.resize = replace(order, is_started=record.phase is ReplicaPhase.STARTING)
            case messages.ReplicaLost(replica_id=other) if other == replica:
                return self._lost(record, order)
        if record.drain is not None or record.phase in _AT_REST:
            record.resize = None
        return []

    def _lost(self, record: ReplicaRecord, order: ResizeOrder) -> list[messages.Command]:
        if not order.is_started:
            is_next = record.max_lora_rank == order.max_lora_rank and record.drain is None
            record.resize = replace(order, is_started=True) if is_next else None
            return []
        # It may be the setting that it did not come up with.
        self._given_up.add(record.replica_id)
        record.resize, record.max_lora_rank = None, order.before
        return [messages.SaveMaxLoraRank(record.replica_id, order.before)]

    def _reconsider(self, record: ReplicaRecord, snapshot: Snapshot, *, is_epoch: bool) -> None:
        """Let a replica that has not left serve on if the others cannot do without it."""
        self._num_waited += is_epoch
        is_late = self._num_waited >= MAX_WAITING_EPOCHS
        if is_late:
            self._given_up.add(record.replica_id)
        spared = record.spec is not None and can_spare(snapshot.adapters, record.spec, snapshot.replicas)
        if is_late or not spared:
            record.phase, record.resize = ReplicaPhase.READY, None

    def _begin(
        self,
        replicas: Mapping[ReplicaId, ReplicaRecord],
        snapshot: Snapshot,
        held: frozenset[ReplicaId],
        *,
        is_frozen: bool,
    ) -> None:
        limits = self.limits or RankSizingLimits()
        wanted = {
            replica: rank
            for replica, rank in self.sizing.max_lora_ranks.items()
            if replica not in self._given_up and replica not in held
        }
        is_overloaded = is_frozen or self._num_overloaded >= OVERLOADED_EPOCHS
        chosen = next_restart(snapshot, wanted, limits=limits, is_overloaded=is_overloaded)
        if chosen is None:
            return
        record = replicas[chosen]
        if record.spec is not None:
            cost = restart_cost_tokens(snapshot, chosen, limits)
            self._costs[chosen] = record.spec.max_lora_rank, cost
        record.phase = ReplicaPhase.DRAINING
        record.resize = ResizeOrder(
            max_lora_rank=wanted[chosen], before=record.max_lora_rank, deadline_s=self._deadline_s
        )
        self._num_waited = 0


def _may_stay(record: ReplicaRecord) -> bool:
    """Whether its drain has not gone so far that it cannot be taken back."""
    return record.phase is ReplicaPhase.DRAINING and not record.leaving


def _as_set(snapshot: Snapshot, replicas: Mapping[ReplicaId, ReplicaRecord]) -> Snapshot:
    """The snapshot with each replica's setting as it is."""
    specs = tuple(replicas[spec.replica_id].spec or spec for spec in snapshot.replicas)
    return replace(snapshot, replicas=specs)
