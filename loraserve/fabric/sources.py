"""Runs the attempts of one fetch: peers over transports, then the origin.

What to try next is decided by `placement.fabric.attempts`; here an attempt is made, logged and counted.
"""

import asyncio
import hashlib
import logging
import mmap
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from loraserve.adapters.segment import AdapterSegment, build_segment
from loraserve.clock import Clock
from loraserve.errors import AdapterRejectedError
from loraserve.fabric.breakers import Breakers
from loraserve.fabric.counts import Tally
from loraserve.fabric.flight import Flight, Landing
from loraserve.fabric.gate import Gate, StoppedError, Ticket
from loraserve.fabric.peer_fetch import Body, Failure, Fetching, Head, PeerSource, fetch_body, fetch_head
from loraserve.fabric.wanted import FabricOptions, FetchFailedError, Seconds, Wanted
from loraserve.pace import Pace
from loraserve.transport.base import Transport
from placement.fabric.attempts import (
    Attempts,
    Begun,
    Ended,
    Finish,
    GiveUp,
    Outcome,
    PeerChoice,
    TryOrigin,
    TryPeer,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A verified, sealed segment, and where it came from."""

    segment: AdapterSegment
    landing: Landing


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """Where transports and the origin are called, where bodies are verified, how fast, and the time there."""

    fetchers: ThreadPoolExecutor
    verifiers: Executor
    pace: Pace
    clock: Clock


class Sources:
    """Where segments come from; on the loop, with the waiting in threads."""

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        options: FabricOptions,
        threads: Threads,
        gate: Gate,
        tally: Tally,
        discard: Callable[[AdapterSegment], Awaitable[None]],
    ) -> None:
        self.breakers = Breakers(options.breaker, threads.clock)
        self._transports = {transport.scheme: transport for transport in transports}
        self._options = options
        self._threads = threads
        self._gate = gate
        self._discard = discard
        self._tally = tally
        self._loop = asyncio.get_running_loop()

    async def find(self, flight: Flight, *, queued_s: float) -> Found:
        """Try one source after the other.

        StoppedError if the flight's ticket is stopped, AdapterRejectedError if the adapter cannot be used
        here, OverloadedError without memory, else FetchFailedError.
        """
        wanted = flight.wanted
        sources = self._reachable(wanted)
        choices = [PeerChoice(peer_id=peer, schemes=tuple(by_scheme)) for peer, by_scheme in sources.items()]
        attempts = Attempts(
            choices,
            has_origin=wanted.directory is not None,
            max_attempts=self._options.max_attempts,
        )
        unreached: set[tuple[str, str]] = set()
        (command,) = attempts.handle(Begun())
        while True:
            _check(flight.ticket)
            match command:
                case TryPeer(peer_id=peer, scheme=scheme):
                    found = await self._try_peer(flight, sources[peer][scheme], queued_s)
                case TryOrigin():
                    found = await self._try_origin(flight, queued_s)
                case GiveUp(reason=reason):
                    raise _error(flight, reason)
                case Finish():
                    raise AssertionError("found, and gone on")
            if isinstance(found, Found):
                for scheme in [scheme for peer, scheme in unreached if peer == found.landing.peer]:
                    self.breakers.blame_scheme(scheme)
                return found
            if found.outcome is Outcome.UNREACHABLE and isinstance(command, TryPeer):
                unreached.add((command.peer_id, command.scheme))
            (command,) = attempts.handle(Ended(outcome=found.outcome))

    def _reachable(self, wanted: Wanted) -> dict[str, dict[str, PeerSource]]:
        """The peers that can be asked, and how, each in the order of preference."""
        found: dict[str, dict[str, PeerSource]] = {}
        if not wanted.head_sha256:
            return found
        for peer in wanted.peers:
            addresses = dict(peer.addresses)
            found[peer.replica_id] = {
                scheme: PeerSource(transport=one, address=addresses[scheme], replica_id=peer.replica_id)
                for scheme, one in self._transports.items()
                # Whoever asks itself waits for what it does not have.
                if scheme in addresses and addresses[scheme] != one.address
            }
        return found

    # -- a peer ----------------------------------------------------------------------------------

    async def _try_peer(self, flight: Flight, source: PeerSource, queued_s: float) -> Found | Failure:
        scheme, address, peer = source.transport.scheme, source.address, source.replica_id
        if not self.breakers.allows(scheme, address, peer):
            return self._note(flight, str(source), Failure(outcome=Outcome.REFUSED, text="it kept failing"))
        outcome, is_missing = Outcome.STOPPED, False
        try:
            found = await self._fetch(flight, source, queued_s)
            if isinstance(found, Failure):
                outcome, is_missing = found.outcome, found.is_missing
                return self._note(flight, str(source), found)
            outcome = Outcome.DONE
            return found
        finally:
            self.breakers.learn(scheme, address, peer, outcome, is_missing=is_missing)

    async def _fetch(self, flight: Flight, source: PeerSource, queued_s: float) -> Found | Failure:
        wanted, clock = flight.wanted, self._threads.clock
        began_s = clock.now_s()
        head = await self._in_thread(lambda: fetch_head(source, wanted, self._options.idle_timeout_s))
        if not isinstance(head, Head):
            return head
        head_s = clock.now_s() - began_s
        _check(flight.ticket)
        # The body begins on a page of its own.
        body_bytes, page_bytes = head.decoded.body_bytes, mmap.ALLOCATIONGRANULARITY
        await self._gate.grow(flight.ticket, body_bytes + len(head.raw) + 2 * page_bytes)
        fetching = Fetching(
            clock=clock,
            verifiers=self._threads.verifiers,
            idle_timeout_s=self._options.idle_timeout_s,
            is_stopped=flight.ticket.is_stopped,
            tell=lambda done_bytes: flight.tell(self._loop, done_bytes, body_bytes),
            rest=self._threads.pace.for_one(),
        )
        body = await self._in_thread(lambda: fetch_body(source, wanted, head, fetching))
        if not isinstance(body, Body):
            return body
        landing = Landing(
            source="peer",
            size_bytes=body.segment.size_bytes,
            scheme=source.transport.scheme,
            peer=source.replica_id,
            seconds=Seconds(queued_s=queued_s, head_s=head_s, body_s=body.body_s, verify_s=body.verify_s),
        )
        return Found(segment=body.segment, landing=landing)

    # -- the origin ------------------------------------------------------------------------------

    async def _try_origin(self, flight: Flight, queued_s: float) -> Found | Failure:
        began_s = self._threads.clock.now_s()
        built = await self._in_thread(lambda: _build(flight.wanted, self._threads.pace.for_one()))
        if not isinstance(built, AdapterSegment):
            return self._note(flight, "the origin", built)
        try:
            await self._gate.grow(flight.ticket, built.size_bytes)
        except BaseException:
            await self._discard(built)
            raise
        seconds = Seconds(queued_s=queued_s, body_s=self._threads.clock.now_s() - began_s)
        landing = Landing(source="origin", size_bytes=built.size_bytes, seconds=seconds)
        return Found(segment=built, landing=landing)

    # -- steps -----------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(self._threads.fetchers, work)

    def _note(self, flight: Flight, where: str, failure: Failure) -> Failure:
        """Keep, count and log a failed attempt; one that was stopped has not failed."""
        if failure.outcome is not Outcome.STOPPED:
            version, outcome = flight.wanted.version_id, failure.outcome.value
            self._tally.failures[outcome] += 1
            flight.note(f"{where}: {outcome}: {failure.text}")
            if failure.outcome is not Outcome.REFUSED:
                logger.warning("%s: not from %s: %s: %s", version, where, outcome, failure.text)
        return failure


def _build(wanted: Wanted, rest: Callable[[], None]) -> AdapterSegment | Failure:
    """The origin's segment. AdapterRejectedError if its files cannot be served."""
    assert wanted.directory is not None, "asked for an origin that there is none of"
    try:
        segment = build_segment(
            wanted.directory,
            name=wanted.version_id,
            digest=wanted.digest or None,
            max_lora_rank=wanted.max_lora_rank,
            rest=rest,
        )
    except (OSError, ValueError) as error:
        return Failure(outcome=Outcome.FAILED, text=str(error).replace("\n", " "))
    found = hashlib.sha256(segment.head).hexdigest()
    if wanted.head_sha256 not in ("", found):
        segment.close()
        text = f"its head hashes to {found[:16]}, expected {wanted.head_sha256[:16]}"
        return Failure(outcome=Outcome.FAILED, text=text)
    return segment


def _check(ticket: Ticket) -> None:
    if ticket.stop is not None:
        raise StoppedError(ticket.stop.value)


def _error(flight: Flight, reason: Outcome | None) -> Exception:
    version, tried = flight.wanted.version_id, flight.summary()
    match reason:
        case Outcome.STOPPED:
            return StoppedError(flight.ticket.stop.value if flight.ticket.stop else "stopped")
        case Outcome.UNUSABLE:
            return AdapterRejectedError(f"{version}: {tried}")
        case None:
            return FetchFailedError(f"{version}: no peer and no origin has it")
        case _:
            return FetchFailedError(f"{version}: no source gave it: {tried}")
