"""What a routing decision is made from: a request, the replicas' loads, the router's own requests.

Owns the values and the policies' protocol; decides nothing. Times arrive as numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from placement.routing.replica_cost import ReplicaCost
from placement.types import AdapterName, Holder, ReplicaId, VersionId

Key = TypeVar("Key")


class RankLoad(NamedTuple):
    """A replica's requests for adapters of one rank, 0 for the base model: `running` have had their first
    token, `waiting` have not, and `prefill_tokens` are the prompts of these."""

    rank: int
    running: int
    waiting: int
    prefill_tokens: int


# Made for every report, in the simulator for every other request: a named tuple, as `RouteRequest` is.
class ReplicaLoad(NamedTuple):
    """A replica's own report, which came at `received_s` by the router's clock.

    `own_requests` is how many of its requests were the choosing router's when the report came, so
    that they are not counted twice; `routers` is how many routers it hears. The next three are what
    it measured lately, 0 for what it does not know: the requests per second that got their first
    token while others waited, the seconds between two tokens, and the tokens of an output.
    `ranks` tells its requests apart by adapter rank, () where the reporter does not; `prompt_tokens` is
    the mean prompt lately, 0 if not known.
    """

    replica_id: ReplicaId
    running: int
    waiting: int
    outstanding_tokens: int
    kv_cache_usage: float
    received_s: float = 0.0
    own_requests: int = 0
    routers: int = 1
    starts_per_s: float = 0.0
    token_s: float = 0.0
    output_tokens: float = 0.0
    ranks: tuple[RankLoad, ...] = ()
    prompt_tokens: float = 0.0

    @property
    def others(self) -> int:
        """The requests there that were not the choosing router's, when the report came."""
        return max(0, self.running + self.waiting - self.own_requests)


# Made for every request, so a named tuple: a frozen dataclass takes three times as long to build.
class RouteRequest(NamedTuple):
    """What is known of a request when it is routed.

    `adapter` None names the base model; `exclude` are the replicas that have refused it already. 0 tokens
    are not known; `expected_tokens` is at most what the client allows, so an upper bound of the output.
    `prefix` names the blocks of its prompt, each of `block_tokens`, the first one first, if anybody does.
    """

    adapter: AdapterName | None
    prompt_tokens: int = 0
    expected_tokens: int = 0
    exclude: frozenset[ReplicaId] = frozenset()
    prefix: tuple[int, ...] = ()
    block_tokens: int = 0


class OwnRequests:
    """What one router has at one replica, exactly known: state of the router, told of every change.

    `ranks` and `versions` count its requests in flight (rank 0 and None: the base model), without those
    `leased` to clients that go there themselves. `reported` is `ranks` as it was when the last report came,
    `sent_tokens` the prompt tokens sent since then, by rank; `leased_tokens` those of the leases.
    `num_sent_tokens` and `num_leased_tokens` are their sums. `stamp` grows by one with every change, so that
    what follows from the rest can be kept until then; `changed_rank` is the only rank that the last one was
    about, -1 if it was about all.
    """

    __slots__ = (
        "changed_rank",
        "leased",
        "leased_tokens",
        "num_leased_tokens",
        "num_sent_tokens",
        "ranks",
        "reported",
        "sent_tokens",
        "stamp",
        "versions",
    )

    def __init__(self) -> None:
        self.stamp = 0
        self.changed_rank = -1
        self.num_sent_tokens = self.num_leased_tokens = 0
        self.ranks: dict[int, int] = {}
        self.versions: dict[VersionId | None, int] = {}
        self.reported: dict[int, int] = {}
        self.sent_tokens: dict[int, int] = {}
        self.leased: dict[int, int] = {}
        self.leased_tokens: dict[int, int] = {}

    def send(self, version: VersionId | None, rank: int, prompt_tokens: int) -> None:
        """A request goes there."""
        self.stamp += 1
        self.changed_rank = rank
        self.num_sent_tokens += prompt_tokens
        self.ranks[rank] = self.ranks.get(rank, 0) + 1
        self.versions[version] = self.versions.get(version, 0) + 1
        self.sent_tokens[rank] = self.sent_tokens.get(rank, 0) + prompt_tokens

    def end(self, version: VersionId | None, rank: int) -> None:
        """One that went there has ended."""
        self.stamp += 1
        self.changed_rank = rank
        _take(self.ranks, rank, 1)
        _take(self.versions, version, 1)

    def lease(self, rank: int, prompt_tokens: int) -> None:
        """A client is told to go there itself."""
        self.stamp += 1
        self.changed_rank = rank
        self.num_leased_tokens += prompt_tokens
        self.leased[rank] = self.leased.get(rank, 0) + 1
        if prompt_tokens:
            self.leased_tokens[rank] = self.leased_tokens.get(rank, 0) + prompt_tokens

    def end_lease(self, rank: int, prompt_tokens: int) -> None:
        """The replica counts that client's request by now, or it never came."""
        self.stamp += 1
        self.changed_rank = rank
        self.num_leased_tokens -= prompt_tokens
        _take(self.leased, rank, 1)
        if prompt_tokens:
            _take(self.leased_tokens, rank, prompt_tokens)

    def report(self) -> None:
        """A report has come, in which every request sent so far is taken to be."""
        self.stamp += 1
        self.changed_rank = -1
        self.num_sent_tokens = 0
        self.reported = self.ranks.copy()
        if self.sent_tokens:
            self.sent_tokens = {}

    def clear(self) -> None:
        """The replica has died, and all that was there with it."""
        self.stamp += 1
        self.changed_rank = -1
        self.num_sent_tokens = 0
        for counts in (self.ranks, self.reported, self.sent_tokens):
            counts.clear()
        self.versions.clear()


def _take(counts: dict[Key, int], key: Key, number: int) -> None:
    left = counts[key] - number
    if left:
        counts[key] = left
    else:
        del counts[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """What one router knows of the replicas' load.

    A replica missing from `loads`, or None there, has no fresh report. `in_flight` counts the
    router's own requests, `leased` those that it picked a replica for and that the replica does not
    count yet. With `max_waiting`, a replica that reports as many waiting is full. `peers` is how many
    other routers are taken to do as this one does, see `active_peers`. `own` has the router's own requests
    in detail, kept only for a policy that `wants_own`. `now_s` is when, by the clock of the reports'
    `received_s`; one that came later is as good as new.
    """

    loads: Mapping[ReplicaId, ReplicaLoad | None]
    in_flight: Mapping[ReplicaId, int]
    max_waiting: int | None = None
    leased: Mapping[ReplicaId, int] = field(default_factory=dict)
    peers: float = 0.0
    own: Mapping[ReplicaId, OwnRequests] = field(default_factory=dict)
    now_s: float = 0.0

    def sent_since(self, load: ReplicaLoad) -> float:
        """How many requests more than it reported the replica has by now: those that this router has
        sent and not had back, and as many for each peer."""
        name = load.replica_id
        own = self.in_flight.get(name, 0) + self.leased.get(name, 0) - load.own_requests
        return own * (1.0 + self.peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one table says of one adapter: its rank (0: the base model), and every replica's cost in the
    table; a replica without a cost model is missing there."""

    adapter: AdapterName | None
    version_id: VersionId | None
    rank: int
    costs: Mapping[ReplicaId, ReplicaCost]


Picked = tuple[Holder, str]
"""The holder, and what else its choice goes by: '' or a word for the decision's reason."""


class RoutingPolicy(Protocol):
    """Picks one of the holders that are left after filtering.

    `uses_spill`: holders without a share are among them if the plan lets requests spill to them, for a
    policy that weighs costs. `wants_own`: it reads `LoadView.own`. Guarantees: the answer is one of
    `holders`, which has at least two; the same calls in the same order with the same seed give the same
    answers. Does not guarantee fairness between adapters.
    """

    uses_spill: bool
    wants_own: bool

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """The holder that serves the request, which is for the target's adapter."""
        ...


@runtime_checkable
class PreparedPolicy(Protocol):
    """A policy that can work out ahead what its next choices need; whether it does changes none of them."""

    def prepare(self, replica_id: ReplicaId, view: LoadView) -> None:
        """A report of the replica has come, or the router's own requests there have changed."""
        ...


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
