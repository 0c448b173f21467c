"""The lanes of one direction: a bounded number, made when needed, a few kept for the next transfer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraserve.transport.base import PeerGoneError, TransportError
from loraserve.transport.link import SLICE_S
from loraserve.transport.ucx_lane import Lane
from loraserve.transport.ucx_library import UcxLibrary

MAX_LANES = 8
MAX_IDLE = 4

MAX_KEPT = 32
"""Each has a few MiB and a dozen descriptors; with so many, others are to carry the bytes."""


class LanePool:
    """Thread-safe. The lane that was used last is used next: its endpoints are there already."""

    def __init__(self, library: UcxLibrary) -> None:
        self._library = library
        self._free = threading.Condition()
        self._idle: list[Lane] = []
        self._used = 0
        self._closed = False

    @contextmanager
    def lane(self, while_waiting: Callable[[], None]) -> Iterator[Lane]:
        """A lane for the length of a `with`; one that is left in the middle of a transfer is discarded.

        `while_waiting` is called often while all are in use, and ends the wait with what it raises.
        """
        if self._library.num_kept >= MAX_KEPT:
            raise TransportError(f"UCX holds on to {MAX_KEPT} workers of peers that are gone")
        if self._closed:
            raise PeerGoneError("this transport is closed")
        with self._free:
            while self._used >= MAX_LANES:
                self._free.wait(SLICE_S)
                while_waiting()
            self._used += 1
            lane = self._idle.pop() if self._idle else None
        try:
            lane = lane or Lane(self._library)
            yield lane
        finally:
            if lane is not None:
                self._put_back(lane)
            with self._free:
                self._used -= 1
                self._free.notify_all()

    def close(self, timeout_s: float) -> None:
        """Give the lanes back; those in use go when their transfers end, which is waited for."""
        with self._free:
            self._closed = True
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.discard()
        with self._free:
            self._free.wait_for(lambda: self._used == 0, timeout_s)

    def _put_back(self, lane: Lane) -> None:
        with self._free:
            keep = lane.clean and not lane.worn and not self._closed and len(self._idle) < MAX_IDLE
            if keep:
                self._idle.append(lane)
        if not keep:
            lane.discard()
