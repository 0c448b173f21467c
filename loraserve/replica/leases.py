"""Leases: what a router has promised clients that come to this replica directly.

A lease pins its adapter version from the router's word on until the client's request has taken over,
or until its time is up, so that a drain in between waits for the client.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from loraserve.clock import Clock
from loraserve.errors import StaleError
from loraserve.replica.in_flight import Turn
from loraserve.replica.pool import AdapterPool
from placement.types import VersionId

MAX_REMEMBERED = 65_536
"""How many ended leases are remembered, to tell a late client from an early one."""

GRACE_S = 1.0
"""The router counts from its choice, the replica from the word of it: who is late is not so by this."""


@dataclass(slots=True)
class _Lease:
    version_id: VersionId | None
    expires_s: float
    ended: Callable[[str], None]
    waited_s: float
    has_missed: bool


class LeaseBook:
    """Bounded by the routers' rate of picks times their length. `sweep` ends what has run out."""

    def __init__(self, pool: AdapterPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._open: OrderedDict[str, _Lease] = OrderedDict()
        self._early: OrderedDict[str, None] = OrderedDict()
        self._run_out: OrderedDict[str, None] = OrderedDict()
        self._none_open: asyncio.Event | None = None

    @property
    def num_open(self) -> int:
        """Leases granted and neither used nor run out."""
        return len(self._open)

    def ids(self) -> frozenset[str]:
        """The pins that are leases."""
        return frozenset(map(_pin_id, self._open))

    def grant(
        self,
        lease_id: str,
        version_id: VersionId | None,
        lease_s: float,
        ended: Callable[[str], None],
        *,
        waited_s: float = 0.0,
        has_missed: bool = False,
    ) -> None:
        """A client will come; `ended` hears once, when it has or when its time is up. The rest is as in
        `in_flight.Turn`."""
        self.sweep()
        if lease_id in self._early:
            # The client was faster than the router's word.
            del self._early[lease_id]
            ended(lease_id)
            return
        if version_id is not None and not self._pool.pin(version_id, _pin_id(lease_id)):
            version_id = None
        expires_s = self._clock.now_s() + lease_s + GRACE_S
        self._open[lease_id] = _Lease(version_id, expires_s, ended, waited_s, has_missed)

    def check(self, lease_id: str) -> None:
        """StaleError if the lease has run out; one that is not known yet is not stale."""
        self.sweep()
        if lease_id in self._run_out:
            raise StaleError("lease: it has run out before the request came; pick again")

    def turn(self, turn: Turn) -> Turn:
        """The turn of a client that comes with a lease, with what its router has said of it; StaleError as
        `check` has it."""
        self.check(turn.lease_id)
        lease = self._open.get(turn.lease_id)
        if lease is None:
            return turn
        return replace(turn, waited_s=lease.waited_s, has_missed=lease.has_missed)

    def is_open(self, lease_id: str) -> bool:
        """Whether the router has granted it and nobody has used it."""
        return lease_id in self._open

    def use(self, lease_id: str) -> None:
        """The request of this lease has a pin of its own now."""
        if lease_id in self._open:
            self._end(lease_id)
        else:
            _remember(self._early, lease_id)

    def sweep(self) -> None:
        """End the leases whose time is up."""
        now_s = self._clock.now_s()
        while self._open:
            lease_id, lease = next(iter(self._open.items()))
            if lease.expires_s > now_s:
                return
            _remember(self._run_out, lease_id)
            self._end(lease_id)

    async def wait_none(self) -> None:
        """Return once no lease is open."""
        while self._open:
            self._none_open = self._none_open or asyncio.Event()
            _, last = next(reversed(self._open.items()))
            try:
                async with asyncio.timeout(max(0.0, last.expires_s - self._clock.now_s()) + 0.01):
                    await self._none_open.wait()
            except TimeoutError:
                self.sweep()

    def _end(self, lease_id: str) -> None:
        lease = self._open.pop(lease_id)
        if lease.version_id is not None:
            self._pool.unpin(lease.version_id, _pin_id(lease_id))
        lease.ended(lease_id)
        if not self._open and self._none_open is not None:
            self._none_open.set()
            self._none_open = None


def _pin_id(lease_id: str) -> str:
    return f"lease {lease_id}"


def _remember(book: "OrderedDict[str, None]", lease_id: str) -> None:
    book[lease_id] = None
    if len(book) > MAX_REMEMBERED:
        book.popitem(last=False)
