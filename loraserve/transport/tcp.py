"""Scheme `tcp`: bodies over plain sockets, sent from their file and received where they are to lie."""

import logging
from collections.abc import Callable

from loraserve.errors import BadInputError
from loraserve.pace import Pace
from loraserve.transport.base import (
    BadPeerError,
    Buffer,
    FetchStoppedError,
    PeerGoneError,
    PeerSlowError,
    Progress,
    Region,
)
from loraserve.transport.link import Link, Patience
from loraserve.transport.listener import Connection, Listener
from loraserve.transport.peers import PeerPool
from loraserve.transport.published import InUse
from loraserve.transport.wire import Frame, Op, range_frame, range_of

logger = logging.getLogger(__name__)

SCHEME = "tcp"

PIECE_BYTES = 2 * 1024**2
"""Progress is told, and `stop` asked, after so many bytes."""


class TcpTransport:
    """Serves what is published through a listener, and fetches over a few long-lived connections."""

    scheme = SCHEME
    takes_device_memory = False

    def __init__(self, listener: Listener, pool: PeerPool | None = None) -> None:
        self.listener = listener
        self.pool = pool or PeerPool()
        self.piece_bytes = PIECE_BYTES
        self.pace: Pace | None = None
        self._in_use = InUse()
        listener.join(SCHEME, {Op.BODY: self._answer_body})

    @property
    def address(self) -> bytes:
        """Host, port and token of the listener."""
        return self.listener.address

    def publish(self, key: str, region: Region) -> None:
        """Serve a region of host memory under this key; BadInputError, AlreadyExistsError."""
        if hasattr(region.body, "__cuda_array_interface__"):
            raise BadInputError(f"{key}: scheme {SCHEME} serves host memory only")
        self.listener.publish(SCHEME, key, region)

    def withdraw(self, key: str) -> None:
        """Serve it no more; transfers that run go on to their end."""
        self.listener.withdraw(SCHEME, key)

    def read_head(self, address: bytes, key: str, *, idle_timeout_s: float) -> tuple[bytes, int]:
        """The region's head, and how many bytes its body has. TransportError."""
        return read_head(self.pool, address, key, scheme=SCHEME, patience=Patience(idle_s=idle_timeout_s))

    def fetch(
        self,
        address: bytes,
        key: str,
        into: Buffer,
        *,
        on_bytes: Progress,
        idle_timeout_s: float,
        stop: Callable[[], bool],
    ) -> None:
        """Fill `into` with the body. TransportError; ValueError if `into` cannot be written."""
        patience = Patience(idle_s=idle_timeout_s, stop=stop)
        with memoryview(into) as given, given.cast("B") as body, self._in_use.holding(len(body)):
            if body.readonly:
                raise ValueError("the destination of a fetch cannot be written")
            size_bytes = len(body)
            request = range_frame(Op.BODY, 0, 0, size_bytes, of_bytes=size_bytes, key=key)
            with self.pool.exchange(address, request, patience, is_body=True) as (link, answer):
                if answer.op != Op.DATA or range_of(answer) != (0, size_bytes, size_bytes):
                    raise BadPeerError(f"{link.peer} answers something else than the body of {key}")
                _receive_body(link, body, self.piece_bytes, on_bytes, patience)

    def active_bytes(self) -> int:
        """Bytes of regions that are being read by or from this process now."""
        return self._in_use.bytes

    def close(self) -> None:
        """Serve nothing and end every transfer; safe to call twice."""
        self.pool.close()
        self.listener.leave(SCHEME)

    def _answer_body(self, connection: Connection, request: Frame) -> None:
        begin, end, of_bytes = range_of(request)
        region = connection.find(SCHEME, request)
        if of_bytes != region.size_bytes:
            raise BadPeerError(f"the body of {request.key} has {region.size_bytes} bytes, not {of_bytes}")
        with self._in_use.holding(region.size_bytes):
            data = range_frame(Op.DATA, request.request_id, begin, end, of_bytes=of_bytes)
            connection.send(data, bytes_follow=begin < end)
            try:
                self._send(connection, region, begin, end)
            except (PeerGoneError, PeerSlowError):
                raise
            except Exception as error:
                # No ERROR frame may come among a body's bytes: the connection must end here.
                logger.error("the body of %r could not be sent: %s", request.key, str(error))
                raise PeerGoneError(f"the body of {request.key} could not be sent") from error

    def _send(self, connection: Connection, region: Region, begin: int, end: int) -> None:
        if self.pace is None:
            _send_body(connection, region, begin, end)
            return
        rest = self.pace.for_one()
        for piece in range(begin, end, self.piece_bytes):
            _send_body(connection, region, piece, min(piece + self.piece_bytes, end))
            rest()


def read_head(
    pool: PeerPool, address: bytes, key: str, *, scheme: str, patience: Patience
) -> tuple[bytes, int]:
    """The head that a peer publishes over a scheme under this key, and its body's length. TransportError."""
    request = Frame(op=Op.HEAD, key=key, payload=scheme.encode())
    with pool.exchange(address, request, patience, is_body=False) as (link, answer):
        if answer.op != Op.HEAD_IS:
            raise BadPeerError(f"{link.peer} answers something else than the head of {key}")
        link.settled = True
        return answer.payload, answer.end


def _send_body(connection: Connection, region: Region, begin: int, end: int) -> None:
    if region.fd >= 0:
        connection.link.send_file(region.fd, region.fd_offset + begin, end - begin, connection.patience)
        return
    with memoryview(region.body) as given, given.cast("B") as body, body[begin:end] as part:
        connection.link.send_bytes(part, connection.patience)


def _receive_body(
    link: Link, body: memoryview, piece_bytes: int, on_bytes: Progress, patience: Patience
) -> None:
    begin, end = 0, len(body)
    while begin < end:
        piece_end = min(begin + piece_bytes, end)
        done = begin
        while done < piece_end:
            with body[done:piece_end] as rest:
                done += link.receive_some(rest, patience)
            if done < end and patience.stop():
                raise FetchStoppedError(f"stopped fetching from {link.peer}")
        link.settled = piece_end == end
        on_bytes(begin, piece_end)
        begin = piece_end
    link.settled = True
