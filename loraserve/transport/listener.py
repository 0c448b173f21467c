"""The one listening socket of a process: who connects, what they may ask, and what they are told.

Owns the accepting thread, one thread per connection (a bounded number), and the published regions of all
schemes that join. Answers HEAD itself; the other ops are the schemes'. Does not know how bodies travel.
A connection that says nothing, or nonsense, is closed within `hello_s`; one that asks nothing, within
`idle_s`; one whose reader takes nothing, within `stall_s`.
"""

import ipaddress
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from loraserve.errors import AlreadyExistsError, BadInputError, UnavailableError
from loraserve.transport.address import Address
from loraserve.transport.base import (
    BadPeerError,
    NotPublishedError,
    PeerGoneError,
    PeerSlowError,
    Region,
    TransportError,
)
from loraserve.transport.congestion import make_plain, restore
from loraserve.transport.link import Link, Patience, show_peer
from loraserve.transport.published import OnMissing, Published
from loraserve.transport.strangers import Strangers
from loraserve.transport.wire import (
    FIRST_SCHEME_OP,
    HELLO_BYTES,
    MAGIC,
    MAX_REQUEST_PAYLOAD_BYTES,
    TOKEN_BYTES,
    WELCOME,
    ErrorCode,
    Frame,
    Op,
    decode_hello,
    error_frame,
)

logger = logging.getLogger(__name__)

JOIN_S = 5.0
ACCEPT_PAUSE_S = 0.1
BACKLOG = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLimits:
    """How many connections there may be, how many of them before their hello, and how long each may do
    nothing; a client that waits for a region that is being made hears so every `wait_s`."""

    max_connections: int = 256
    max_silent: int = 128
    hello_s: float = 5.0
    idle_s: float = 120.0
    stall_s: float = 30.0
    wait_s: float = 1.0


class Connection:
    """One client's connection, as a handler sees it; used by one thread. `is_silent` until its hello."""

    def __init__(self, link: Link, listener: "Listener") -> None:
        self.link = link
        self.scheme = ""
        self.is_silent = True
        self._listener = listener

    @property
    def patience(self) -> Patience:
        """For sends and receives of a handler: a client that does nothing for so long is given up."""
        limits = self._listener.limits
        return Patience(idle_s=limits.stall_s, finish_s=limits.stall_s)

    def find(self, scheme: str, request: Frame) -> Region:
        """The region that the request names; NotPublishedError. The client is told to wait while one is
        made, and PeerGoneError ends the wait of one that has left."""

        def say_wait() -> None:
            if self._listener.closing:
                raise PeerGoneError("the listener is closed")
            self.send(Frame(op=Op.WAIT, request_id=request.request_id))

        return self._listener.published.find(scheme, request.key, say_wait)

    def send(self, frame: Frame, *, bytes_follow: bool = False) -> None:
        """Answer, or part of it; a frame that bytes follow leaves with them."""
        self.link.send(frame, self.patience, bytes_follow=bytes_follow)

    def receive(self, patience: Patience | None = None) -> Frame:
        """The client's next frame, for ops that are a conversation."""
        return self.link.receive(patience or self.patience, MAX_REQUEST_PAYLOAD_BYTES)


Handler = Callable[[Connection, Frame], None]
"""Answers one request in the connection's thread, and returns once all of the answer is sent. A
TransportError (NotPublishedError, BadPeerError, ...) becomes an ERROR frame, and so does any other error,
with a log line; PeerGoneError and PeerSlowError close the connection."""


class Listener:
    """Listens from its making to `close`; `address` is what peers need."""

    def __init__(
        self,
        host: str,
        port: int = 0,
        *,
        on_missing: OnMissing | None = None,
        limits: ListenerLimits | None = None,
    ) -> None:
        self.limits = limits or ListenerLimits()
        self.published = Published(on_missing, wait_s=self.limits.wait_s)
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._socket = _listen(host, port)
        self._congestion = make_plain(self._socket)
        where = self._socket.getsockname()
        self.port: int = where[1]
        self._is_local = ipaddress.ip_address(where[0].partition("%")[0]).is_loopback
        self._address = Address(host=host, port=self.port, token=self.token).encode()
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._handlers: dict[int, tuple[str, Handler]] = {}
        self._schemes: set[str] = set()
        self._strangers = Strangers(time.monotonic)
        self.closing = False
        self._thread = threading.Thread(target=self._accept_all, name="fabric-listener", daemon=True)
        self._thread.start()

    @property
    def address(self) -> bytes:
        """Host, port and this process's token, for schemes whose address needs no more."""
        return self._address

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine can connect."""
        return self._is_local

    @property
    def num_connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def join(self, scheme: str, handlers: Mapping[int, Handler] | None = None) -> None:
        """Let a scheme use this listener; AlreadyExistsError if it does. The last one to leave closes it."""
        with self._lock:
            if self.closing:
                raise UnavailableError("the fabric's listener is closed")
            if scheme in self._schemes:
                raise AlreadyExistsError(f"scheme {scheme} uses this listener already")
            self._schemes.add(scheme)
        for op, handler in (handlers or {}).items():
            self.handle(op, handler, scheme=scheme)

    def handle(self, op: int, handler: Handler, *, scheme: str) -> None:
        """Give requests with this op to a handler of a scheme that has joined; AlreadyExistsError."""
        with self._lock:
            if op in self._handlers or (op < FIRST_SCHEME_OP and op != Op.BODY):
                raise AlreadyExistsError(f"op {op} of the fabric's protocol has a handler already")
            self._handlers[op] = (scheme, handler)

    def leave(self, scheme: str) -> None:
        """Serve nothing over a scheme and end what it serves now; safe to call twice."""
        with self._lock:
            if scheme not in self._schemes:
                return
            self._schemes.remove(scheme)
            self._handlers = {op: each for op, each in self._handlers.items() if each[0] != scheme}
            busy = [each for each in self._connections if each.scheme == scheme]
            threads = [self._connections[each] for each in busy]
            for connection in busy:
                connection.link.shut_down()
            last = not self._schemes
        self.published.withdraw_all(scheme)
        if last:
            self.close()
        _join(threads)

    def publish(self, scheme: str, key: str, region: Region) -> None:
        """Serve a region over a scheme from now on; BadInputError, AlreadyExistsError."""
        if self.closing:
            raise UnavailableError("the fabric's listener is closed")
        self.published.publish(scheme, key, region)

    def withdraw(self, scheme: str, key: str) -> None:
        """Serve it no more over this scheme; what is being read is read to its end."""
        self.published.withdraw(scheme, key)

    def close(self) -> None:
        """Close all connections and give the threads and sockets back; safe to call twice."""
        with self._lock:
            self.closing = True
            schemes, self._schemes = self._schemes, set()
            self._handlers = {}
            threads = [self._thread, *self._connections.values()]
            for connection in self._connections:
                connection.link.shut_down()
        for scheme in schemes:
            self.published.withdraw_all(scheme)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        _join(threads)
        self._socket.close()

    def _accept_all(self) -> None:
        while not self.closing:
            try:
                sock, where = self._socket.accept()
            except OSError as error:
                if self.closing:
                    return
                self._strangers.turned_away("anybody", f"accept failed: {error.strerror}")
                # Out of descriptors: somebody must give some back first.
                select.poll().poll(1000 * ACCEPT_PAUSE_S)
                continue
            self._admit(sock, show_peer(where[0], where[1]))

    def _admit(self, sock: socket.socket, peer: str) -> None:
        with self._lock:
            self._push_out()
            full = len(self._connections) >= self.limits.max_connections
        if full:
            self._strangers.turned_away(peer, f"{self.limits.max_connections} connections are open already")
            _refuse(sock)
            return
        try:
            restore(sock, self._congestion)
            connection = Connection(Link(sock, peer), self)
        except OSError:
            sock.close()  # it has left again
            return
        thread = threading.Thread(target=self._serve, args=(connection,), name=f"fabric-{peer}", daemon=True)
        with self._lock:
            if self.closing:
                sock.close()
                return
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            self._forget(connection)
            self._strangers.turned_away(peer, str(error))

    def _push_out(self) -> None:
        """Let strangers that say nothing give way to who comes next: a client of ours says hello at once."""
        silent = [each for each in self._connections if each.is_silent]
        if len(silent) >= self.limits.max_silent:
            silent[0].link.shut_down()
            silent[0].is_silent = False  # it is on its way out

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            del self._connections[connection]
            connection.link.close()  # under the lock: nobody shuts down a descriptor that is another's by now

    def _serve(self, connection: Connection) -> None:
        try:
            if self._greet(connection.link):
                connection.is_silent = False
                while not self.closing:
                    self._answer_next(connection)
        except (PeerGoneError, PeerSlowError):
            pass  # clients come and go
        except BadPeerError as error:
            self._strangers.turned_away(connection.link.peer, str(error))
        except Exception:
            logger.exception("the fabric's connection from %s failed", connection.link.peer)
        finally:
            self._forget(connection)

    def _greet(self, link: Link) -> bool:
        """Whether this is a client of ours that means this process."""
        patience = Patience(idle_s=self.limits.hello_s, finish_s=self.limits.hello_s)
        try:
            magic = link.receive_exactly(len(MAGIC), patience)  # a stranger may never say as much as a hello
            rest = link.receive_exactly(HELLO_BYTES - len(MAGIC), patience) if magic == MAGIC else b""
        except (PeerGoneError, PeerSlowError) as error:
            self._strangers.turned_away(link.peer, f"it said no hello: {error}")
            return False
        token = decode_hello(magic + rest)
        link.send_bytes(memoryview(WELCOME), patience)
        if secrets.compare_digest(token, self.token):
            return True
        message = "the process that had this address is gone, another one has its port"
        link.send(error_frame(0, ErrorCode.OTHER_INSTANCE, message), patience)
        return False

    def _answer_next(self, connection: Connection) -> None:
        link = connection.link
        request = link.receive(
            Patience(idle_s=self.limits.idle_s, finish_s=self.limits.hello_s), MAX_REQUEST_PAYLOAD_BYTES
        )
        try:
            self._handler_of(connection, request)(connection, request)
        except (PeerGoneError, PeerSlowError):
            raise
        except TransportError as error:
            connection.send(error_frame(request.request_id, _code_of(error), str(error)))
        except Exception as error:
            logger.exception("a request for %r of the fabric failed", request.key)
            connection.send(error_frame(request.request_id, ErrorCode.FAILED, f"it failed: {error}"))
        finally:
            connection.scheme = ""

    def _handler_of(self, connection: Connection, request: Frame) -> Handler:
        if request.op == Op.HEAD:
            return _answer_head
        with self._lock:
            scheme, handler = self._handlers.get(request.op, ("", None))
            connection.scheme = scheme  # under the lock: `leave` finds either no handler or its user
        if handler is None:
            raise BadPeerError(f"op {request.op} is not served here")
        return handler


def _answer_head(connection: Connection, request: Frame) -> None:
    scheme = request.payload[:32].decode(errors="replace")
    region = connection.find(scheme, request)
    connection.send(
        Frame(op=Op.HEAD_IS, request_id=request.request_id, end=region.size_bytes, payload=region.head)
    )


def _code_of(error: TransportError) -> ErrorCode:
    if isinstance(error, NotPublishedError):
        return ErrorCode.NOT_PUBLISHED
    return ErrorCode.BAD_REQUEST if isinstance(error, BadPeerError) else ErrorCode.FAILED


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadInputError(
            f"the fabric cannot listen on {show_peer(host, port)}: {error.strerror or error}"
        ) from error


def _refuse(sock: socket.socket) -> None:
    """Say that there is no room, without waiting for anybody."""
    frame = error_frame(0, ErrorCode.BUSY, "the peer serves as many connections as it may")
    with suppress(OSError):
        sock.send(WELCOME + frame.encode(), socket.MSG_DONTWAIT)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(HELLO_BYTES, socket.MSG_DONTWAIT)  # else closing resets it, and takes the answer with it
    sock.close()


def _join(threads: list[threading.Thread]) -> None:
    give_up_at = time.monotonic() + JOIN_S
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(0.0, give_up_at - time.monotonic()))
