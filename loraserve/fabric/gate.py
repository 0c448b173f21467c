"""Who fetches next: acquisitions in their order, then prefetches, within the budget and the room.

On the loop only. A ticket is inside from its turn until it leaves. The first in line blocks those behind it,
so that a large one is not overtaken for ever.
"""

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from loraserve.errors import OverloadedError
from loraserve.fabric.cache import SegmentCache
from placement.types import VersionId


class Stop(Enum):
    """Why a fetch is to end before it is done: nobody waits for it, it gives way, or all ends."""

    LEFT = "nobody waits for it any more"
    GIVES_WAY = "it gives way to another"
    CLOSED = "the fabric is closed"


class StoppedError(Exception):
    """The ticket was stopped."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One fetch in the line or inside. `stop` is read by the fetching thread too."""

    version_id: VersionId
    size_bytes: int
    is_prefetch: bool
    stop: Stop | None = None
    place: int = -1
    turn: "asyncio.Future[None] | None" = field(default=None, repr=False)

    def is_stopped(self) -> bool:
        """Whether the fetch is to end."""
        return self.stop is not None


class Gate:
    """At most `max_fetches` inside, with `inflight_bytes` in all; one that is larger goes alone."""

    def __init__(self, cache: SegmentCache, *, max_fetches: int, inflight_bytes: int) -> None:
        self._cache = cache
        self._max_fetches = max_fetches
        self._inflight_bytes = inflight_bytes
        self._waiting: set[Ticket] = set()
        self._inside: set[Ticket] = set()
        self._places = count()
        self._is_pumping = False
        self._changed = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Tickets in the line."""
        return len(self._waiting)

    @property
    def num_inside(self) -> int:
        """Tickets whose turn it is."""
        return len(self._inside)

    async def enter(self, ticket: Ticket) -> None:
        """Wait for the turn, at the end of the line; room is kept for the ticket then.

        StoppedError if the ticket is stopped, OverloadedError if there is no room for it.
        """
        if ticket.stop is not None:
            raise StoppedError(ticket.stop.value)
        turn = ticket.turn = asyncio.get_running_loop().create_future()
        ticket.place = next(self._places)
        self._waiting.add(ticket)
        self.pump()
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.discard(ticket)
            self.leave(ticket)
            raise

    def leave(self, ticket: Ticket) -> None:
        """The ticket's fetch is over, and writes nothing more; what room is still kept for it is free."""
        self._inside.discard(ticket)
        self._cache.give_back(ticket)
        self.pump()

    def stop(self, ticket: Ticket, why: Stop) -> None:
        """End the ticket's fetch: at once if it waits, soon if it is inside."""
        ticket.stop = why
        if ticket in self._waiting:
            self._end(ticket, StoppedError(why.value))
        self.pump()

    def promote(self, ticket: Ticket) -> None:
        """Somebody waits for what was to be prefetched."""
        if ticket.is_prefetch:
            ticket.is_prefetch = False
            self.pump()

    def pump(self) -> None:
        """Let in whom there is room for."""
        # What is given back on the way calls this again.
        if self._is_pumping:
            return
        self._is_pumping = True
        self._changed.set()
        try:
            while self._waiting:
                first = min(self._waiting, key=lambda one: (one.is_prefetch, one.place))
                try:
                    if not self._lets_in(first):
                        return
                except OverloadedError as error:
                    self._end(first, error)
                else:
                    self._inside.add(first)
                    self._end(first, None)
        finally:
            self._is_pumping = False

    async def grow(self, ticket: Ticket, size_bytes: int) -> None:
        """Keep so much room, less or more, for a ticket that is inside, waiting for what is coming free.

        StoppedError if the ticket is stopped meanwhile, OverloadedError if there is no such room.
        """
        while not self._cache.reserve(ticket, size_bytes):
            if ticket.stop is not None:
                raise StoppedError(ticket.stop.value)
            if not self._frees(size_bytes - self._cache.reserved_for(ticket)):
                raise self._overloaded(ticket.version_id, size_bytes)
            self._changed.clear()
            await self._changed.wait()

    def _lets_in(self, ticket: Ticket) -> bool:
        inside_bytes = sum(one.size_bytes for one in self._inside)
        is_busy = len(self._inside) >= self._max_fetches or (
            self._inside and inside_bytes + ticket.size_bytes > self._inflight_bytes
        )
        if is_busy:
            if not ticket.is_prefetch:
                self._have_one_give_way()
            return False
        return self._finds_room(ticket)

    def _finds_room(self, ticket: Ticket) -> bool:
        """Whether room is kept now; False while some is coming free, OverloadedError if none is."""
        if ticket.size_bytes > self._cache.capacity_bytes:
            raise self._overloaded(ticket.version_id, ticket.size_bytes)
        if self._cache.reserve(ticket, ticket.size_bytes):
            return True
        if self._frees(ticket.size_bytes):
            return self._cache.reserve(ticket, ticket.size_bytes)
        if ticket.is_prefetch or not self._have_one_give_way():
            raise self._overloaded(ticket.version_id, ticket.size_bytes)
        return False

    def _frees(self, size_bytes: int) -> bool:
        """Whether so many bytes come free, now or later; what is lacking is evicted."""
        cache = self._cache
        ending = sum(cache.reserved_for(one) for one in self._inside if one.stop is not None)
        lacking = size_bytes - cache.free_bytes - cache.closing_bytes - ending
        # A peer may take its time to read what has left: better to evict more than to wait for it.
        reading = cache.leaving_bytes - cache.closing_bytes
        return cache.evict(lacking) or (reading > 0 and cache.evict(lacking - reading))

    def _have_one_give_way(self) -> bool:
        """Whether a prefetch ends so that another fetch can begin."""
        if any(one.stop is not None for one in self._inside):
            return True
        prefetches = [one for one in self._inside if one.is_prefetch]
        if prefetches:
            max(prefetches, key=lambda one: one.place).stop = Stop.GIVES_WAY
        return bool(prefetches)

    def _end(self, ticket: Ticket, error: Exception | None) -> None:
        """The ticket's wait is over."""
        self._waiting.discard(ticket)
        if ticket.turn is None or ticket.turn.done():
            return
        if error is None:
            ticket.turn.set_result(None)
        else:
            ticket.turn.set_exception(error)

    def _overloaded(self, version: VersionId, size_bytes: int) -> OverloadedError:
        cache = self._cache
        moving_bytes = cache.reserved_bytes + cache.leaving_bytes
        return OverloadedError(
            f"{version}: needs {size_bytes} bytes of {cache.capacity_bytes}, of which {cache.held_bytes} are"
            f" in use, {moving_bytes} coming or going, and {cache.cached_bytes} cached"
        )

    def check_invariants(self) -> None:
        """AssertionError unless the budget is kept and nobody waits without need."""
        assert len(self._inside) <= self._max_fetches, f"{len(self._inside)} fetches at once"
        inside_bytes = sum(one.size_bytes for one in self._inside)
        assert len(self._inside) <= 1 or inside_bytes <= self._inflight_bytes, f"{inside_bytes} in flight"
        assert not self._inside & self._waiting, "a ticket waits inside"
        assert self._inside or not self._waiting or self._cache.leaving_bytes, "somebody waits for nothing"
        kept = sum(self._cache.reserved_for(one) for one in self._inside)
        assert kept == self._cache.reserved_bytes, "room is kept for nobody"
