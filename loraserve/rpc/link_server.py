"""A replica's end of the multiplexed link to one router (`internal.v1.Replica/Connect`).

Many requests share one gRPC stream. What they produce between two turns of the event loop, which is
one engine step, leaves as one frame. A request may send as many messages as it has credit for and
is not asked for more until its reader has caught up, so one slow client never holds up another.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from loraserve.clock import Clock, WallClock
from loraserve.errors import BadInputError, verdict_of
from loraserve.rpc.codec import check_protocol
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.status import status_of

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""The longest pause between two frames of either side."""

SILENCE_S = 5.0
"""After so long without a frame the other side counts as gone, though its connection may stand."""

MAX_FRAME_BYTES = 1024**2
"""A frame is closed when its messages reach this size."""

SPARE_FRAME_BYTES = 2 * MAX_FRAME_BYTES
"""What a frame may be larger than the largest single message that a client may send or get."""

OK = grpc.StatusCode.OK.value[0]


class LinkHandler(Protocol):
    """What a replica does for its routers."""

    def open(self, start: internal_pb2.Start) -> AsyncGenerator[bytes, None]:
        """The serialized answers to one request; closing the iterator ends the request. Its errors
        become the stream's status."""
        ...

    def grant(self, lease: internal_pb2.LeaseGrant, ended: Callable[[str], None]) -> None:
        """A client will come with this lease; `ended` is to be called once it is used or has run out."""
        ...

    def refused(self, refusal: internal_pb2.Refusal) -> None:
        """The router had to turn a request away."""
        ...

    def load(self) -> internal_pb2.LoadReport:
        """The replica's load now."""
        ...


class _Stream:
    """One request of the link: what it may still send."""

    __slots__ = ("credit", "credited", "stream_id", "task")

    def __init__(self, stream_id: int, credit: int) -> None:
        self.stream_id = stream_id
        self.credit = credit
        self.credited: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None

    def add(self, messages: int) -> None:
        """The reader has caught up by so many."""
        self.credit += messages
        if self.credited is not None:
            self.credited.set()


class LinkServer:
    """Serves one `Connect` call; `serve` returns when it is over and all its requests have ended."""

    def __init__(
        self,
        handler: LinkHandler,
        context: Any,
        *,
        report_interval_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._handler = handler
        self._context = context
        self._report_interval_s = report_interval_s
        self._clock = clock or WallClock()
        self._streams: dict[int, _Stream] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._step_streams: list[int] = []
        self._steps: list[bytes] = []
        self._bytes = 0
        self._ends: list[internal_pb2.End] = []
        self._ended_leases: list[str] = []
        self._load: internal_pb2.LoadReport | None = None
        self._dirty = asyncio.Event()
        self._heard_s = self._clock.now_s()
        self.router_id = ""

    async def serve(self) -> None:
        """Read, run, write until the router goes, falls silent or speaks another protocol."""
        first = await self._context.read()
        if first is grpc.aio.EOF:
            return
        try:
            check_protocol(first.hello.protocol_version, f"router {first.hello.router_id}")
        except BadInputError as error:
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        self.router_id = first.hello.router_id
        self._take(first)
        loops = {
            asyncio.create_task(loop, name=f"link {name}")
            for name, loop in (("read", self._read()), ("write", self._write()), ("report", self._report()))
        }
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (broken := task.exception()) is not None:
                    logger.info("the link to router %s broke: %s", self.router_id, broken)
        finally:
            await self._end(loops)

    async def _end(self, loops: set[asyncio.Task[None]]) -> None:
        tasks = (
            loops
            | self._leaving
            | {stream.task for stream in self._streams.values() if stream.task is not None}
        )
        for task in tasks:
            task.cancel()
        # The call may be cancelled meanwhile; its requests must let go of what they hold all the same.
        await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))

    # -- in --------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while (frame := await self._context.read()) is not grpc.aio.EOF:
            self._heard_s = self._clock.now_s()
            self._take(frame)

    def _take(self, frame: internal_pb2.RouterFrame) -> None:
        for lease in frame.leases:
            self._handler.grant(lease, self._lease_ended)
        for refusal in frame.refusals:
            self._handler.refused(refusal)
        for start in frame.starts:
            self._start(start)
        for credit in frame.credits:
            if (stream := self._streams.get(credit.stream_id)) is not None:
                stream.add(credit.messages)
        for stream_id in frame.cancels:
            # Forgotten here: a task that is cancelled before its first turn never runs.
            stream = self._streams.pop(stream_id, None)
            if stream is not None and stream.task is not None:
                self._leaving.add(stream.task)
                stream.task.add_done_callback(self._leaving.discard)
                stream.task.cancel()

    def _start(self, start: internal_pb2.Start) -> None:
        stream = _Stream(start.stream_id, start.credit)
        self._streams[start.stream_id] = stream
        stream.task = asyncio.create_task(self._run(stream, start))

    async def _run(self, stream: _Stream, start: internal_pb2.Start) -> None:
        """One request from its start to its status."""
        end = internal_pb2.End(stream_id=stream.stream_id, code=OK)
        try:
            async with asyncio.timeout(start.remaining_s), aclosing(self._handler.open(start)) as messages:
                while True:
                    # Before the engine is asked: what comes meanwhile, the engine merges.
                    if stream.credit <= 0:
                        await self._credited(stream)
                    message = await anext(messages, None)
                    if message is None:
                        break
                    stream.credit -= 1
                    self._step_streams.append(stream.stream_id)
                    self._steps.append(message)
                    self._bytes += len(message)
                    self._dirty.set()
        except asyncio.CancelledError as cancelled:
            # By the router, which has forgotten the stream; with the whole link; or by the replica itself.
            verdict = verdict_of(cancelled)
            if verdict is None or stream.stream_id not in self._streams:
                raise
            self._set_status(end, start, verdict)
        except Exception as error:
            self._set_status(end, start, error)
        self._streams.pop(stream.stream_id, None)
        self._ends.append(end)
        self._dirty.set()

    @staticmethod
    def _set_status(end: internal_pb2.End, start: internal_pb2.Start, error: Exception) -> None:
        code, end.message = status_of(error)
        end.code = code.value[0]
        if code is grpc.StatusCode.INTERNAL:
            logger.error("request %s failed: %s", start.request_id, error, exc_info=error)

    @staticmethod
    async def _credited(stream: _Stream) -> None:
        stream.credited = asyncio.Event()
        while stream.credit <= 0:
            stream.credited.clear()
            await stream.credited.wait()
        stream.credited = None

    # -- out -------------------------------------------------------------------------------------

    def _lease_ended(self, lease_id: str) -> None:
        # Told with the next report, which counts the request itself: in between it is counted once.
        self._ended_leases.append(lease_id)

    async def _write(self) -> None:
        write = self._context.write
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while (frame := self._frame()) is not None:
                await write(frame)

    def _frame(self) -> internal_pb2.ReplicaFrame | None:
        """All that is to be said now, or the beginning of it if it is long; None if there is nothing."""
        count = len(self._steps)
        if self._bytes > MAX_FRAME_BYTES:
            size = 0
            for index, step in enumerate(self._steps):
                size += len(step)
                if size >= MAX_FRAME_BYTES:
                    count = index + 1
                    break
        if not (count or self._ends or self._load is not None):
            return None
        whole = count == len(self._steps)
        frame = internal_pb2.ReplicaFrame(
            step_streams=self._step_streams[:count],
            steps=self._steps[:count],
            # A stream's end must not overtake its messages.
            ends=self._ends if whole else (),
            ended_leases=self._ended_leases if self._load is not None else (),
            load=self._load,
        )
        if self._load is not None:
            self._load = None
            self._ended_leases.clear()
        if whole:
            self._ends.clear()
            self._step_streams.clear()
            self._steps.clear()
            self._bytes = 0
        else:
            self._bytes -= sum(map(len, self._steps[:count]))
            del self._step_streams[:count], self._steps[:count]
        return frame

    async def _report(self) -> None:
        """Report the load whenever it has changed, and as a sign of life when it has not."""
        last: internal_pb2.LoadReport | None = None
        said_s = float("-inf")
        while True:
            now_s = self._clock.now_s()
            if now_s - self._heard_s > SILENCE_S:
                logger.warning("router %s has been silent for %g s", self.router_id, SILENCE_S)
                return
            report = self._handler.load()
            overdue = now_s - said_s >= HEARTBEAT_S or bool(self._ended_leases)
            if last is None or overdue or _differs(report, last):
                self._load = report
                self._dirty.set()
                last, said_s = report, now_s
            await asyncio.sleep(self._report_interval_s)


def _differs(report: internal_pb2.LoadReport, last: internal_pb2.LoadReport) -> bool:
    return (
        report.running != last.running
        or report.waiting != last.waiting
        or report.outstanding_tokens != last.outstanding_tokens
        or report.kv_cache_usage != last.kv_cache_usage
        or report.routers != last.routers
    )
