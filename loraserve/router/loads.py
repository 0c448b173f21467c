"""The replicas' latest load reports, and when they are too old to believe."""

from collections.abc import Mapping
from dataclasses import dataclass

from loraserve.clock import Clock
from loraserve.router.own import OwnBook
from loraserve.rpc.table_codec import LoadReport
from placement.routing.chooser import LoadView, ReplicaLoad, active_peers
from placement.types import ReplicaId

STALE_AFTER_S = 1.0
"""Ten report intervals: a replica that is silent for so long tells nothing about its load."""

VIEW_PERIOD_S = 0.01
"""A view is at most so old, which spares building one per request."""

MAX_ENDED = 8
"""How many processes of a replica that have ended are remembered, so that none is heard again."""


@dataclass(slots=True)
class _Entry:
    incarnation: str
    ended: tuple[str, ...]
    sequence: int
    load: ReplicaLoad


class LoadBook:
    """Keeps one report per replica; a report that is not newer than the kept one is dropped.

    Age is measured from receipt, on this side's clock. `leased` counts the requests that were picked
    for clients: one may leave it only when a report that counts the request itself is recorded, or in
    between it would be counted nowhere.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        in_flight: Mapping[ReplicaId, int],
        leased: Mapping[ReplicaId, int] | None = None,
        own: OwnBook | None = None,
        max_waiting: int | None = None,
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        self._clock = clock
        self._in_flight = in_flight
        self._leased: Mapping[ReplicaId, int] = {} if leased is None else leased
        self._own = OwnBook() if own is None else own
        self._max_waiting = max_waiting
        self._stale_after_s = stale_after_s
        self._entries: dict[ReplicaId, _Entry] = {}
        self._shown: dict[ReplicaId, ReplicaLoad | None] = {}
        self._view = self._make_view(clock.now_s())
        self._view_s = float("-inf")

    def record(self, report: LoadReport) -> bool:
        """Keep the report; False if it is not newer than the last one of its replica."""
        kept = self._entries.get(report.replica_id)
        ended: tuple[str, ...] = ()
        if kept is not None:
            ended = kept.ended
            if report.incarnation == kept.incarnation:
                if report.sequence <= kept.sequence:
                    return False
            elif report.incarnation in ended:
                return False
            else:
                ended = (*ended, kept.incarnation)[-MAX_ENDED:]
        load = self._load(report)
        self._entries[report.replica_id] = _Entry(
            incarnation=report.incarnation, ended=ended, sequence=report.sequence, load=load
        )
        self._own.at(report.replica_id).report()
        self._show(load)
        return True

    def _load(self, report: LoadReport) -> ReplicaLoad:
        return ReplicaLoad(
            replica_id=report.replica_id,
            running=report.running,
            waiting=report.waiting,
            outstanding_tokens=report.outstanding_tokens,
            kv_cache_usage=report.kv_cache_usage,
            received_s=self._clock.now_s(),
            own_requests=self._in_flight.get(report.replica_id, 0),
            routers=report.routers,
            starts_per_s=report.starts_per_s,
            token_s=report.token_s,
            output_tokens=report.output_tokens,
            ranks=report.ranks,
            prompt_tokens=report.prompt_tokens,
        )

    def _show(self, load: ReplicaLoad) -> None:
        """Have the view tell the report. Among many replicas one comes with nearly every request, so the rest
        of the view, the estimate of peers too, stays as old as it may be."""
        shown = self._shown.get(load.replica_id)
        if shown is None or shown.routers != load.routers:
            self._view_s = float("-inf")
        else:
            self._shown[load.replica_id] = load

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica has left the table."""
        self._entries.pop(replica_id, None)
        self._own.forget(replica_id)
        self._view_s = float("-inf")

    def view(self) -> LoadView:
        """The loads as of now or `VIEW_PERIOD_S` ago, None for a replica whose report is stale; a later
        report shows in it too."""
        now_s = self._clock.now_s()
        if now_s - self._view_s >= VIEW_PERIOD_S:
            self._shown = {name: self._fresh(entry, now_s) for name, entry in self._entries.items()}
            self._view = self._make_view(now_s)
            self._view_s = now_s
        return self._view

    @property
    def last_view(self) -> LoadView:
        """The last view that was asked for."""
        return self._view

    def _make_view(self, now_s: float) -> LoadView:
        return LoadView(
            loads=self._shown,
            in_flight=self._in_flight,
            max_waiting=self._max_waiting,
            leased=self._leased,
            peers=active_peers(self._shown.values()),
            own=self._own.by_replica,
            now_s=now_s,
        )

    def _fresh(self, entry: _Entry, now_s: float) -> ReplicaLoad | None:
        return entry.load if now_s - entry.load.received_s <= self._stale_after_s else None
