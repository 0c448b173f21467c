"""The controller's store as a peer of the fabric, for replicas that do not see its folder."""

import logging
import threading
from collections.abc import Callable, Mapping

from loraserve.adapters import AdapterStore
from loraserve.adapters.segment import AdapterSegment, build_segment
from loraserve.errors import LoraServeError
from loraserve.fabric.wanted import ORIGIN, PeerAddress
from loraserve.transport.base import Region
from placement.types import AdapterVersion, VersionId

logger = logging.getLogger(__name__)

KEEP_S = 30.0
"""How long a segment stays that was made for a replica: others may come for it meanwhile."""

MAX_KEPT = 4
MAX_LORA_RANK = 512


class _Owner:
    """Closes a segment once nobody keeps or reads the region made of it."""

    def __init__(self, segment: AdapterSegment) -> None:
        self._segment = segment

    def __del__(self) -> None:
        self._segment.close()


class Origin:
    """Makes a version's segment when it is asked for, and keeps at most `MAX_KEPT` of them for a while.

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
        self._kept: dict[str, tuple[Region, threading.Timer]] = {}
        self._is_closed = False

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
            self._is_closed = True
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
        segment = build_segment(
            self._library.directory_of(adapter.sha256),
            name=key,
            digest=adapter.sha256,
            max_lora_rank=MAX_LORA_RANK,
        )
        head, body, fd, body_offset = segment.region()
        region = Region(
            head=head,
            body=body,
            size_bytes=segment.body_bytes,
            fd=fd,
            fd_offset=body_offset,
            owner=_Owner(segment),
        )
        self._keep(key, region)
        return region

    def _keep(self, key: str, region: Region) -> None:
        timer = threading.Timer(KEEP_S, self._forget, (key,))
        timer.daemon = True
        with self._lock:
            if self._is_closed:
                return  # while it was made
            self._kept[key] = region, timer
            oldest = next(iter(self._kept)) if len(self._kept) > MAX_KEPT else None
        timer.start()
        if oldest is not None:
            self._forget(oldest)

    def _forget(self, key: str) -> None:
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None:
            kept[1].cancel()
