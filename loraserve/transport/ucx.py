"""Scheme `ucx`: bodies over UCX, which takes shared memory, RDMA, CUDA IPC or TCP, whichever serves best.

What is wanted, and whether the peer lives, goes over the listener's connections (`wire.py`, ops from 16):

    UCX_BODY  payload: `Ask`, with the UCX address of the lane that receives
    UCX_GO    the peer has the region and a lane, and sends. begin: over shared memory?
    UCX_STOP  from the receiver: send no more
    UCX_STOPPED  begin: so many chunks were sent

A connection that breaks means that the peer is dead or has given up, whatever UCX knows of it. UCX's own
error handling rules out shared memory, so it is off where both ends may share memory, and on elsewhere.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from loraserve.pace import Pace, no_rest
from loraserve.transport.base import (
    BadPeerError,
    Buffer,
    FetchStoppedError,
    NotPublishedError,
    PeerBusyError,
    PeerGoneError,
    PeerSlowError,
    Progress,
    Region,
    TransportError,
)
from loraserve.transport.link import Link, Patience
from loraserve.transport.listener import Connection, Listener
from loraserve.transport.peers import PeerPool
from loraserve.transport.published import InUse
from loraserve.transport.tcp import read_head
from loraserve.transport.ucx_buffers import as_bytes, cut
from loraserve.transport.ucx_lane import CHUNK_BYTES, Lane
from loraserve.transport.ucx_library import UcxLibrary, may_share_memory
from loraserve.transport.ucx_pool import LanePool
from loraserve.transport.ucx_watch import WIND_UP_S, ReaderWatch, SenderWatch, Waiting, WindUpWatch
from loraserve.transport.ucx_wire import MIN_CHUNK_BYTES, UCX_BODY, UCX_GO, UCX_STOP, UCX_STOPPED, Ask
from loraserve.transport.wire import Frame

SCHEME = "ucx"

LOOPBACK_DEVICE = "lo"

CLOSE_S = 5.0


class UcxTransport:
    """Serves what is published through a listener and UCX. No thread of its own: each transfer is driven by
    the thread that fetches, and by the one that answers it."""

    scheme = SCHEME
    takes_device_memory = True

    def __init__(
        self,
        listener: Listener,
        library: UcxLibrary,
        pool: PeerPool | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._listener = listener
        self.piece_bytes = chunk_bytes
        self.pace: Pace | None = None
        self._library = library
        self._pool = pool or PeerPool()
        # Two pools: a process whose lanes all wait for others' would serve none of them.
        self._receiving = LanePool(library)
        self._sending = LanePool(library)
        self._in_use = InUse()
        self._closed = False
        self._host = _this_host() if may_share_memory(library.tls) else b""
        listener.join(SCHEME, {UCX_BODY: self._answer_body, UCX_STOP: _answer_late_stop})

    @property
    def address(self) -> bytes:
        """Host, port and token of the listener; UCX's own addresses travel with each request."""
        return self._listener.address

    def publish(self, key: str, region: Region) -> None:
        """Serve a region of host or device memory; BadInputError, AlreadyExistsError."""
        self._listener.publish(SCHEME, key, region)

    def withdraw(self, key: str) -> None:
        """Serve it no more; transfers that run go on to their end."""
        self._listener.withdraw(SCHEME, key)

    def read_head(self, address: bytes, key: str, *, idle_timeout_s: float) -> tuple[bytes, int]:
        """The region's head, and how many bytes its body has. TransportError."""
        return read_head(self._pool, address, key, scheme=SCHEME, patience=Patience(idle_s=idle_timeout_s))

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
        patience = Patience(idle_s=idle_timeout_s, stop=lambda: self._closed or stop())

        def check_stop() -> None:
            if patience.stop():
                raise FetchStoppedError(f"stopped waiting to fetch {key}")

        with (
            as_bytes(into, to_write=True) as body,
            self._in_use.holding(body.nbytes),
            self._receiving.lane(check_stop) as lane,
        ):
            check_stop()
            ask = Ask(
                size_bytes=body.nbytes,
                first_tag=lane.next_tags(),
                chunk_bytes=self.piece_bytes,
                host=self._host,
                worker_address=lane.address,
            )

            def get_ready(link: Link) -> None:
                if not lane.clean:  # what was sent for the first request came here too
                    raise PeerGoneError(f"{link.peer} closed the connection")
                lane.receive_into(cut(body, ask.chunk_bytes), ask.first_tag, address)
                lane.spin(link.is_quiet)

            request = Frame(op=UCX_BODY, key=key, payload=ask.encode())
            try:
                with self._pool.exchange(address, request, patience, is_body=True, meanwhile=get_ready) as (
                    link,
                    answer,
                ):
                    if answer.op != UCX_GO:
                        raise BadPeerError(f"{link.peer} answers something else than the body of {key}")
                    lane.is_shared = bool(answer.begin)
                    _Receiving(lane, link, ask, patience).run(on_bytes)
            except (NotPublishedError, PeerBusyError):
                lane.take_back()  # the peer has refused, and so sends nothing
                raise

    def active_bytes(self) -> int:
        """Bytes of regions that are being read by or from this process now."""
        return self._in_use.bytes

    def close(self) -> None:
        """Serve nothing, end every transfer and give UCX's memory back; safe to call twice."""
        self._closed = True
        # While the connections stand both ends come to an end together, and UCX lets go of all of it.
        self._receiving.close(2 * WIND_UP_S)
        self._sending.close(2 * WIND_UP_S)
        self._pool.close()
        self._listener.leave(SCHEME)
        self._receiving.close(CLOSE_S)
        self._sending.close(CLOSE_S)

    def _answer_body(self, connection: Connection, request: Frame) -> None:
        ask = Ask.decode(request.payload)
        region = connection.find(SCHEME, request)
        if ask.size_bytes != region.size_bytes:
            raise BadPeerError(
                f"the body of {request.key} has {region.size_bytes} bytes, not {ask.size_bytes}"
            )
        waiting = Waiting(connection, request, lambda: self._closed)
        with self._in_use.holding(region.size_bytes), self._sending.lane(waiting.check) as lane:
            shared = ask.host != b"" and ask.host == self._host
            lane.connect(ask.worker_address, error_handling=not shared)
            try:
                with as_bytes(region.body, to_write=False) as body:
                    chunks = cut(body, ask.chunk_bytes)
                    lane.send_from(chunks, ask.first_tag)
                    connection.send(Frame(op=UCX_GO, request_id=request.request_id, begin=shared))
                    watch = ReaderWatch(connection, lambda: self._closed)
                    rest = self.pace.for_one() if self.pace is not None else no_rest

                    def may_go_on() -> bool:
                        rest()
                        return not watch.stopped

                    sent = lane.send(watch, may_go_on)
                if watch.told:
                    connection.send(Frame(op=UCX_STOPPED, request_id=request.request_id, begin=sent))
                elif sent < len(chunks):
                    raise PeerGoneError("this transport is closed")
            except PeerSlowError:
                raise
            except Exception as error:
                # The answer has begun: that there is no more of it is said by closing the connection.
                raise PeerGoneError(f"the body of {request.key} could not be sent: {error}") from error


class _Receiving:
    """One body on its way to its destination."""

    def __init__(self, lane: Lane, link: Link, ask: Ask, patience: Patience) -> None:
        self._lane = lane
        self._link = link
        self._size_bytes, self._chunk_bytes = ask.size_bytes, ask.chunk_bytes
        self._patience = patience

    def run(self, on_bytes: Progress) -> None:
        """Wait for all of it. Whoever stops in the middle stops the sender too, for the next one's sake."""

        def on_chunk(index: int) -> None:
            begin = index * self._chunk_bytes
            end = min(begin + self._chunk_bytes, self._size_bytes)
            self._link.received_bytes += end - begin
            on_bytes(begin, end)
            if end < self._size_bytes and self._patience.stop():
                raise FetchStoppedError(f"stopped fetching from {self._link.peer}")

        try:
            self._lane.receive(on_chunk, SenderWatch(self._link, self._patience))
        except (PeerGoneError, PeerSlowError, BadPeerError):
            raise
        except Exception:
            self._wind_up()
            raise
        self._link.settled = True

    def _wind_up(self) -> None:
        watch = WindUpWatch(self._link)
        try:
            self._link.send(Frame(op=UCX_STOP), watch.patience)
            while not self._link.has_unread():
                watch.look(0.0)
                self._lane.step()
            answer = self._link.receive(watch.patience, MIN_CHUNK_BYTES)
            if answer.op == UCX_STOPPED:
                self._lane.wind_up(answer.begin, watch)
                self._link.settled = True
        except TransportError:
            return  # the lane and the link are thrown away


def _answer_late_stop(connection: Connection, request: Frame) -> None:
    """Who asks to stop what was sent already has all of it."""
    connection.send(Frame(op=UCX_STOPPED, request_id=request.request_id, begin=2**32))


def _this_host() -> bytes:
    """The same for all processes of one network of one machine, another one after it was started again;
    empty: unknown. UCX's shared memory wakes its receivers over sockets, which end at a network namespace."""
    try:
        machine = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        return uuid.uuid5(machine, str(os.stat("/proc/self/ns/net").st_ino)).bytes
    except (OSError, ValueError):
        return b""


def open_ucx(
    listener: Listener,
    *,
    tls: str | None = None,
    options: Mapping[str, str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> UcxTransport:
    """The scheme on this listener; UnavailableError where ucxx is missing or finds no transport.

    `tls` is UCX_TLS (None: UCX chooses), `options` more of UCX's settings, without their `UCX_`,
    `chunk_bytes` how much one message carries of what is fetched; for tests and measurements.
    """
    own = {} if options is None else dict(options)
    if listener.is_local and "UCX_NET_DEVICES" not in os.environ:
        # UCX listens on every network device that it may use, and asks nobody who they are.
        own.setdefault("NET_DEVICES", LOOPBACK_DEVICE)
    library = UcxLibrary(tls, own)
    library.check()
    return UcxTransport(listener, library, chunk_bytes=chunk_bytes)
