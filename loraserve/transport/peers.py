"""The long-lived connections of a process to the listeners of others, reused and bounded.

Each peer has a few connections for bodies and a few for what is short, so that no question waits behind a
body. Who finds all in use waits as long as the peer sends anything on one of them.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from loraserve.transport.address import Address
from loraserve.transport.base import FetchStoppedError, PeerGoneError, PeerSlowError
from loraserve.transport.link import SLICE_S, Link, Patience, connect
from loraserve.transport.wire import (
    MAX_ANSWER_PAYLOAD_BYTES,
    WELCOME_BYTES,
    Frame,
    check_welcome,
    encode_hello,
)

MAX_SHORT = 2
MAX_BODIES = 4
KEEP_IDLE_S = 60.0

FINISH_IDLES = 4
"""An answer that has begun must be there after so many times what its peer may be silent, or one that drips
would be waited for without an end."""


class _Lane:
    """The connections to one peer for one purpose; all fields are the pool's lock's."""

    def __init__(self, address: Address, limit: int, lock: threading.Lock) -> None:
        self.address = address
        self.limit = limit
        self.free = threading.Condition(lock)
        self.waiting = 0
        self.users = 0
        self.busy: set[Link] = set()
        self.idle: list[tuple[float, Link]] = []
        self._received_bytes = 0

    def heard(self) -> int:
        """Grows whenever the peer has sent something."""
        return self._received_bytes + sum(link.received_bytes for link in self.busy)

    def put_away(self, link: Link) -> None:
        """A link that was busy is so no more."""
        self.busy.discard(link)
        self._received_bytes += link.received_bytes
        link.received_bytes = 0


class PeerPool:
    """Thread-safe. An exchange has a connection for itself; one that did not end in step is closed.

    `num_opened` counts the connections that were made, ever.
    """

    def __init__(
        self, *, max_bodies: int = MAX_BODIES, max_short: int = MAX_SHORT, keep_idle_s: float = KEEP_IDLE_S
    ) -> None:
        self._limits = {True: max_bodies, False: max_short}
        self._keep_idle_s = keep_idle_s
        self._lock = threading.Lock()
        self._lanes: dict[tuple[bytes, bool], _Lane] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self.num_opened = 0

    @property
    def num_connections(self) -> int:
        """How many connections are open, in use or not."""
        with self._lock:
            return sum(len(lane.busy) + len(lane.idle) for lane in self._lanes.values())

    @contextmanager
    def exchange(
        self,
        address: bytes,
        request: Frame,
        patience: Patience,
        *,
        is_body: bool,
        meanwhile: Callable[[Link], None] | None = None,
    ) -> Iterator[tuple[Link, Frame]]:
        """Ask a peer, and have the link and the first frame of its answer for the length of a `with`.

        The request gets a number. Whoever has read all of the answer sets `link.settled`, else the link is
        not used again. What takes long is a body, and has connections apart. `meanwhile` is called once the
        request is on its way, a second time if it has to be sent again. TransportError.
        """
        stop = patience.stop
        patience = Patience(
            idle_s=patience.idle_s,
            stop=lambda: self._closed or stop(),
            finish_s=FINISH_IDLES * patience.idle_s,
        )
        request = replace(request, request_id=(next(self._numbers) & 0xFFFFFFFF) or 1)
        with self._place(address, patience, is_body) as lane:
            link: Link | None = None
            try:
                link = self._take_idle(lane) or self._connect(lane, patience)
                try:
                    answer = link.ask(request, patience, MAX_ANSWER_PAYLOAD_BYTES, meanwhile)
                except PeerGoneError:
                    # A connection that was idle may have been closed by the peer just now.
                    if link.is_new or link.received_bytes:
                        raise
                    self._put_back(lane, link)
                    link = self._connect(lane, patience)
                    answer = link.ask(request, patience, MAX_ANSWER_PAYLOAD_BYTES, meanwhile)
                yield link, answer
            except PeerGoneError:
                if self._closed:
                    raise FetchStoppedError("this transport is closed") from None
                raise
            finally:
                if link is not None:
                    self._put_back(lane, link)

    def close(self) -> None:
        """End every exchange and close every connection; safe to call twice."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                for link in lane.busy:
                    link.shut_down()
                lane.free.notify_all()
            self._tidy(lambda since_s: True)

    @contextmanager
    def _place(self, address: bytes, patience: Patience, is_body: bool) -> Iterator[_Lane]:
        """One of the connections that a peer may have, for the length of a `with`."""
        with self._lock:
            lane = self._lanes.get((address, is_body))
            if lane is None:
                lane = _Lane(Address.decode(address), self._limits[is_body], self._lock)
                self._lanes[address, is_body] = lane
            lane.waiting += 1
            try:
                _wait_for_room(lane, patience)
                lane.users += 1
            finally:
                lane.waiting -= 1
        try:
            yield lane
        finally:
            with self._lock:
                lane.users -= 1
                lane.free.notify()
                oldest_s = time.monotonic() - self._keep_idle_s
                self._tidy(lambda since_s: since_s < oldest_s)

    def _take_idle(self, lane: _Lane) -> Link | None:
        with self._lock:
            while lane.idle:
                _, link = lane.idle.pop()
                if link.is_quiet():
                    link.is_new = False
                    lane.busy.add(link)
                    return link
                link.close()
        return None

    def _connect(self, lane: _Lane, patience: Patience) -> Link:
        link = connect(lane.address.host, lane.address.port, patience)
        try:
            link.say(encode_hello(lane.address.token), patience)
            check_welcome(link.receive_exactly(WELCOME_BYTES, patience))
        except BaseException:
            link.close()
            raise
        with self._lock:
            if self._closed:
                link.close()
                raise FetchStoppedError("this transport is closed")
            lane.busy.add(link)
            self.num_opened += 1
        return link

    def _put_back(self, lane: _Lane, link: Link) -> None:
        with self._lock:
            lane.put_away(link)
            if link.settled and not self._closed:
                lane.idle.append((time.monotonic(), link))
            else:
                link.close()

    def _tidy(self, is_old: Callable[[float], bool]) -> None:
        """Close what was idle for long, and forget peers that have nothing left."""
        for key, lane in list(self._lanes.items()):
            for since_s, link in lane.idle:
                if is_old(since_s):
                    link.close()
            lane.idle = [each for each in lane.idle if not is_old(each[0])]
            if not (lane.idle or lane.users or lane.waiting):
                del self._lanes[key]


def _wait_for_room(lane: _Lane, patience: Patience) -> None:
    heard, give_up_at = lane.heard(), time.monotonic() + patience.idle_s
    while True:
        if patience.stop():
            raise FetchStoppedError("stopped waiting for a connection")
        if lane.users < lane.limit:
            return
        if lane.heard() != heard:
            heard, give_up_at = lane.heard(), time.monotonic() + patience.idle_s
        elif time.monotonic() >= give_up_at:
            raise PeerSlowError(f"all {lane.limit} connections did nothing for {patience.idle_s:g} s")
        lane.free.wait(SLICE_S)
