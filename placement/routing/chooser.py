"""The routing decision: which holder of an adapter serves one request.

Owns the choice: filter the holders, have the policy pick one. Knows nothing of sockets, tasks or time;
ages arrive as numbers and randomness as a seeded generator.
"""

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from placement.routing.baselines import DLoraDispatch, RankBacklog, Toppings
from placement.routing.marginal_cost import MarginalCost
from placement.routing.replica_cost import ReplicaCost
from placement.routing.simple import MAX_TURNS, LeastOutstanding, RoundRobin, WeightedShare
from placement.routing.view import (
    LoadView,
    OwnRequests,
    Picked,
    PreparedPolicy,
    RankLoad,
    ReplicaLoad,
    RouteRequest,
    RoutingPolicy,
    Target,
    active_peers,
)
from placement.table import RoutingTable
from placement.types import AdapterName, Holder, ReplicaId, VersionId

__all__ = [
    "MAX_TURNS",
    "ROUTING_POLICIES",
    "Chooser",
    "Decision",
    "HoldersFullError",
    "LeastOutstanding",
    "LoadView",
    "NoHolderError",
    "OwnRequests",
    "Picked",
    "RankLoad",
    "ReplicaLoad",
    "RoundRobin",
    "RouteRequest",
    "RoutingError",
    "RoutingPolicy",
    "Target",
    "UnknownAdapterError",
    "WeightedShare",
    "active_peers",
    "make_routing_policy",
]


class RoutingError(LookupError):
    """No replica can be chosen for a request."""


class UnknownAdapterError(RoutingError):
    """The table has no adapter of this name."""


class NoHolderError(RoutingError):
    """The adapter is known and no replica may take the request: none holds it, or all are excluded."""


class HoldersFullError(RoutingError):
    """Every holder that is left has its waiting queue full."""


class Decision(NamedTuple):
    """The replica chosen among `candidates`, why, and by which table; `rank` is the adapter's, 0 for the base
    model."""

    replica_id: ReplicaId
    version_id: VersionId | None
    reason: str
    table_version: int
    candidates: tuple[ReplicaId, ...]
    rank: int = 0


ROUTING_POLICIES: Mapping[str, Callable[[], RoutingPolicy]] = MappingProxyType(
    {
        "least-outstanding": LeastOutstanding,
        "weighted-share": WeightedShare,
        "round-robin": RoundRobin,
        "marginal-cost": MarginalCost,
        "toppings": Toppings,
        "rank-backlog": RankBacklog,
        "dlora": DLoraDispatch,
    }
)
"""Every routing policy by name; a new one is a class and a line here."""


def make_routing_policy(name: str) -> RoutingPolicy:
    """A new policy of this name; ValueError lists the names there are."""
    try:
        return ROUTING_POLICIES[name]()
    except KeyError:
        known = ", ".join(sorted(ROUTING_POLICIES))
        raise ValueError(f"routing: no policy {name!r}; known: {known}") from None


class _Holders(NamedTuple):
    """What one table says of one adapter: who holds it, and who of them is meant for traffic."""

    target: Target
    everyone: tuple[Holder, ...]
    usable: tuple[Holder, ...]
    usable_ids: tuple[ReplicaId, ...]


class Chooser:
    """A routing policy under its name with a generator of its own: one router's `choose`."""

    def __init__(self, policy: str, seed: int) -> None:
        """ValueError for a policy that does not exist."""
        self._policy = make_routing_policy(policy)
        self._prepared = self._policy if isinstance(self._policy, PreparedPolicy) else None
        self._reason = policy
        self._rng = Random(seed)
        self._costs: dict[ReplicaId, ReplicaCost] = {}
        # Worked out once per table and adapter, since a table outlives thousands of requests.
        self._table = RoutingTable()
        self._known: dict[AdapterName | None, _Holders] = {}

    @property
    def wants_own(self) -> bool:
        """Whether its views need the router's own requests in detail."""
        return self._policy.wants_own

    @property
    def wants_prefix(self) -> bool:
        """Whether it looks at `RouteRequest.prefix`."""
        return isinstance(self._policy, MarginalCost)

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does anything."""
        return self._prepared is not None

    def prepare(self, replica_id: ReplicaId, view: LoadView) -> None:
        """Work out now what the next choices need of what has changed at a replica: a report, or the router's
        own requests there. Nothing depends on it but the time that they take."""
        if self._prepared is not None:
            self._prepared.prepare(replica_id, view)

    def choose(self, request: RouteRequest, table: RoutingTable, view: LoadView) -> Decision:
        """The replica for this request.

        UnknownAdapterError, NoHolderError or HoldersFullError when there is none.
        """
        if table is not self._table:
            self._table, self._known = table, {}
            self._costs = {
                name: replica.cost for name, replica in table.replicas.items() if replica.cost is not None
            }
        known = self._known.get(request.adapter) or self._learn(request.adapter)
        holders, candidates = known.usable, known.usable_ids
        if request.exclude:
            holders = _usable(known.everyone, request.exclude, self._policy.uses_spill)
            candidates = _ids(holders)
        if not holders:
            raise NoHolderError(_no_holder_line(request, table, len(known.everyone)))
        if view.max_waiting is not None:
            left = _not_full(holders, view, view.max_waiting)
            if left is not holders:
                holders, candidates = left, _ids(left)
        if len(holders) == 1:
            picked, reason = holders[0], "only-holder"
        elif holders:
            picked, word = self._policy.pick(request, known.target, holders, view, self._rng)
            reason = f"{self._reason}:{word}" if word else self._reason
        else:
            raise HoldersFullError(
                f"every holder of {_shown(request.adapter)} has {view.max_waiting} requests waiting"
            )
        if request.exclude:
            reason = f"retry:{reason}"
        target = known.target
        # By position, which is faster.
        return Decision(picked.replica_id, target.version_id, reason, table.version, candidates, target.rank)

    def _learn(self, adapter: AdapterName | None) -> _Holders:
        table = self._table
        version: VersionId | None = None
        rank = 0
        if adapter is None:
            # One that is draining is left to the adapters that have no other, unless there is no other.
            everyone = tuple(
                Holder(replica_id=name, share=0.0 if replica.draining else 1.0)
                for name, replica in table.replicas.items()
            )
        else:
            entry = table.entries.get(adapter)
            if entry is None:
                raise UnknownAdapterError(f"adapter {adapter!r} is not registered")
            version, rank, everyone = entry.version_id, entry.rank, entry.holders
        usable = _usable(everyone, frozenset(), self._policy.uses_spill)
        target = Target(adapter=adapter, version_id=version, rank=rank, costs=self._costs)
        known = _Holders(target=target, everyone=everyone, usable=usable, usable_ids=_ids(usable))
        self._known[adapter] = known
        return known


def _ids(holders: tuple[Holder, ...]) -> tuple[ReplicaId, ...]:
    return tuple([holder.replica_id for holder in holders])


def _usable(
    holders: tuple[Holder, ...], exclude: frozenset[ReplicaId], uses_spill: bool
) -> tuple[Holder, ...]:
    """The holders not excluded, those with a share before those without: a copy that is meant for
    no traffic still serves when nobody else can."""
    left = [holder for holder in holders if holder.replica_id not in exclude]
    meant = tuple([holder for holder in left if holder.share > 0 or (uses_spill and holder.spill)])
    return meant or tuple([Holder(replica_id=holder.replica_id, share=1.0) for holder in left])


def _not_full(holders: tuple[Holder, ...], view: LoadView, max_waiting: int) -> tuple[Holder, ...]:
    """The holders themselves when none of them is full, as is usual."""
    loads = view.loads
    for holder in holders:
        load = loads.get(holder.replica_id)
        if load is not None and load.waiting >= max_waiting:
            break
    else:
        return holders
    return tuple(
        [
            holder
            for holder in holders
            if (load := loads.get(holder.replica_id)) is None or load.waiting < max_waiting
        ]
    )


def _no_holder_line(request: RouteRequest, table: RoutingTable, num_holders: int) -> str:
    if num_holders and request.exclude:
        return f"all {num_holders} holders of {_shown(request.adapter)} refused the request"
    return f"no replica holds {_shown(request.adapter)} at present (table {table.version})"


def _shown(adapter: AdapterName | None) -> str:
    return "the base model" if adapter is None else f"adapter {adapter!r}"
