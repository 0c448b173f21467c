"""What a thread that waits for UCX looks after besides: whether the peer lives, and what it says."""

import socket
import time
from collections.abc import Callable

from loraserve.transport.base import BadPeerError, FetchStoppedError, PeerGoneError, PeerSlowError
from loraserve.transport.link import Link, Patience
from loraserve.transport.listener import Connection
from loraserve.transport.ucx_wire import UCX_STOP
from loraserve.transport.wire import HEADER_BYTES, MAX_REQUEST_PAYLOAD_BYTES, Frame, Op, decode_header

WIND_UP_S = 1.0
"""How long a fetch that is stopped may take to come to an end with its sender."""

WAIT_S = 1.0
"""How often who asks is told that its turn has not come."""


class SenderWatch:
    """The receiver's eye on the peer that sends."""

    def __init__(self, link: Link, patience: Patience) -> None:
        self._link = link
        self._patience = patience

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._link.sock.fileno()

    def look(self, quiet_s: float) -> None:
        """Ends the wait for a sender that is gone, silent or not wanted any more."""
        if self._patience.stop():
            raise FetchStoppedError(f"stopped fetching from {self._link.peer}")
        if self._link.is_broken():
            raise PeerGoneError(f"{self._link.peer} closed the connection in the middle of a body")
        if self._link.has_unread():
            raise BadPeerError(f"{self._link.peer} says something in the middle of a body")
        if quiet_s >= self._patience.idle_s:
            raise PeerSlowError(f"{self._link.peer} sent nothing for {self._patience.idle_s:g} s")


class ReaderWatch:
    """The sender's eye on the peer that receives."""

    def __init__(self, connection: Connection, is_closed: Callable[[], bool]) -> None:
        self._link = connection.link
        self._stall_s = connection.patience.idle_s
        self._is_closed = is_closed
        self._connection = connection
        self._closed_at_s: float | None = None
        self._asked_at_s: float | None = None
        self.told = False

    @property
    def stopped(self) -> bool:
        """Whether no more is to be sent: the receiver has said so, or this process closes."""
        return self.told or self._is_closed()

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._link.sock.fileno()

    def look(self, quiet_s: float) -> None:
        """Takes what the receiver says; ends the wait for one that is gone or stalls."""
        if self._link.is_broken():
            raise PeerGoneError(f"{self._link.peer} takes no more")
        if self._next_op() == UCX_STOP:
            self._connection.receive()
            self.told = True
        elif self._link.has_unread():
            # It has all of the body, and UCX is about to say so.
            self._asked_at_s = self._asked_at_s or time.monotonic()
            if time.monotonic() > self._asked_at_s + WIND_UP_S:
                raise BadPeerError(f"{self._link.peer} asks again in the middle of a body")
        if self._is_closed():
            self._closed_at_s = self._closed_at_s or time.monotonic()
            if time.monotonic() > self._closed_at_s + WIND_UP_S:
                raise PeerGoneError(f"{self._link.peer} takes no more, and this transport is closed")
        if quiet_s >= self._stall_s:
            raise PeerSlowError(f"{self._link.peer} took nothing for {self._stall_s:g} s")

    def _next_op(self) -> int | None:
        """Of the frame that waits, if there is one; it is not taken."""
        try:
            raw = self._link.sock.recv(HEADER_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return None
        return decode_header(raw, MAX_REQUEST_PAYLOAD_BYTES).op if len(raw) == HEADER_BYTES else None


class Waiting:
    """Tells who asks that its turn comes."""

    def __init__(self, connection: Connection, request: Frame, is_closed: Callable[[], bool]) -> None:
        self._connection = connection
        self._request = request
        self._is_closed = is_closed
        self._said_s = time.monotonic()

    def check(self) -> None:
        """Say so from time to time; PeerGoneError if nobody waits any more."""
        if self._is_closed() or self._connection.link.is_broken():
            raise PeerGoneError(f"{self._connection.link.peer} waits no more")
        if time.monotonic() - self._said_s >= WAIT_S:
            self._said_s = time.monotonic()
            self._connection.send(Frame(op=Op.WAIT, request_id=self._request.request_id))


class WindUpWatch:
    """The receiver's eye on a peer that is to stop."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._give_up_at = time.monotonic() + WIND_UP_S
        self.patience = Patience(idle_s=WIND_UP_S, finish_s=WIND_UP_S)

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._link.sock.fileno()

    def look(self, quiet_s: float) -> None:
        """Ends the wait for one that does not stop."""
        if time.monotonic() >= self._give_up_at or self._link.is_broken():
            raise PeerSlowError(f"{self._link.peer} does not stop")
