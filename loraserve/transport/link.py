"""One connected socket between two processes of the fabric, with every wait bounded.

The socket stays in blocking mode with short kernel timeouts: a large read or a sendfile is one system call
that takes the GIL once, and yet nobody waits longer than `SLICE_S` to hear of a stop.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.pace import never
from loraserve.transport.base import (
    BadPeerError,
    FetchStoppedError,
    PeerGoneError,
    PeerSlowError,
)
from loraserve.transport.wire import HEADER_BYTES, Frame, Op, decode_header, error_of

SLICE_S = 0.1
"""How long a system call may wait before `stop` is asked again."""

SENDFILE_BYTES = 64 * 1024**2

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 20_000

MAX_WAIT_S = 60.0
"""How long a peer may say that the answer is being made; large adapters are read from cold disks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the other side may do nothing, and who may end the wait before.

    `finish_s` bounds what has begun: so long after its first byte a frame must be there.
    """

    idle_s: float
    stop: Callable[[], bool] = never
    finish_s: float | None = None


class Link:
    """A socket that speaks frames; one thread at a time, except `shut_down` and `is_broken`.

    `received_bytes` counts what came since the link was last put away; `settled` says that the last exchange
    is complete on both sides, so that the link can be used for another one; `is_new`, that it is the first.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer
        self.received_bytes = 0
        self.settled = True
        self.is_new = True
        _tune(sock)

    def send(self, frame: Frame, patience: Patience, *, bytes_follow: bool = False) -> None:
        """Send a frame, or let it leave with the bytes that follow; TransportError."""
        flags = socket.MSG_MORE if bytes_follow else 0
        self.send_bytes(memoryview(frame.encode()), patience, flags)

    def say(self, words: bytes, patience: Patience) -> None:
        """Send what is to be answered; a peer that has closed may have said why, and that is read next."""
        try:
            self.send_bytes(memoryview(words), patience)
        except PeerGoneError:
            if not self.has_unread():
                raise

    def send_bytes(self, data: memoryview, patience: Patience, flags: int = 0) -> None:
        """Send all of a view of bytes."""
        sent = 0
        while sent < len(data):
            with data[sent:] as rest:
                sent += self._wait(lambda rest=rest: self.sock.send(rest, flags), patience)  # type: ignore[misc]

    def send_file(self, fd: int, offset: int, count: int, patience: Patience) -> None:
        """Send `count` bytes of a file, not copied through this process; ValueError if it has fewer."""
        end = offset + count
        while offset < end:
            sent = self._wait(
                lambda at=offset: os.sendfile(  # type: ignore[misc]
                    self.sock.fileno(), fd, at, min(SENDFILE_BYTES, end - at)
                ),
                patience,
            )
            if sent == 0:
                raise ValueError(f"a region's file ends at {offset}, {end - offset} bytes too early")
            offset += sent

    def receive_some(self, into: memoryview, patience: Patience) -> int:
        """Fill `into` as far as bytes come without a pause; at least one byte."""
        try:
            count = self.sock.recv_into(into, 0, socket.MSG_WAITALL)
        except OSError:  # not now, or not any more
            count = self._wait(lambda: self.sock.recv_into(into, 0, socket.MSG_WAITALL), patience)
        if count == 0:
            raise PeerGoneError(f"{self.peer} closed the connection")
        self.received_bytes += count
        return count

    def receive_exactly(self, count: int, patience: Patience) -> bytes:
        """So many bytes, which must be few enough to allocate."""
        if count == 0:
            return b""
        buffer = bytearray(count)
        give_up_at = None if patience.finish_s is None else time.monotonic() + patience.finish_s
        with memoryview(buffer) as view:
            begin = 0
            while begin < count:
                if give_up_at is not None and time.monotonic() > give_up_at:
                    raise PeerSlowError(f"{self.peer} has not finished its message")
                with view[begin:] as rest:
                    begin += self.receive_some(rest, patience)
        return bytes(buffer)

    def receive(self, patience: Patience, max_payload_bytes: int) -> Frame:
        """The next frame; BadPeerError for what is none."""
        if patience.stop is never:
            self.await_readable(patience)  # maybe for minutes: wake up for what comes only
        header = decode_header(self.receive_exactly(HEADER_BYTES, patience), max_payload_bytes)
        return header.frame(self.receive_exactly(header.rest_bytes, patience))

    def ask(
        self,
        request: Frame,
        patience: Patience,
        max_payload_bytes: int,
        meanwhile: Callable[["Link"], None] | None = None,
    ) -> Frame:
        """Send a request, do something `meanwhile`, and return the first frame that answers it.

        An ERROR frame is raised as what it stands for, and leaves the link settled. After any other answer
        the caller sets `settled` once it has read all that belongs to it.
        """
        self.settled = False
        self.say(request.encode(), patience)
        if meanwhile is not None:
            meanwhile(self)
        give_up_at = time.monotonic() + MAX_WAIT_S
        while True:
            answer = self.receive(patience, max_payload_bytes)
            if answer.request_id not in (request.request_id, 0):
                raise BadPeerError(f"{self.peer} answers a request that was not made")
            if answer.op == Op.ERROR:
                self.settled = answer.request_id == request.request_id
                raise error_of(answer)
            if answer.op != Op.WAIT:
                return answer
            if patience.stop():
                raise FetchStoppedError(f"stopped waiting for {self.peer}")
            if time.monotonic() > give_up_at:
                raise PeerSlowError(f"{self.peer}: the answer is still being made after {MAX_WAIT_S:g} s")

    def await_readable(self, patience: Patience) -> None:
        """Return once something can be read, be it the end; PeerSlowError, FetchStoppedError."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        slice_s = patience.idle_s if patience.stop is never else SLICE_S
        give_up_at = time.monotonic() + patience.idle_s
        while not poll.poll(1000 * max(0.0, min(slice_s, give_up_at - time.monotonic()))):
            self._check(patience, give_up_at)

    def is_broken(self) -> bool:
        """Whether the other side has closed the link, or it broke; says nothing of a silent peer."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_quiet(self) -> bool:
        """Whether the link is whole and nothing waits on it that nobody asked for."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def has_unread(self) -> bool:
        """Whether bytes wait that nobody asked for."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def shut_down(self) -> None:
        """End both directions, from any thread: whoever waits on the link gets PeerGoneError."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is not connected any more

    def close(self) -> None:
        """Give the socket back; only by the thread that uses it."""
        self.sock.close()

    def _wait(self, call: Callable[[], int], patience: Patience) -> int:
        """What `call` returns, once the kernel has room or bytes for it."""
        give_up_at = time.monotonic() + patience.idle_s
        while True:
            try:
                return call()
            except BlockingIOError:
                self._check(patience, give_up_at)
            except OSError as error:
                raise PeerGoneError(f"{self.peer} is gone: {error.strerror or error}") from error

    def _check(self, patience: Patience, give_up_at: float) -> None:
        if patience.stop():
            raise FetchStoppedError(f"stopped waiting for {self.peer}")
        if time.monotonic() >= give_up_at:
            raise PeerSlowError(f"{self.peer} did nothing for {patience.idle_s:g} s")


def connect(host: str, port: int, patience: Patience) -> Link:
    """A link to a listening process; PeerGoneError if nobody is there, PeerSlowError if nothing answers."""
    peer = show_peer(host, port)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PeerGoneError(f"{peer} cannot be reached: {error.strerror or error}") from error
    try:
        sock.setblocking(False)
        _finish_connect(sock, sock.connect_ex(where), peer, patience)
        sock.setblocking(True)
        return Link(sock, peer)
    except OSError as error:
        sock.close()
        raise PeerGoneError(f"{peer} cannot be reached: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise


def show_peer(host: str, port: int) -> str:
    """An address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _finish_connect(sock: socket.socket, code: int, peer: str, patience: Patience) -> None:
    if code == 0:
        return
    if code != errno.EINPROGRESS:
        raise OSError(code, os.strerror(code))
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    give_up_at = time.monotonic() + patience.idle_s
    while not poll.poll(1000 * SLICE_S):
        if patience.stop():
            raise FetchStoppedError(f"stopped connecting to {peer}")
        if time.monotonic() >= give_up_at:
            raise PeerSlowError(f"{peer} did not take a connection for {patience.idle_s:g} s")
    failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failure:
        raise OSError(failure, os.strerror(failure))


def _tune(sock: socket.socket) -> None:
    sock.settimeout(None)
    slice_timeval = struct.pack("ll", int(SLICE_S), round(SLICE_S % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, slice_timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, slice_timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
