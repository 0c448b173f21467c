"""Which replicas have not repaid their last restart yet, so that none restarts again before it has.

A forecast of a short window says something else every epoch, and each time a change looks as if it repaid.
What counts is what the cluster was asked for since: as long as a setting has not spared it the cost of its
restart, another one is more likely noise than gain.
"""

from dataclasses import dataclass

from placement.plans.rank_sizing import RankSizingLimits, spared_tokens
from placement.types import ReplicaId, Snapshot


@dataclass(slots=True)
class _Debt:
    """The setting before, what is left to repay, and for how many epochs more it is asked for."""

    before: int
    tokens: float
    epochs: int


class RestartDebts:
    """`owe` when a replica has come up with another setting, `elapse` with each epoch. A debt that is not
    repaid within the horizon is remitted: the change was a mistake, and not to be kept up for ever."""

    def __init__(self, limits: RankSizingLimits) -> None:
        self._limits = limits
        self._debts: dict[ReplicaId, _Debt] = {}

    @property
    def owing(self) -> frozenset[ReplicaId]:
        """Those that are not to restart yet."""
        return frozenset(self._debts)

    def owe(self, replica: ReplicaId, *, before: int, tokens: float) -> None:
        """The replica was set to `before`; its restart has cost so many tokens."""
        self._debts[replica] = _Debt(before, tokens, self._limits.horizon_epochs)

    def elapse(self, snapshot: Snapshot) -> None:
        """An epoch is over: what its settings have spared the cluster repays all debts alike."""
        if not self._debts:
            return
        there = {spec.replica_id for spec in snapshot.replicas}
        before = {replica: debt.before for replica, debt in self._debts.items() if replica in there}
        part = spared_tokens(snapshot, self._limits, before) / max(1, len(before))
        for replica, debt in list(self._debts.items()):
            debt.tokens -= part if replica in there else 0.0
            debt.epochs -= 1
            if debt.tokens <= 0 or debt.epochs < 1:
                del self._debts[replica]
