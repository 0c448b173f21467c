"""The fabric of one replica: adapters come from where they are, are checked, kept, and given to others.

On one loop. Transports and the origin are called in a few threads, which keep a pace while requests run.
A version is fetched once however many wait for it; the fetch ends when the last of them has gone, and its
memory is free only when the transport has returned, which may write until then.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from loraserve.adapters.body_hashes import num_hashers
from loraserve.clock import Clock, WallClock
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineError,
    LoraServeError,
    OverloadedError,
    UnavailableError,
)
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.cache import Entry, SegmentCache
from loraserve.fabric.counts import FabricCounts, Tally, kind_of
from loraserve.fabric.flight import Crash, Flight, Landing, OnProgress
from loraserve.fabric.gate import Gate, Stop, StoppedError, Ticket
from loraserve.fabric.sources import Sources, Threads
from loraserve.fabric.wanted import Acquired, FabricOptions, FetchFailedError, Wanted
from loraserve.pace import Pace
from loraserve.transport.base import Transport
from placement.types import VersionId

logger = logging.getLogger(__name__)

_LEAVING_TIMEOUT_S = 5.0

_PACED_PIECE_BYTES = 1024**2
"""What takes a processor for a millisecond, with the faults of memory that is new."""


class Fabric:
    """Made on the loop that uses it; `transports` come in the order of preference and are closed with it.

    Guarantees: what `acquire` gives is verified, sealed, published, and stays until it is released as often
    as it was acquired; held, cached and coming bytes together never exceed `capacity_bytes`.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        capacity_bytes: int,
        options: FabricOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._options = options or FabricOptions()
        self._clock = clock or WallClock()
        self._transports = tuple(transports)
        self._loop = asyncio.get_running_loop()
        self._tally = Tally()
        self._closers = ThreadPoolExecutor(1, "fabric-close")
        self._cache = SegmentCache(
            self._transports,
            capacity_bytes=capacity_bytes,
            max_cached=self._options.max_cached,
            closers=self._closers,
            clock=self._clock,
            tally=self._tally,
        )
        self._gate = Gate(
            self._cache,
            max_fetches=self._options.max_fetches,
            inflight_bytes=self._options.inflight_bytes,
        )
        self._cache.on_room = self._gate.pump
        self._threads = Threads(
            fetchers=ThreadPoolExecutor(self._options.max_fetches, "fabric-fetch"),
            verifiers=ThreadPoolExecutor(num_hashers(), "fabric-verify"),
            pace=Pace(self._options.busy_share),
            clock=self._clock,
        )
        self._sources = Sources(
            self._transports,
            options=self._options,
            threads=self._threads,
            gate=self._gate,
            tally=self._tally,
            discard=self._cache.discard,
        )
        self._flights: dict[VersionId, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def addresses(self) -> tuple[tuple[str, bytes], ...]:
        """How peers reach this replica: pairs of scheme and address, the preferred first."""
        return tuple((transport.scheme, transport.address) for transport in self._transports)

    @property
    def capacity_bytes(self) -> int:
        """The room for all segments together."""
        return self._cache.capacity_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no fetch runs, waits, or is still ending."""
        return not self._tasks

    def give_way_while(self, is_busy: Callable[[], bool]) -> None:
        """While this says so, asked in any thread, fetches, and peers that fetch from here, take `busy_share`
        of one processor together, in pieces that are short."""
        self._threads.pace.is_busy = is_busy
        for transport in self._transports:
            transport.piece_bytes = min(transport.piece_bytes, _PACED_PIECE_BYTES)
            transport.pace = self._threads.pace

    # -- what a replica asks for -----------------------------------------------------------------

    async def acquire(
        self, wanted: Wanted, *, on_progress: OnProgress | None = None, deadline_s: float | None = None
    ) -> Acquired:
        """A verified segment of this version, pinned until `release`.

        OverloadedError if there is no room, DeadlineError after `deadline_s` seconds, AdapterRejectedError if
        it cannot be used here, FetchFailedError if no source gave it, UnavailableError once the fabric is
        closed. A cancelled call, or one that fails, pins nothing.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await self._acquire(wanted, on_progress)
        except TimeoutError:
            self._tally.failures["deadline"] += 1
            message = f"{wanted.version_id}: not here after {deadline_s:g} s, its deadline"
            logger.warning("%s", message)
            raise DeadlineError(message) from None

    def release(self, version: VersionId) -> None:
        """One acquisition is over: the last one makes the version evictable. It stays cached and published
        while there is room. A version that is not here is no error."""
        self._cache.unpin(version)

    async def prefetch(self, wanted: Wanted) -> None:
        """Fetch the version into the cache, after all acquisitions and giving way to them.

        Returns once it is here, unpinned; errors as for `acquire`.
        """
        if self._here(wanted) is None:
            self._tally.prefetches += 1
            await self._wait_for(self._join(wanted, is_prefetch=True), is_pinning=False)

    def forget(self, version: VersionId) -> bool:
        """Drop the version now, rather than when room is needed; False if it is in use. One that is not here
        is no error."""
        return self._cache.drop_unpinned(version)

    def advise(self, advice: CacheAdvice) -> None:
        """Take in what the controller knows of cached segments; what is to come soon is `prefetch`'s."""
        self.set_demand(advice.demand_tokens_per_s)
        for version in self.published():
            self.mark_last(version, version in advice.last)
        for version in advice.gone:
            self._cache.drop_unpinned(version)

    def mark_last(self, version: VersionId, is_last: bool) -> None:
        """Whether no other replica keeps the version: then it is not evicted."""
        self._cache.mark_last(version, is_last)

    def set_demand(self, tokens_per_s: Mapping[VersionId, float]) -> None:
        """What is expected to be asked of this replica, for eviction; versions without an entry: nothing."""
        self._cache.set_demand(tokens_per_s)

    def published(self) -> tuple[VersionId, ...]:
        """The versions that peers can fetch from here."""
        return self._cache.versions()

    def cached(self) -> tuple[VersionId, ...]:
        """Those of them that nobody has acquired."""
        return self._cache.unpinned()

    def counts(self) -> FabricCounts:
        """What it has done, and what is here now."""
        tally, cache = self._tally, self._cache
        return FabricCounts(
            loads=dict(tally.loads),
            bytes=dict(tally.bytes),
            seconds=dict(tally.seconds),
            failures=dict(tally.failures),
            shared_waits=tally.shared_waits,
            prefetches=tally.prefetches,
            gave_way=tally.gave_way,
            evictions=tally.evictions,
            evicted_bytes=tally.evicted_bytes,
            breakers=self._sources.breakers.not_closed(),
            held_bytes=cache.held_bytes,
            cached_bytes=cache.cached_bytes,
            in_flight_bytes=cache.reserved_bytes,
            leaving_bytes=cache.leaving_bytes,
            num_cached=len(cache.versions()),
            num_fetching=self._gate.num_inside,
            num_waiting=self._gate.num_waiting,
        )

    async def close(self) -> None:
        """End all fetches, serve nothing, and give all memory and threads back; safe to call twice.

        What was acquired must not be used any more.
        """
        self._is_closed = True
        for flight in list(self._flights.values()):
            self._gate.stop(flight.ticket, Stop.CLOSED)
        # Before the fetches have ended: whoever waits for a head hears of it in no other way.
        for transport in self._transports:
            await asyncio.to_thread(transport.close)
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._cache.clear()
        await self._cache.wait_gone(_LEAVING_TIMEOUT_S)
        for pool in (self._threads.fetchers, self._threads.verifiers, self._closers):
            pool.shutdown()

    # -- one call --------------------------------------------------------------------------------

    def _here(self, wanted: Wanted) -> Entry | None:
        """The version's entry; AlreadyExistsError if what is here has another content."""
        if self._is_closed:
            raise UnavailableError(f"{wanted.version_id}: the fabric is closed")
        entry = self._cache.get(wanted.version_id)
        if entry is not None and wanted.digest not in ("", entry.digest):
            raise AlreadyExistsError(
                f"{wanted.version_id}: is here with sha256 {entry.digest[:16]}, not {wanted.digest[:16]}"
            )
        return entry

    async def _acquire(self, wanted: Wanted, on_progress: OnProgress | None) -> Acquired:
        while (entry := self._here(wanted)) is None:
            flight = self._join(wanted, is_prefetch=False)
            try:
                return await self._share(flight, on_progress)
            except FetchFailedError:
                # Whoever began it may have known fewer sources: a prefetch knows no origin.
                if flight.wanted == wanted:
                    raise
        entry.pins += 1
        self._tally.load("cache", entry.size_bytes, 0.0)
        return Acquired(segment=entry.segment, source="cache", size_bytes=entry.size_bytes)

    async def _share(self, flight: Flight, on_progress: OnProgress | None) -> Acquired:
        """What the flight brings, pinned once for the caller."""
        if on_progress is not None:
            flight.listeners.append(on_progress)
        try:
            landing = await self._wait_for(flight, is_pinning=True)
        finally:
            if on_progress is not None:
                flight.listeners.remove(on_progress)
        entry = self._cache.get(flight.wanted.version_id)
        if entry is None:
            raise UnavailableError(f"{flight.wanted.version_id}: the fabric is closed")
        return Acquired(
            segment=entry.segment,
            source=landing.source,
            size_bytes=landing.size_bytes,
            scheme=landing.scheme,
            peer=landing.peer,
            seconds=landing.seconds,
        )

    def _join(self, wanted: Wanted, *, is_prefetch: bool) -> Flight:
        """The fetch of this version that runs, or a new one."""
        version = wanted.version_id
        flight = self._flights.get(version)
        if flight is not None:
            if wanted.digest not in ("", flight.wanted.digest):
                raise AlreadyExistsError(
                    f"{version}: is coming with sha256 {flight.wanted.digest[:16]}, not {wanted.digest[:16]}"
                )
            self._tally.shared_waits += 1
            if not is_prefetch:
                self._gate.promote(flight.ticket)
            return flight
        ticket = Ticket(version_id=version, size_bytes=wanted.size_bytes, is_prefetch=is_prefetch)
        flight = Flight(wanted=wanted, ticket=ticket, landed=self._loop.create_future())
        self._flights[version] = flight
        task = self._loop.create_task(self._fly(flight), name=f"fetch-{version}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return flight

    async def _wait_for(self, flight: Flight, *, is_pinning: bool) -> Landing:
        """Wait until the flight has landed; with `is_pinning` one pin of the version is the caller's then."""
        flight.num_waiting += 1
        flight.num_pinning += is_pinning
        try:
            await asyncio.wait((flight.landed,))
        except asyncio.CancelledError:
            if not flight.landed.done():
                self._leave(flight, is_pinning=is_pinning)
            elif is_pinning and isinstance(flight.landed.result(), Landing):
                self._cache.unpin(flight.wanted.version_id)
            raise
        landed = flight.landed.result()
        if isinstance(landed, Crash):
            raise landed.kind(landed.text)
        return landed

    def _leave(self, flight: Flight, *, is_pinning: bool) -> None:
        flight.num_waiting -= 1
        flight.num_pinning -= is_pinning
        if flight.num_waiting == 0:
            self._forget(flight)
            self._gate.stop(flight.ticket, Stop.LEFT)

    def _forget(self, flight: Flight) -> None:
        """Whoever asks for the version from now on begins anew."""
        if self._flights.get(flight.wanted.version_id) is flight:
            del self._flights[flight.wanted.version_id]

    # -- one flight ------------------------------------------------------------------------------

    async def _fly(self, flight: Flight) -> None:
        """Fetch one version, however often it has to give way, and tell those who wait."""
        landed: Landing | Crash
        try:
            landed = await self._fetch(flight)
        except LoraServeError as error:
            landed = Crash(type(error), str(error))
            if flight.num_waiting:
                self._tally.failures[kind_of(error)] += 1
                is_expected = flight.ticket.is_prefetch or self._is_closed
                logger.log(logging.INFO if is_expected else logging.WARNING, "%s", error)
        except BaseException as error:
            # A defect of ours: nobody is to wait for ever.
            self._forget(flight)
            flight.landed.set_result(Crash(UnavailableError, f"{flight.wanted.version_id}: {error!r}"))
            raise
        self._forget(flight)
        flight.landed.set_result(landed)

    async def _fetch(self, flight: Flight) -> Landing:
        ticket = flight.ticket
        while True:
            asked_s = self._clock.now_s()
            try:
                await self._gate.enter(ticket)
                return await self._land(flight, queued_s=self._clock.now_s() - asked_s)
            except StoppedError as error:
                if ticket.stop is not Stop.GIVES_WAY:
                    raise UnavailableError(f"{ticket.version_id}: {error}") from None
            finally:
                self._gate.leave(ticket)
            ticket.stop = None
            self._tally.gave_way += 1
            flight.num_gave_way += 1
            if ticket.is_prefetch and flight.num_gave_way > self._options.max_giving_way:
                raise OverloadedError(f"{ticket.version_id}: its prefetch gave way too often")

    async def _land(self, flight: Flight, *, queued_s: float) -> Landing:
        """Find the segment and take it in; pinned for those who wait for it to be."""
        wanted, ticket = flight.wanted, flight.ticket
        found = await self._sources.find(flight, queued_s=queued_s)
        if ticket.stop in (Stop.LEFT, Stop.CLOSED):
            await self._cache.discard(found.segment)
            raise StoppedError(ticket.stop.value)
        landing = found.landing
        entry = self._cache.add(
            wanted.version_id,
            found.segment,
            who=ticket,
            digest=found.segment.decoded.digest,
            fetch_s=landing.seconds.fetch_s,
        )
        entry.pins = flight.num_pinning
        self._cache.trim()
        self._tally.load(landing.where, landing.size_bytes, landing.seconds.fetch_s)
        logger.info(
            "%s came from %s (%d bytes, %.3f s after %.3f s in the queue)",
            wanted.version_id,
            f"replica {landing.peer} over {landing.scheme}" if landing.peer else landing.source,
            landing.size_bytes,
            landing.seconds.fetch_s,
            landing.seconds.queued_s,
        )
        return landing

    def check_invariants(self, *, idle: bool = False) -> None:
        """AssertionError unless room, budget, pins and flights add up; when idle, also if a fetch is left."""
        self._cache.check_invariants()
        self._gate.check_invariants()
        here = set(self._cache.versions())
        for version, flight in self._flights.items():
            assert version not in here, f"{version} is here and is being fetched"
            assert flight.num_waiting > 0, f"nobody waits for {version}"
            assert 0 <= flight.num_pinning <= flight.num_waiting, f"{version} counts those who wait wrongly"
            assert not flight.landed.done(), f"{version} has landed"
        assert len(self._tasks) >= len(self._flights), "a flight is lost"
        if idle:
            assert not self._tasks, f"{len(self._tasks)} fetches are left"
            assert not self._cache.reserved_bytes, f"{self._cache.reserved_bytes} bytes are kept for nobody"
