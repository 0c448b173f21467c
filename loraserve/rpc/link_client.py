"""A router's end of the multiplexed link to one replica (`internal.v1.Replica/Connect`).

Keeps one connection, connecting again for ever until closed. When it breaks, or the replica is
silent for too long, every stream on it ends as lost.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from random import Random

import grpc

from loraserve.clock import Clock, WallClock
from loraserve.errors import LoraServeError
from loraserve.rpc.backoff import Backoff
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.link_server import HEARTBEAT_S, MAX_FRAME_BYTES, OK, SILENCE_S

logger = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[internal_pb2.RouterFrame, internal_pb2.ReplicaFrame]

METHOD = "/loraserve.internal.v1.Replica/Connect"

CREDIT = 32
"""The messages that may be on their way to one client; what more comes is merged by the engine."""

GRANT = 16
"""Credit is given back in portions, so that a frame to the replica carries many streams'."""

LEASE_FLUSH_S = 0.005
"""Leases leave together: a client that is faster is served all the same, unless the weights are
being dropped, and then it picks again."""

WATCH_S = 0.5

STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class StreamEndedError(LoraServeError):
    """A stream ended with a status other than OK; `lost`: the replica is gone or cannot be reached."""

    def __init__(self, code: grpc.StatusCode, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.lost = lost


class LinkStream:
    """The answers to one request, in order. One reader; `close` when done, whatever came of it."""

    __slots__ = ("_consumed", "_ended", "_error", "_inbox", "_link", "_waiter", "stream_id")

    def __init__(self, link: "Link", stream_id: int) -> None:
        self.stream_id = stream_id
        self._link = link
        self._inbox: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: StreamEndedError | None = None
        self._consumed = 0

    async def read(self) -> bytes | None:
        """The next message, None after the last one; StreamEndedError when the replica said so.

        Coming back for more says that the message before has reached its reader.
        """
        while not self._inbox:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._waiter = self._link.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._consumed += 1
        if self._consumed == GRANT:
            self._consumed = 0
            self._link.give_credit(self)
        return self._inbox.popleft()

    def close(self) -> None:
        """Let go; a request that still runs is ended at the replica."""
        if not self._ended:
            self._ended = True
            self._link.cancel(self)

    def feed(self, message: bytes) -> None:
        """A message has come."""
        self._inbox.append(message)
        self._wake()

    def end(self, error: StreamEndedError | None) -> None:
        """Nothing more comes."""
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Link:
    """The connection to one replica. `run` keeps it; `up` is True while the replica answers."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        peer: str,
        router_id: str,
        rng: Random,
        on_load: Callable[[internal_pb2.LoadReport], None],
        on_leases_ended: Callable[[list[str]], None],
        on_state: Callable[[bool], None],
        clock: Clock | None = None,
    ) -> None:
        """`peer` names the replica in messages; `on_state` hears whenever `up` changes and of every
        connection that fails."""
        self.loop = asyncio.get_running_loop()
        self.up = False
        self._peer = peer
        self._router_id = router_id
        self._on_load = on_load
        self._on_leases_ended = on_leases_ended
        self._on_state = on_state
        self._clock = clock or WallClock()
        self._backoff = Backoff(rng)
        self._connect: grpc.aio.StreamStreamMultiCallable[
            internal_pb2.RouterFrame, internal_pb2.ReplicaFrame
        ] = channel.stream_stream(
            METHOD,
            request_serializer=internal_pb2.RouterFrame.SerializeToString,
            response_deserializer=internal_pb2.ReplicaFrame.FromString,
        )
        self._streams: dict[int, LinkStream] = {}
        self._next_id = 1
        self._frame = internal_pb2.RouterFrame()
        self._full: deque[internal_pb2.RouterFrame] = deque()
        self._frame_bytes = 0
        self._dirty = asyncio.Event()
        self._heard_s = 0.0

    # -- requests --------------------------------------------------------------------------------

    def start(self, start: internal_pb2.Start) -> LinkStream:
        """Send a request; `stream_id` and `credit` are filled in here."""
        stream = LinkStream(self, self._next_id)
        self._next_id += 1
        start.stream_id = stream.stream_id
        start.credit = CREDIT
        self._streams[stream.stream_id] = stream
        self._frame.starts.append(start)
        self._frame_bytes += len(start.generate) + 4 * len(start.resume_token_ids)
        if self._frame_bytes >= MAX_FRAME_BYTES:
            self._close_frame()
        self._dirty.set()
        return stream

    def grant_lease(self, lease: internal_pb2.LeaseGrant) -> None:
        """Tell the replica that a client will come, within `LEASE_FLUSH_S`."""
        if not self._frame.leases:
            self.loop.call_later(LEASE_FLUSH_S, self._dirty.set)
        self._frame.leases.append(lease)

    def tell_refusal(self, refusal: internal_pb2.Refusal) -> None:
        """Tell the replica of a request that was turned away, with the next frame or sign of life."""
        self._frame.refusals.append(refusal)

    def give_credit(self, stream: LinkStream) -> None:
        """The stream's reader has taken `GRANT` messages."""
        if stream.stream_id in self._streams:
            self._frame.credits.add(stream_id=stream.stream_id, messages=GRANT)
            self._dirty.set()

    def cancel(self, stream: LinkStream) -> None:
        """End the request at the replica and forget it."""
        if self._streams.pop(stream.stream_id, None) is not None:
            self._frame.cancels.append(stream.stream_id)
            self._dirty.set()

    # -- the connection --------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and again whenever it breaks, until cancelled."""
        while True:
            reason = await self._run_once()
            self._lose(reason)
            await asyncio.sleep(self._backoff.next_s())

    async def _run_once(self) -> str:
        """One connection from its beginning to its end, which is told."""
        call = self._connect()
        self._heard_s = self._clock.now_s()
        loops = {
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._watch()),
        }
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            return " ".join(sorted({task.result() for task in done}))
        finally:
            call.cancel()
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _read(self, call: Call) -> str:
        try:
            while (frame := await call.read()) is not grpc.aio.EOF:
                self._heard_s = self._clock.now_s()
                assert isinstance(frame, internal_pb2.ReplicaFrame)
                self._take(frame)
            return await call.details() or "it ended the connection"
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name

    async def _write(self, call: Call) -> str:
        hello = internal_pb2.Hello(protocol_version=PROTOCOL_VERSION, router_id=self._router_id)
        try:
            await call.write(internal_pb2.RouterFrame(hello=hello))
            while True:
                await self._dirty.wait()
                self._dirty.clear()
                if self._frame.ByteSize():
                    self._close_frame()
                while self._full:
                    await call.write(self._full.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The reader knows why.
            await asyncio.Event().wait()
            raise

    async def _watch(self) -> str:
        """Say that this side is there, and see that the other one is."""
        said_s = self._clock.now_s()
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = self._clock.now_s()
            if now_s - self._heard_s > SILENCE_S:
                return f"silent for {SILENCE_S:g} s"
            if now_s - said_s >= HEARTBEAT_S:
                said_s = now_s
                self._close_frame()
                self._dirty.set()

    def _close_frame(self) -> None:
        self._full.append(self._frame)
        self._frame = internal_pb2.RouterFrame()
        self._frame_bytes = 0

    def _take(self, frame: internal_pb2.ReplicaFrame) -> None:
        streams = self._streams
        for stream_id, message in zip(frame.step_streams, frame.steps, strict=True):
            if (stream := streams.get(stream_id)) is not None:
                stream.feed(message)
        for end in frame.ends:
            if (stream := streams.pop(end.stream_id, None)) is not None:
                stream.end(None if end.code == OK else _ended(end))
        if frame.HasField("load"):
            self._on_load(frame.load)
        if frame.ended_leases:
            self._on_leases_ended(list(frame.ended_leases))
        if not self.up:
            self.up = True
            self._backoff.reset()
            self._on_state(True)

    def _lose(self, reason: str) -> None:
        """Every stream ends; nothing that was meant for this connection goes out on the next."""
        if reason and (self.up or self._streams):
            logger.warning(
                "the link to %s broke with %d requests: %s", self._peer, len(self._streams), reason
            )
        self.up = False
        self._frame = internal_pb2.RouterFrame()
        self._frame_bytes = 0
        self._full.clear()
        streams, self._streams = self._streams, {}
        self._on_state(False)
        for stream in streams.values():
            stream.end(
                StreamEndedError(grpc.StatusCode.UNAVAILABLE, f"{self._peer} was lost: {reason}", lost=True)
            )

    def close(self) -> None:
        """End what is left, after `run` was cancelled."""
        self._lose("")


def _ended(end: internal_pb2.End) -> StreamEndedError:
    return StreamEndedError(STATUS_CODES.get(end.code, grpc.StatusCode.UNKNOWN), end.message)
