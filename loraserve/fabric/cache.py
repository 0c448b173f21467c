"""The segments that are here, published on all transports, and the room that they take.

On the loop only. Memory is counted until it is free: a segment that was evicted while a peer still reads it
is leaving, and its room comes free when that transfer ends. To give large memory back takes a while, so a
thread does it.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

from loraserve.adapters.segment import AdapterSegment
from loraserve.clock import Clock
from loraserve.errors import LoraServeError
from loraserve.fabric.counts import Tally
from loraserve.transport.base import Region, Transport
from placement.fabric.eviction import CachedVersion, choose_evicted
from placement.types import VersionId

logger = logging.getLogger(__name__)

_FIRST_BYTES_PER_S = 1e9
"""What getting a segment back is taken to run at where nobody has measured it."""


class _Owner:
    """Lives as long as anybody reads a segment's memory through a region."""


@dataclass(slots=True, eq=False)
class Entry:
    """A segment that is here. `pins`: how many acquisitions have not released it."""

    segment: AdapterSegment
    digest: str
    owner: _Owner
    size_bytes: int
    fetch_bytes_per_s: float
    pins: int = 0
    let_go_at_s: float = 0.0


class SegmentCache:
    """Pinned segments, at most `max_cached` others, and reservations for those that come; `on_room` is called
    on the loop whenever room comes free later than it was asked for."""

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        capacity_bytes: int,
        max_cached: int,
        closers: Executor,
        clock: Clock,
        tally: Tally,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._max_cached = max_cached
        self.on_room: Callable[[], None] = lambda: None
        self.leaving_bytes = 0
        self.closing_bytes = 0
        """Those of the leaving that nobody reads: they are free in a moment."""
        self._thread_id = threading.get_ident()
        self._transports = transports
        self._closers = closers
        self._clock = clock
        self._tally = tally
        self._loop = asyncio.get_running_loop()
        self._freed = asyncio.Event()
        self._entries: dict[VersionId, Entry] = {}
        self._reserved: dict[object, int] = {}
        self._last: set[VersionId] = set()
        self._demand_tokens_per_s: Mapping[VersionId, float] | None = None

    # -- what is here ----------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes of pinned segments."""
        return sum(one.size_bytes for one in self._entries.values() if one.pins)

    @property
    def cached_bytes(self) -> int:
        """Bytes of segments that nobody uses."""
        return sum(one.size_bytes for one in self._entries.values() if not one.pins)

    @property
    def reserved_bytes(self) -> int:
        """Bytes kept for segments that are coming."""
        return sum(self._reserved.values())

    @property
    def free_bytes(self) -> int:
        """What is left; never negative."""
        taken = sum(one.size_bytes for one in self._entries.values())
        return self.capacity_bytes - taken - self.reserved_bytes - self.leaving_bytes

    def get(self, version: VersionId) -> Entry | None:
        """The version's entry; None if it is not here."""
        return self._entries.get(version)

    def versions(self) -> tuple[VersionId, ...]:
        """All versions that are here and published."""
        return tuple(sorted(self._entries))

    def unpinned(self) -> tuple[VersionId, ...]:
        """Those of them that could be evicted."""
        return tuple(version for version, one in sorted(self._entries.items()) if not one.pins)

    def unpin(self, version: VersionId) -> None:
        """One acquisition lets go; a version that is not here, or not pinned, is no error."""
        entry = self._entries.get(version)
        if entry is not None and entry.pins:
            entry.pins -= 1
            entry.let_go_at_s = self._clock.now_s()
            if not entry.pins:
                self.trim()
                self.on_room()

    def mark_last(self, version: VersionId, is_last: bool) -> None:
        """Whether nobody else keeps the version."""
        if is_last:
            self._last.add(version)
            return
        self._last.discard(version)
        self.on_room()

    def set_demand(self, tokens_per_s: Mapping[VersionId, float]) -> None:
        """What this replica is expected to be asked for from now on."""
        self._demand_tokens_per_s = dict(tokens_per_s)

    # -- room ------------------------------------------------------------------------------------

    def reserve(self, who: object, size_bytes: int) -> bool:
        """Keep room for `who`, more or less than before; False, and nothing changed, if it is not free."""
        if size_bytes - self._reserved.get(who, 0) > self.free_bytes:
            return False
        self._reserved[who] = size_bytes
        return True

    def give_back(self, who: object) -> None:
        """Keep no room for `who` any more."""
        self._reserved.pop(who, None)

    def reserved_for(self, who: object) -> int:
        """How much is kept for `who`."""
        return self._reserved.get(who, 0)

    def evict(self, needed_bytes: int) -> bool:
        """Evict so that so many bytes come free, now or when their readers are done; False, and nothing is
        evicted, if that cannot be."""
        chosen = choose_evicted(self._here(), needed_bytes=needed_bytes)
        for version in chosen or ():
            entry = self._entries[version]
            logger.info("evicted %s (%d bytes)", version, entry.size_bytes)
            self._tally.evictions += 1
            self._tally.evicted_bytes += entry.size_bytes
            del entry
            self._drop(version)
        return chosen is not None

    def trim(self) -> None:
        """Keep no more unpinned segments than `max_cached`: each has descriptors, however small it is."""
        while sum(not one.pins for one in self._entries.values()) > self._max_cached and self.evict(1):
            pass

    def _here(self) -> list[CachedVersion]:
        now_s, demand = self._clock.now_s(), self._demand_tokens_per_s
        return [
            CachedVersion(
                version_id=version,
                size_bytes=one.size_bytes,
                rank=one.segment.rank,
                idle_s=max(0.0, now_s - one.let_go_at_s),
                fetch_bytes_per_s=one.fetch_bytes_per_s,
                demand_tokens_per_s=None if demand is None else demand.get(version, 0.0),
                is_pinned=one.pins > 0,
                is_last=version in self._last,
            )
            for version, one in self._entries.items()
        ]

    # -- coming and going ------------------------------------------------------------------------

    def add(
        self, version: VersionId, segment: AdapterSegment, *, who: object, digest: str, fetch_s: float
    ) -> Entry:
        """Take in a verified segment where room was kept for `who`, and publish it. The cache closes it."""
        size_bytes = segment.size_bytes
        self.give_back(who)
        owner = _Owner()
        gone = weakref.finalize(owner, self._on_gone, segment, size_bytes)
        gone.atexit = False
        entry = self._entries[version] = Entry(
            segment=segment,
            digest=digest,
            owner=owner,
            size_bytes=size_bytes,
            fetch_bytes_per_s=size_bytes / fetch_s if fetch_s > 0 else _FIRST_BYTES_PER_S,
            let_go_at_s=self._clock.now_s(),
        )
        self._publish(version, entry)
        return entry

    def drop_unpinned(self, version: VersionId) -> bool:
        """Drop one version; False if it is pinned."""
        entry = self._entries.get(version)
        if entry is None:
            return True
        if entry.pins:
            return False
        del entry
        self._drop(version)
        self.on_room()
        return True

    async def discard(self, segment: AdapterSegment) -> None:
        """Give back the memory of a segment that was never added."""
        await self._loop.run_in_executor(self._closers, segment.close)

    def clear(self) -> None:
        """Drop everything, pinned or not."""
        for version in self.versions():
            self._drop(version)

    async def wait_gone(self, timeout_s: float) -> None:
        """Wait until nobody reads what was dropped; one line in the log if that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.leaving_bytes:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            logger.warning("%d bytes of segments are still read by somebody", self.leaving_bytes)

    def _publish(self, version: VersionId, entry: Entry) -> None:
        if not self._transports:
            return
        head, body, fd, body_offset = entry.segment.region()
        region = Region(
            head=head,
            body=body,
            size_bytes=entry.segment.body_bytes,
            fd=fd,
            fd_offset=body_offset,
            owner=entry.owner,
        )
        for transport in self._transports:
            try:
                transport.publish(version, region)
            except (LoraServeError, OSError) as error:
                logger.warning("%s is not published over %s: %s", version, transport.scheme, error)

    def _drop(self, version: VersionId) -> None:
        entry = self._entries.pop(version)
        self._last.discard(version)
        self.leaving_bytes += entry.size_bytes
        for transport in self._transports:
            transport.withdraw(version)
        # The last reference to the owner, unless a transfer reads the segment: then its memory goes with it.

    def _on_gone(self, segment: AdapterSegment, size_bytes: int) -> None:
        """In whatever thread has let go of the segment last, perhaps while it collects garbage with a lock
        of its own: no lock may be waited for."""
        closing_bytes = size_bytes if threading.get_ident() == self._thread_id else 0
        if closing_bytes:
            self.closing_bytes += closing_bytes  # the loop's own
        try:
            self._loop.call_soon_threadsafe(self._give_back, segment, size_bytes, closing_bytes)
        except RuntimeError:
            segment.close()  # the loop is closed: nobody counts any more

    def _give_back(self, segment: AdapterSegment, size_bytes: int, closing_bytes: int) -> None:
        try:
            self._closers.submit(self._close, segment, size_bytes, closing_bytes)
        except RuntimeError:
            # It outlasted the fabric, whose threads are gone.
            segment.close()

    def _close(self, segment: AdapterSegment, size_bytes: int, closing_bytes: int) -> None:
        segment.close()
        with suppress(RuntimeError):  # as above
            self._loop.call_soon_threadsafe(self._on_freed, size_bytes, closing_bytes)

    def _on_freed(self, size_bytes: int, closing_bytes: int) -> None:
        self.leaving_bytes -= size_bytes
        self.closing_bytes -= closing_bytes
        self._freed.set()
        self.on_room()

    def check_invariants(self) -> None:
        """AssertionError unless what is here and what is coming fits."""
        assert self.free_bytes >= 0, f"{-self.free_bytes} bytes more than {self.capacity_bytes}"
        assert 0 <= self.closing_bytes <= self.leaving_bytes, "more has left than was here"
        for version, entry in self._entries.items():
            assert entry.pins >= 0, f"{version} has {entry.pins} pins"
            assert entry.segment.fd >= 0, f"{version} is closed"
        assert all(one >= 0 for one in self._reserved.values()), "a reservation is negative"
