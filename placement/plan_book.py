"""The plan in force, the ones before it, and the one that is frozen: what the state machine decides from.

No I/O: it answers with the commands that make each change durable.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from placement.cluster_messages import Command, KeepPlan, SaveFreeze, SavePlan
from placement.types import Placement

MAX_EARLIER = 16
"""How many plans before the present one are remembered."""


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

    def adopt(self, plan: Placement, why: str | None) -> list[Command]:
        """The plan is in force from now on. `why` is what the one before made way for, and keeps that one
        to go back to; None for a change that is nobody's decision and goes with the present one."""
        if plan == self.plan:
            return []
        commands: list[Command] = []
        if why is not None and self.plan.holders:
            number = self.earlier[-1].number + 1 if self.earlier else 1
            self.earlier.append(EarlierPlan(number=number, plan=self.plan, ended_by=why))
            commands.append(KeepPlan(number, self.plan, why))
            while len(self.earlier) > MAX_EARLIER:
                commands.append(KeepPlan(self.earlier.pop(0).number, None))
        self.plan = plan
        return [*commands, SavePlan(plan)]

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
