"""The routing decision: which holder of an adapter serves one request.

Owns the choice: filter the holders, score them, pick one. Knows nothing of sockets, tasks or time;
ages arrive as numbers and randomness as a seeded generator.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import NamedTuple, Protocol

from placement.table import RoutingTable
from placement.types import AdapterName, Holder, ReplicaId, VersionId

MAX_TURNS = 65_536
"""How many adapters round-robin remembers before it begins anew."""


class RoutingError(LookupError):
    """No replica can be chosen for a request."""


class UnknownAdapterError(RoutingError):
    """The table has no adapter of this name."""


class NoHolderError(RoutingError):
    """The adapter is known and no replica may take the request: none holds it, or all are excluded."""


class HoldersFullError(RoutingError):
    """Every holder that is left has its waiting queue full."""


# Made for every report, in the simulator for every other request: a named tuple, as `RouteRequest` is.
class ReplicaLoad(NamedTuple):
    """A replica's own report, `age_s` seconds old.

    `own_requests` is how many of its requests were the choosing router's when the report came, so
    that they are not counted twice; `routers` is how many routers it hears. The last three are what
    it measured lately, 0 for what it does not know: the requests per second that got their first
    token while others waited, the seconds between two tokens, and the tokens of an output.
    """

    replica_id: ReplicaId
    running: int
    waiting: int
    outstanding_tokens: int
    kv_cache_usage: float
    age_s: float = 0.0
    own_requests: int = 0
    routers: int = 1
    starts_per_s: float = 0.0
    token_s: float = 0.0
    output_tokens: float = 0.0

    @property
    def others(self) -> int:
        """The requests there that were not the choosing router's, when the report came."""
        return max(0, self.running + self.waiting - self.own_requests)


# Made for every request, so a named tuple: a frozen dataclass takes three times as long to build.
class RouteRequest(NamedTuple):
    """What is known of a request when it is routed.

    `adapter` None names the base model; `exclude` are the replicas that have refused it already.
    """

    adapter: AdapterName | None
    prompt_tokens: int = 0
    expected_tokens: int = 0
    exclude: frozenset[ReplicaId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """What one router knows of the replicas' load.

    A replica missing from `loads`, or None there, has no fresh report. `in_flight` counts the
    router's own requests, `leased` those that it picked a replica for and that the replica does not
    count yet. With `max_waiting`, a replica that reports as many waiting is full. `peers` is how many
    other routers are taken to do as this one does, see `active_peers`.
    """

    loads: Mapping[ReplicaId, ReplicaLoad | None]
    in_flight: Mapping[ReplicaId, int]
    max_waiting: int | None = None
    leased: Mapping[ReplicaId, int] = field(default_factory=dict)
    peers: float = 0.0

    def sent_since(self, load: ReplicaLoad) -> float:
        """How many requests more than it reported the replica has by now: those that this router has
        sent and not had back, and as many for each peer."""
        name = load.replica_id
        own = self.in_flight.get(name, 0) + self.leased.get(name, 0) - load.own_requests
        return own * (1.0 + self.peers)


class Decision(NamedTuple):
    """The replica chosen among `candidates`, why, and by which table."""

    replica_id: ReplicaId
    version_id: VersionId | None
    reason: str
    table_version: int
    candidates: tuple[ReplicaId, ...]


class RoutingPolicy(Protocol):
    """Picks one of the holders that are left after filtering.

    Guarantees: the answer is one of `holders`, which has at least two; the same calls in the same
    order with the same seed give the same answers. Does not guarantee fairness between adapters.
    """

    def pick(
        self, adapter: AdapterName | None, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Holder:
        """The holder that serves the next request of `adapter`."""
        ...


class LeastOutstanding:
    """The fewest requests outstanding per share, this one counted; a tie is drawn by lot.

    A request outstanding is one of this router's own, exactly known, or one that the replica
    reported and that was not ours. A replica with no fresh report is taken to have as many of
    others' as the most loaded one that has, so that silence attracts nobody. Dividing by the share
    makes idle holders fill in proportion to their shares, and a small share is still used when the
    large ones are busy.

    Peers read the same reports, so between two of them each would fill the same gap. Therefore what
    this router has sent and had back since the report counts once more for each peer: they are taken
    to do as it does, and together they fill the gap about once. See `active_peers`.
    """

    def pick(
        self, adapter: AdapterName | None, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Holder:
        """The holder with the lowest (outstanding + 1) / share."""
        best: list[Holder] = []
        lowest = float("inf")
        for holder, count in zip(holders, _outstanding(holders, view), strict=True):
            score = (count + 1) / holder.share
            if score < lowest:
                lowest, best = score, [holder]
            elif score == lowest:
                best.append(holder)
        return best[0] if len(best) == 1 else best[int(rng.random() * len(best))]


def _outstanding(holders: Sequence[Holder], view: LoadView) -> list[float]:
    """The requests that each holder is taken to have now."""
    loads, in_flight, leased, peers = view.loads, view.in_flight, view.leased, view.peers
    counts: list[float] = []
    silent: list[int] = []
    worst = 0.0
    for holder in holders:
        name = holder.replica_id
        own = in_flight.get(name, 0)
        if leased:
            own += leased.get(name, 0)
        load = loads.get(name)
        if load is None:
            silent.append(len(counts))
            counts.append(own)
            continue
        others: float = load.running + load.waiting - load.own_requests
        if peers:
            others += peers * (own - load.own_requests)
        if others <= 0:
            counts.append(own)
            continue
        if others > worst:
            worst = others
        counts.append(own + others)
    for index in silent:
        counts[index] += worst
    return counts


def active_peers(loads: Iterable[ReplicaLoad | None]) -> float:
    """How many other routers are taken to send as much as this one: those that the replicas hear, less
    as far as they have fewer requests running than as many of this one would.

    Where nothing runs yet, every router that is heard counts. A router alone has none.
    """
    routers, own, others = 1, 0, 0
    for load in loads:
        if load is not None:
            routers = max(routers, load.routers)
            own += load.own_requests
            others += load.others
    return min(routers - 1.0, (others + routers - 1.0) / (own + 1.0))


class WeightedShare:
    """A draw by share alone, whatever the load: the placement's shares are the whole decision."""

    def pick(
        self, adapter: AdapterName | None, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Holder:
        """A holder drawn with a probability in proportion to its share."""
        drawn = rng.random() * sum(holder.share for holder in holders)
        for holder in holders:
            drawn -= holder.share
            if drawn < 0:
                return holder
        return holders[-1]


class RoundRobin:
    """Each adapter's holders in turn, shares and load ignored."""

    def __init__(self) -> None:
        self._turns: dict[AdapterName | None, int] = {}

    def pick(
        self, adapter: AdapterName | None, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Holder:
        """The adapter's next holder; one counter per adapter, since a shared one could lock in step."""
        if len(self._turns) >= MAX_TURNS:
            self._turns.clear()
        turn = self._turns.get(adapter, 0)
        self._turns[adapter] = turn + 1
        return holders[turn % len(holders)]


ROUTING_POLICIES: Mapping[str, Callable[[], RoutingPolicy]] = MappingProxyType(
    {
        "least-outstanding": LeastOutstanding,
        "weighted-share": WeightedShare,
        "round-robin": RoundRobin,
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

    version_id: VersionId | None
    everyone: tuple[Holder, ...]
    usable: tuple[Holder, ...]
    usable_ids: tuple[ReplicaId, ...]


class Chooser:
    """A routing policy under its name with a generator of its own: one router's `choose`."""

    def __init__(self, policy: str, seed: int) -> None:
        self._policy = make_routing_policy(policy)
        self._reason = policy
        self._rng = Random(seed)
        # Worked out once per table and adapter, since a table outlives thousands of requests.
        self._table = RoutingTable()
        self._known: dict[AdapterName | None, _Holders] = {}

    def choose(self, request: RouteRequest, table: RoutingTable, view: LoadView) -> Decision:
        """The replica for this request.

        UnknownAdapterError, NoHolderError or HoldersFullError when there is none.
        """
        if table is not self._table:
            self._table, self._known = table, {}
        known = self._known.get(request.adapter) or self._learn(request.adapter)
        holders, candidates = known.usable, known.usable_ids
        if request.exclude:
            holders = _usable(known.everyone, request.exclude)
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
            picked = self._policy.pick(request.adapter, holders, view, self._rng)
            reason = self._reason
        else:
            raise HoldersFullError(
                f"every holder of {_shown(request.adapter)} has {view.max_waiting} requests waiting"
            )
        return Decision(
            replica_id=picked.replica_id,
            version_id=known.version_id,
            reason=f"retry:{reason}" if request.exclude else reason,
            table_version=table.version,
            candidates=candidates,
        )

    def _learn(self, adapter: AdapterName | None) -> _Holders:
        table = self._table
        version: VersionId | None = None
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
            version, everyone = entry.version_id, entry.holders
        usable = _usable(everyone, frozenset())
        known = _Holders(version_id=version, everyone=everyone, usable=usable, usable_ids=_ids(usable))
        self._known[adapter] = known
        return known


def _ids(holders: tuple[Holder, ...]) -> tuple[ReplicaId, ...]:
    return tuple([holder.replica_id for holder in holders])


def _usable(holders: tuple[Holder, ...], exclude: frozenset[ReplicaId]) -> tuple[Holder, ...]:
    """The holders not excluded, those with a share before those without: a copy that is meant for
    no traffic still serves when nobody else can."""
    left = [holder for holder in holders if holder.replica_id not in exclude]
    with_share = tuple([holder for holder in left if holder.share > 0])
    return with_share or tuple([Holder(replica_id=holder.replica_id, share=1.0) for holder in left])


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
