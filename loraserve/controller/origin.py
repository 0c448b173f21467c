"""The controller's store as a peer of the fabric, for replicas that do not see its folder."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue

from loraserve.adapters import AdapterStore
from loraserve.adapters.segment import AdapterSegment, build_segment
from loraserve.errors import LoraServeError, UnavailableError
from loraserve.fabric.wanted import ORIGIN, PeerAddress
from loraserve.transport.base import Region
from placement.types import AdapterVersion, VersionId

logger = logging.getLogger(__name__)

KEEP_S = 30.0
"""How long a segment stays that was made for a replica: others may come for it meanwhile."""

MAX_KEPT = 16
ROOM_BYTES = 2 * 1024**3
"""What segments that are made, kept or read may take of the controller's machine; a larger one goes alone."""

STAY_S = 1.0
"""So long one is kept in any case: who has read its head comes for its body."""

ROOM_WAIT_S = 60.0
"""How long one that there is no room for waits; who asks for it does not wait longer."""

LOOK_AGAIN_S = 0.1
MAX_LORA_RANK = 512


class _Room:
    """The bytes of segments that are made, kept or read; `drop_one` lets go of one that is only kept."""

    def __init__(self, drop_one: Callable[[], None]) -> None:
        self._drop_one = drop_one
        self._lock = threading.Lock()
        self._taken_bytes = 0
        # Told of by finalizers, which may wait for no lock.
        self._given_back: SimpleQueue[int] = SimpleQueue()
        self.is_closed = False

    def take(self, size_bytes: int) -> None:
        """Wait for so much room, one after the other; UnavailableError if there is none in time."""
        give_up_at_s = time.monotonic() + ROOM_WAIT_S
        with self._lock:
            self._count(wait_s=0.0)
            while self._taken_bytes and self._taken_bytes + size_bytes > ROOM_BYTES:
                if self.is_closed or time.monotonic() >= give_up_at_s:
                    raise UnavailableError("the controller has no memory left to make it in")
                self._drop_one()
                self._count(wait_s=LOOK_AGAIN_S)
            self._taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """So much is free again; from any thread, at any time."""
        self._given_back.put(size_bytes)

    def _count(self, *, wait_s: float) -> None:
        """Take in what was given back."""
        with suppress(Empty):
            while True:
                self._taken_bytes -= self._given_back.get(timeout=wait_s)
                wait_s = 0.0


class _Owner:
    """Closes a segment once nobody keeps or reads the region made of it."""

    def __init__(self, segment: AdapterSegment, room: _Room, size_bytes: int) -> None:
        self._segment = segment
        self._room = room
        self._size_bytes = size_bytes

    def __del__(self) -> None:
        self._segment.close()
        self._room.give_back(self._size_bytes)


class Origin:
    """Makes a version's segment when it is asked for, and keeps at most `MAX_KEPT` of them for a while, in
    `ROOM_BYTES`.

    `adapters` gives the versions that there are; `open` listens, and `peer` is then what replicas are told.
    """

    def __init__(
        self, library: AdapterStore, adapters: Callable[[], Mapping[VersionId, AdapterVersion]]
    ) -> None:
        self.peer: PeerAddress | None = None
        self._library = library
        self._adapters = adapters
        self._close: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Region, threading.Timer, float]] = {}
        self._room = _Room(self._drop_oldest)

    def open(self, host: str) -> None:
        """Listen there; a failure is one line in the log, for replicas may see the folder."""
        from loraserve.transport.registry import open_transports

        try:
            opened = open_transports(["tcp"], host=host, on_missing=self._make)
        except (LoraServeError, OSError) as error:
            logger.warning("replicas of other machines cannot read the store: %s", error)
            return
        self._close = opened.close
        addresses = tuple((one.scheme, one.address) for one in opened.transports)
        self.peer = PeerAddress(replica_id=ORIGIN, addresses=addresses)

    def close(self) -> None:
        """Serve nothing any more; blocks until transfers have ended."""
        self.peer = None
        self._close()
        with self._lock:
            self._room.is_closed = True
            kept = list(self._kept)
        for key in kept:
            self._forget(key)

    def _make(self, key: str) -> Region | None:
        """The region of a version, in a thread of the listener; None for one that there is not."""
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                return kept[0]
        adapter = self._adapters().get(VersionId(key))
        if adapter is None:
            return None
        self._room.take(adapter.size_bytes)
        try:
            segment = build_segment(
                self._library.directory_of(adapter.sha256),
                name=key,
                digest=adapter.sha256,
                max_lora_rank=MAX_LORA_RANK,
            )
        except BaseException:
            self._room.give_back(adapter.size_bytes)
            raise
        owner = _Owner(segment, self._room, adapter.size_bytes)
        head, body, fd, body_offset = segment.region()
        region = Region(
            head=head, body=body, size_bytes=segment.body_bytes, fd=fd, fd_offset=body_offset, owner=owner
        )
        self._keep(key, region)
        return region

    def _keep(self, key: str, region: Region) -> None:
        timer = threading.Timer(KEEP_S, self._forget, (key,))
        timer.daemon = True
        with self._lock:
            if self._room.is_closed:
                return  # while it was made
            self._kept[key] = region, timer, time.monotonic()
            oldest = next(iter(self._kept)) if len(self._kept) > MAX_KEPT else None
        timer.start()
        if oldest is not None:
            self._forget(oldest)

    def _forget(self, key: str) -> None:
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None:
            kept[1].cancel()

    def _drop_oldest(self) -> None:
        with self._lock:
            oldest = next(iter(self._kept), None)
            if oldest is None or time.monotonic() < self._kept[oldest][2] + STAY_S:
                return
        self._forget(oldest)
