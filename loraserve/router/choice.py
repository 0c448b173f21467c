"""Choosing a replica for one request, and waiting for one when there is none at the moment."""

import asyncio
from dataclasses import dataclass

from grpc import StatusCode

from loraserve.clock import Clock
from loraserve.errors import (
    DeadlineError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    StaleError,
    UnavailableError,
)
from loraserve.router.flight import Flight
from loraserve.router.leases import LeaseCounter
from loraserve.router.loads import LoadBook
from loraserve.router.peers import Peers
from loraserve.router.tables import TableFollower
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.prefix import BLOCK_TOKENS
from placement.routing.admission import Demand, TooLateError, choose_in_time
from placement.routing.chooser import (
    Chooser,
    Decision,
    HoldersFullError,
    NoHolderError,
    RouteRequest,
    UnknownAdapterError,
)

STALE_WAIT_S = 0.5
"""How long a request waits for the table that must be on its way when every holder calls ours stale."""

CUT_OFF_WAIT_S = 2.0
"""How long a request waits in a router that reaches nobody at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The shell around `placement.routing.chooser.Chooser`: table, loads and links as they are now.

    `wants_prefix`: a flight's `prefix` is looked at.
    """

    clock: Clock
    loads: LoadBook
    leases: LeaseCounter
    peers: Peers
    tables: TableFollower
    chooser: Chooser
    holder_wait_s: float
    early_refusal: bool = True
    wants_prefix: bool = False

    def now(self, flight: Flight) -> Decision | None:
        """The holder for this request, or None when there is none at the moment.

        NotFoundError, OverloadedError or UnavailableError when waiting would not help.
        """
        try:
            return self._choose(flight)
        except NoHolderError:
            return None

    async def later(self, flight: Flight) -> Decision:
        """The holder, as soon as a table or a link brings one.

        A replica that died may have been the last holder: its adapters are loaded elsewhere, or it is
        started again, within `holder_wait_s` or not at all.
        """
        flight.has_waited = True
        begun_s = self.clock.now_s()
        until_s = min(begun_s + self._patience_s(flight), flight.deadline_s)
        while True:
            changed = self.peers.changes()
            try:
                return self._choose(flight)
            except NoHolderError as error:
                left_s = until_s - self.clock.now_s()
                if left_s <= 0:
                    refusal = _all_refused(flight, str(error))
                    if isinstance(refusal, OverloadedError):
                        self.count_refusal(flight)
                    raise refusal from error
                if self._is_cut_off():
                    # Another router may well see what this one does not.
                    left_s = min(left_s, begun_s + CUT_OFF_WAIT_S - self.clock.now_s())
                    if left_s <= 0:
                        raise UnavailableError(
                            "the router is cut off from its cluster; use another"
                        ) from error
                left_s = min(left_s, CUT_OFF_WAIT_S)
            try:
                async with asyncio.timeout(left_s):
                    await changed.wait()
            except TimeoutError:
                continue
            flight.excluded = frozenset()

    def count_refusal(self, flight: Flight) -> None:
        """Let a request that is turned away for lack of room count as demand, at a holder that is reached.

        One that has begun has counted before.
        """
        entry = None if flight.adapter is None else self.tables.table.entries.get(flight.adapter)
        if entry is None or flight.pinned_version is not None:
            return
        for holder in entry.holders:
            peer = self.peers.find(holder.replica_id)
            if peer is not None and peer.link.up:
                peer.link.tell_refusal(
                    internal_pb2.Refusal(
                        version_id=entry.version_id,
                        prompt_tokens=flight.prompt_tokens,
                        max_tokens=flight.max_tokens,
                    )
                )
                return

    def _is_cut_off(self) -> bool:
        """Whether this router reaches neither its controller nor any replica of its table."""
        replicas = self.tables.table.replicas
        return not self.tables.connected and bool(replicas) and self.peers.down.issuperset(replicas)

    def _patience_s(self, flight: Flight) -> float:
        refusals = set(flight.refusals)
        if refusals == {StatusCode.RESOURCE_EXHAUSTED}:
            return 0.0
        if StatusCode.UNAVAILABLE in refusals or not refusals:
            return self.holder_wait_s
        return STALE_WAIT_S

    def _choose(self, flight: Flight) -> Decision:
        table = self.tables.table
        if table.version == 0:
            raise UnavailableError("the router has no routing table yet; try again later")
        if flight.excluded and flight.excluded_at != table.version:
            flight.excluded = frozenset()
        exclude = flight.excluded
        if self.peers.down:
            exclude |= self.peers.down
        request = RouteRequest(
            flight.adapter, flight.prompt_tokens, flight.max_tokens, exclude, flight.prefix, BLOCK_TOKENS
        )
        self.leases.sweep()
        view = self.loads.view()
        try:
            if self.early_refusal and flight.pinned_version is None:
                left_s = flight.deadline_s - self.clock.now_s()
                decision = choose_in_time(
                    self.chooser, request, table, view, Demand(flight.max_tokens, left_s)
                )
            else:
                # Who has part of an answer gets the rest, late or not.
                decision = self.chooser.choose(request, table, view)
        except TooLateError as error:
            self.count_refusal(flight)
            raise OverloadedError(f"{error}; try again in {error.retry_after_s:.1f} s") from error
        except UnknownAdapterError as error:
            raise NotFoundError(f"adapter: {error}") from error
        except HoldersFullError as error:
            self.count_refusal(flight)
            raise OverloadedError(f"{error}; try again later") from error
        if flight.pinned_version is not None and flight.pinned_version != (decision.version_id or ""):
            raise _replaced(flight, decision)
        if not flight.refusals and not flight.excluded and decision.reason.startswith("retry:"):
            # Excluded were only replicas that this router cannot reach.
            decision = decision._replace(reason=decision.reason.removeprefix("retry:"))
        flight.decision = decision
        return decision


def check_deadline(flight: Flight, now_s: float) -> None:
    """Note what is left of the request's time; DeadlineError if nothing is."""
    flight.remaining_s = flight.deadline_s - now_s
    if flight.remaining_s <= 0:
        raise DeadlineError("the deadline passed before a replica took the request")


def _replaced(flight: Flight, decision: Decision) -> LoraServeError:
    now = decision.version_id or "the base model"
    line = f"the request began with {flight.pinned_version} and adapter {flight.adapter!r} is {now} now"
    if flight.messages:
        return UnavailableError(f"{line}; its replica was lost after {len(flight.resumed_ids)} tokens")
    return StaleError(f"resume.adapter_version: {line}; send it again from its beginning")


def _all_refused(flight: Flight, why: str) -> LoraServeError:
    """Full if every holder that was asked is full; else nobody can serve this now."""
    if flight.refusals and set(flight.refusals) == {StatusCode.RESOURCE_EXHAUSTED}:
        return OverloadedError(f"every holder is full: {why}")
    return UnavailableError(why)
