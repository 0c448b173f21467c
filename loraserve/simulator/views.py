"""What a router sees of the replicas: views that bring a replica up to date when it is asked about."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from loraserve.simulator.site import Site
from placement.latency import PS_PER_S
from placement.routing.chooser import Chooser, LoadView, OwnRequests, ReplicaLoad, active_peers
from placement.types import ReplicaId

PEERS_PERIOD_PS = PS_PER_S // 100
"""How long the live router keeps a view, and with it the estimate of its peers."""

REPLICAS_PER_CHOICE = 4
"""At most so many replicas per request chosen for are looked at for the sake of that estimate."""

Value = TypeVar("Value")


class Sight:
    """The moment at which a router looks, and whether any ever did: not all policies do."""

    __slots__ = ("has_looked", "now_ps")

    def __init__(self) -> None:
        self.now_ps = -1
        self.has_looked = False


class _View(Mapping[ReplicaId, Value]):
    def __init__(self, sites: Mapping[ReplicaId, Site], router: int, sight: Sight) -> None:
        self._sites, self._router, self._sight = sites, router, sight

    def __iter__(self) -> Iterator[ReplicaId]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class Loads(_View[ReplicaLoad | None]):
    """The last report of each replica that this router has seen by now."""

    def get(self, key: ReplicaId, default: object = None) -> ReplicaLoad | None:
        site, sight = self._sites[key], self._sight
        if sight.now_ps >= site.news_ps:
            sight.has_looked = True
            site.look(sight.now_ps)
        return site.loads[self._router]

    __getitem__ = get


class InFlight(_View[int]):
    """What this router has in flight at each replica now."""

    def get(self, key: ReplicaId, default: object = 0) -> int:
        site, sight = self._sites[key], self._sight
        if sight.now_ps >= site.news_ps:
            sight.has_looked = True
            site.look(sight.now_ps)
        return site.own[self._router]

    __getitem__ = get


class Own(_View[OwnRequests]):
    """What this router's requests in flight at each replica are made of, if the sites keep that."""

    def get(self, key: ReplicaId, default: object = None) -> OwnRequests:
        site, sight = self._sites[key], self._sight
        if sight.now_ps >= site.news_ps:
            sight.has_looked = True
            site.look(sight.now_ps)
        return site.own_ranks[self._router]

    __getitem__ = get


class Router:
    """One router: the live router's chooser, and its own view.

    The estimate of its peers is made anew no more often than in the live router, and only after enough
    requests that a thousand replicas cost each of them no more than four do.
    """

    __slots__ = ("_has_peers", "_num_chosen", "_num_replicas", "_peers_due_ps", "chooser", "view")

    def __init__(self, chooser: Chooser, view: LoadView, *, has_peers: bool) -> None:
        self.chooser = chooser
        self.view = view
        self._has_peers = has_peers
        self._num_replicas = len(view.loads)
        self._num_chosen = self._num_replicas
        self._peers_due_ps = -1

    def view_at(self, now_ps: int) -> LoadView:
        """The view for one choice more."""
        if self._has_peers:
            self._num_chosen += 1
            is_due = self._num_chosen * REPLICAS_PER_CHOICE >= self._num_replicas
            if is_due and now_ps >= self._peers_due_ps:
                self._num_chosen, self._peers_due_ps = 0, now_ps + PEERS_PERIOD_PS
                view = self.view
                self.view = LoadView(
                    loads=view.loads,
                    in_flight=view.in_flight,
                    max_waiting=view.max_waiting,
                    peers=active_peers(view.loads.values()),
                    own=view.own,
                )
        return self.view
