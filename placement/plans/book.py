"""The plan in force, the ones before it, and the one that is frozen: what the state machine decides from.

No I/O: it answers with the commands that make each change durable.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from placement.cluster import messages
from placement.cluster.messages import Command, Event, KeepPlan, SaveFreeze, SavePlan
from placement.types import Placement, ReplicaId, VersionId

MAX_EARLIER = 16
"""How many plans before the present one are remembered."""

_MIGRATION = "requests were moved"
"""Ends the plan that was decided on before. What migrations add after it is decided by nobody, and kept by
nobody: as long as this is the last entry's end, the plan in force is theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierPlan:
    """A plan that was in force, numbered in order, and why the next one took its place."""

    number: int
    plan: Placement
    ended_by: str


class PlanBook:
    """`plan` is in force. `frozen` is the plan that stays until it is unfrozen, None if policies decide;
    `problem` says why the last plan asked for was refused or could not be carried out."""

    def __init__(
        self,
        plan: Placement | None = None,
        *,
        earlier: Iterable[EarlierPlan] = (),
        frozen: Placement | None = None,
    ) -> None:
        self.plan = plan if plan is not None else Placement()
        self.earlier = sorted(earlier, key=lambda one: one.number)[-MAX_EARLIER:]
        self.frozen = frozen
        self.problem: str | None = None
        self._planned_on: tuple[Placement, Mapping[ReplicaId, frozenset[VersionId]]] | None = None

    @property
    def planned_on(self) -> Mapping[ReplicaId, frozenset[VersionId]]:
        """The versions that the plan in force puts on each replica; worked out once per plan."""
        known = self._planned_on
        if known is None or known[0] is not self.plan:
            found: dict[ReplicaId, list[VersionId]] = {}
            for version, holders in self.plan.holders.items():
                for holder in holders:
                    found.setdefault(holder.replica_id, []).append(version)
            turned = {replica: frozenset(versions) for replica, versions in found.items()}
            known = self._planned_on = (self.plan, turned)
        return known[1]

    def adopt(self, plan: Placement) -> list[Command]:
        """The plan is in force from now on."""
        if plan == self.plan:
            return []
        self.plan = plan
        return [SavePlan(plan)]

    def keep(self, before: Placement, event: Event) -> list[Command]:
        """Keep the plan that was in force when the event came, to go back to, if the present one is another.
        A change that goes with an adapter is part of the plan before; one that was kept last is not kept
        twice. Of migrations between two decisions only the first keeps a plan, and the next decision follows
        that one."""
        why = _words(event)
        last = self.earlier[-1] if self.earlier else None
        is_migrated = last is not None and last.ended_by == _MIGRATION
        # What migrations have added and this event has left is decided on now.
        is_confirmed = is_migrated and self.problem is None and not isinstance(event, messages.PlanGiven)
        if why is None or not before.holders or (before == self.plan and not is_confirmed):
            return []
        if is_migrated and why == _MIGRATION:
            return []
        number, commands = 1 if last is None else last.number + 1, list[Command]()
        if last is not None and (is_migrated or last.plan == before):
            before = last.plan
            self.earlier.pop()
            commands.append(KeepPlan(last.number, None))
        if before == self.plan:
            return commands
        self.earlier.append(EarlierPlan(number=number, plan=before, ended_by=why))
        commands.append(KeepPlan(number, before, why))
        while len(self.earlier) > MAX_EARLIER:
            commands.append(KeepPlan(self.earlier.pop(0).number, None))
        return commands

    def freeze(self, plan: Placement | None) -> list[Command]:
        """This plan is to stay; None: none is."""
        if plan == self.frozen:
            return []
        self.frozen = plan
        return [SaveFreeze(plan)]

    def go_back(self) -> tuple[Placement | None, list[Command]]:
        """Take out the plan before the present one; None if there is none."""
        if not self.earlier:
            return None, []
        last = self.earlier.pop()
        return last.plan, [KeepPlan(last.number, None)]


def _words(event: Event) -> str | None:
    """Why a plan was changed, in words; None for what is nobody's decision."""
    match event:
        case messages.EpochElapsed():
            return "an epoch"
        case messages.ReplicaReady(spec=spec):
            return f"{spec.replica_id} came"
        case messages.ReplicaLost(replica_id=replica_id):
            return f"{replica_id} was lost"
        case messages.DrainRequested(replica_id=replica_id):
            return f"{replica_id} is drained"
        case messages.UndrainRequested(replica_id=replica_id):
            return f"{replica_id} is undrained"
        case messages.FreezeRequested(frozen=frozen):
            return "it was frozen" if frozen else "it was unfrozen"
        case messages.PlanGiven(is_reactive=is_reactive):
            return _MIGRATION if is_reactive else "a plan was applied"
    return None
