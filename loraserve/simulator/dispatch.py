"""The routers of a simulated cluster at work: each request is sent where its router chooses, or waits."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from loraserve.engines.replica_model.sequence import Sequence
from loraserve.simulator.agenda import Agenda
from loraserve.simulator.ledger import FAILED, REFUSED, Ledger
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.site import Site
from loraserve.simulator.views import InFlight, Loads, Own, Router, Sight
from placement.latency import PS_PER_S
from placement.routing.chooser import (
    Chooser,
    Decision,
    HoldersFullError,
    LoadView,
    RouteRequest,
    RoutingError,
)
from placement.table import RoutingTable
from placement.types import ReplicaId, VersionId

LOOK_EVERY = 32
"""After so many requests a replica is looked at even if no policy does, so that it does not fall behind."""

Sent = Callable[[Site, VersionId, int], None]
"""Told of a request that arrives at a site for a version, and when."""


class Dispatch:
    """Routers over sites; requests are dealt to them in turn.

    All routers see the same table, and at once that a replica is gone, as their links to it break.
    `cold_misses` counts the requests that had to wait for a copy, in a router or at their replica;
    `on_sent`, if set, hears of those that are sent for an adapter.
    """

    def __init__(
        self,
        scenario: Scenario,
        sites: Mapping[ReplicaId, Site],
        ledger: Ledger,
        agenda: Agenda,
    ) -> None:
        self.cold_misses = 0
        self._has_missed = bytearray(len(ledger))
        self.on_sent: Sent | None = None
        self._table = RoutingTable()
        self._gone: frozenset[ReplicaId] = frozenset()
        self._sites = sites
        self._ledger = ledger
        self._agenda = agenda
        self._network_ps = round(scenario.network_delay_s * PS_PER_S)
        self._holder_wait_ps = round(scenario.holder_wait_s * PS_PER_S)
        self._sight = Sight()
        self._num_routers = scenario.num_routers
        self._routers = [self._router(scenario, index) for index in range(scenario.num_routers)]
        # The base model comes last, where its place, -1, finds it.
        self._requests = [RouteRequest(version.name) for version in scenario.adapters] + [RouteRequest(None)]
        versions: list[tuple[VersionId | None, int]] = []
        versions += [(version.version_id, version.rank) for version in scenario.adapters]
        self._versions = [*versions, (None, 0)]
        self._hash_offsets = scenario.trace.hash_offsets
        self._hash_ids = scenario.trace.hash_ids
        self._hash_tokens = min([setup.limits.hash_block_tokens for setup in scenario.replicas], default=0)
        self._waiting: dict[int, int] = {}
        """Requests without a holder, in the order in which they came, and until when each waits."""

    def _router(self, scenario: Scenario, index: int) -> Router:
        chooser = Chooser(scenario.routing, scenario.seed + index)
        view = LoadView(
            loads=Loads(self._sites, index, self._sight),
            in_flight=InFlight(self._sites, index, self._sight),
            max_waiting=scenario.max_waiting,
            own=Own(self._sites, index, self._sight) if chooser.wants_own else {},
        )
        return Router(chooser, view, has_peers=scenario.num_routers > 1)

    # -- requests ------------------------------------------------------------------------------

    def route(self, row: int, now_ps: int, until_ps: int = -1) -> None:
        """Send a request on; `until_ps` is how long one that waits already does."""
        self._sight.now_ps = now_ps
        router = self._routers[row % self._num_routers]
        request = self._requests[self._ledger.adapter[row]]
        if router.chooser.wants_own:
            prefix = () if self._hash_offsets is None else self._hashes(row)
            prompt_tokens = self._ledger.prompt[row]
            request = RouteRequest(request.adapter, prompt_tokens, 0, self._gone, prefix, self._hash_tokens)
        elif self._gone:
            request = request._replace(exclude=self._gone)
        try:
            decision = router.chooser.choose(request, self._table, router.view_at(now_ps))
            site = self._sites[decision.replica_id]
            if decision.version_id is not None and not site.accepts(decision.version_id):
                site = self._accepting(request, decision, router, row)
        except HoldersFullError as error:
            self._refuse(row, now_ps, str(error))
        except RoutingError as error:
            self._wait(row, now_ps, until_ps, str(error))
        else:
            self._send(row, site, now_ps)

    def _accepting(self, request: RouteRequest, decision: Decision, router: Router, row: int) -> Site:
        """The first replica chosen that does not refuse the version. One that does no longer holds it and
        the table that says so is on its way."""
        while True:
            self._ledger.attempts[row] += 1
            request = request._replace(exclude=request.exclude | {decision.replica_id})
            decision = router.chooser.choose(request, self._table, router.view)
            site = self._sites[decision.replica_id]
            if decision.version_id is None or site.accepts(decision.version_id):
                return site

    def _send(self, row: int, site: Site, now_ps: int) -> None:
        ledger, router = self._ledger, row % self._num_routers
        version, rank = self._versions[ledger.adapter[row]]
        prompt_tokens, output_tokens = ledger.prompt[row], ledger.output[row]
        if prompt_tokens + output_tokens - 1 > site.capacity_tokens:
            line = f"{prompt_tokens} prompt and {output_tokens} output tokens; {site.replica_id} holds"
            ledger.close(row, now_ps, FAILED, f"{line} {site.capacity_tokens} tokens at most")
            return
        sequence = Sequence(row, prompt_tokens, output_tokens, rank, version, drawn=ledger.drawn[row])
        if self._hash_offsets is not None:
            sequence.hash_ids = self._hashes(row)
        # Only so is what a router has in flight known exactly at the time of each report.
        if now_ps >= site.news_ps and (self._sight.has_looked or site.num_sent % LOOK_EVERY == 0):
            site.look(now_ps)
        site.send(sequence, router, now_ps)
        ledger.replica[row] = site.index
        ledger.attempts[row] += 1
        if self.on_sent is not None and version is not None:
            if version not in site.held:
                self._note_miss(row)
            self.on_sent(site, version, now_ps + self._network_ps)

    def _hashes(self, row: int) -> tuple[int, ...]:
        assert self._hash_offsets is not None
        assert self._hash_ids is not None
        return tuple(self._hash_ids[self._hash_offsets[row] : self._hash_offsets[row + 1]].tolist())

    def _refuse(self, row: int, now_ps: int, why: str) -> None:
        """Every holder is full: a refusal, but for a request that has part of its answer."""
        outcome = FAILED if self._ledger.drawn[row] else REFUSED
        self._ledger.close(row, now_ps, outcome, why)

    def _wait(self, row: int, now_ps: int, until_ps: int, why: str) -> None:
        if until_ps < 0:
            self._note_miss(row)
            until_ps = now_ps + self._holder_wait_ps
            self._agenda.put(until_ps, partial(self._give_up, row, why))
        self._waiting[row] = until_ps

    def _note_miss(self, row: int) -> None:
        self.cold_misses += not self._has_missed[row]
        self._has_missed[row] = 1

    def _give_up(self, row: int, why: str, now_ps: int) -> None:
        # It may have been sent since, and wait again for a later moment.
        if self._waiting.get(row) == now_ps:
            del self._waiting[row]
            self._ledger.close(row, now_ps, FAILED, why)

    # -- what changes --------------------------------------------------------------------------

    def set_table(self, table: RoutingTable, now_ps: int) -> None:
        """The routers have a new table."""
        self._table = table
        self._retry(now_ps)

    def come(self, replica: ReplicaId, now_ps: int) -> None:
        """A replica is up."""
        self._gone -= {replica}
        self._retry(now_ps)

    def lose(self, replica: ReplicaId, lost: Iterable[Sequence], now_ps: int) -> None:
        """A replica is down: its streams go on elsewhere, from what was drawn."""
        self._gone |= {replica}
        for sequence in lost:
            self.note_drawn(sequence)
            self._agenda.put(now_ps + self._network_ps, partial(self.route, sequence.request))

    def note_drawn(self, sequence: Sequence) -> None:
        """A stream has ended in the middle: what it has drawn is not drawn again."""
        ledger, row = self._ledger, sequence.request
        ledger.drawn[row] = sequence.drawn
        if ledger.first_ps[row] < 0 <= sequence.first_ps:
            ledger.first_ps[row] = sequence.first_ps + self._network_ps

    def num_attempts(self, row: int) -> int:
        """How often the request was sent."""
        return self._ledger.attempts[row]

    def send_to(self, row: int, site: Site, now_ps: int) -> None:
        """Send a request on to this replica, or where its router chooses if it is not taken there."""
        version, _ = self._versions[self._ledger.adapter[row]]
        if site.model is not None and (version is None or site.accepts(version)):
            self._send(row, site, now_ps)
        else:
            self.route(row, now_ps)

    def _retry(self, now_ps: int) -> None:
        waiting, self._waiting = self._waiting, {}
        for row, until_ps in waiting.items():
            self.route(row, now_ps, until_ps)
