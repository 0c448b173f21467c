"""Picks at one router over one stream: a fraction of the cost of a call for each.

What is asked for between two turns of the event loop leaves in one message. The stream is opened when
it is needed and closed when nobody has needed it for a while.
"""

import asyncio
from typing import TYPE_CHECKING

import grpc

from loraserve.rpc.v1 import inference_pb2

if TYPE_CHECKING:
    from loraserve.rpc.v1.inference_pb2_grpc import InferenceAsyncStub

IDLE_S = 5.0

Call = grpc.aio.StreamStreamCall[inference_pb2.PickManyRequest, inference_pb2.PickManyResponse]


class _BrokenError(Exception):
    """The stream ended before the pick was answered."""


class PickStream:
    """`pick` as often and as many at once as one likes; errors are those of a call to `Pick`.

    A pick whose stream broke is made again by such a call, which also tells what is wrong.
    """

    def __init__(self, stub: "InferenceAsyncStub") -> None:
        self._stub = stub
        self._serial = 0
        self._waiting: dict[int, asyncio.Future[inference_pb2.PickResponse]] = {}
        self._outbox = inference_pb2.PickManyRequest()
        self._dirty = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._one_by_one = False
        self._closed = False

    async def pick(self, request: inference_pb2.PickRequest, timeout: float) -> inference_pb2.PickResponse:
        """The router's choice; AioRpcError."""
        if self._one_by_one or self._closed:
            return await self._pick_alone(request, timeout)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout
        self._serial += 1
        number = self._serial
        answer = self._waiting[number] = loop.create_future()
        self._outbox.picks.add(id=number, pick=request)
        self._dirty.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="picks")
        try:
            async with asyncio.timeout(timeout):
                picked: inference_pb2.PickResponse = await answer
                return picked
        except TimeoutError:
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "no replica was picked in time") from None
        except _BrokenError:
            pass
        finally:
            self._waiting.pop(number, None)
        return await self._pick_alone(request, max(0.001, end_s - loop.time()))

    async def _pick_alone(
        self, request: inference_pb2.PickRequest, timeout: float
    ) -> inference_pb2.PickResponse:
        if self._closed:
            raise _error(grpc.StatusCode.UNAVAILABLE, "the client is closed")
        picked: inference_pb2.PickResponse = await self._stub.Pick(request, timeout=timeout)
        return picked

    async def close(self) -> None:
        """End the stream. Safe to call twice."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            # A task that is cancelled before its first turn has run none of its code.
            self._break()

    async def _run(self) -> None:
        """One stream from its first pick to its end."""
        call: Call = self._stub.PickMany()
        writer = asyncio.create_task(self._write(call))
        try:
            while isinstance(message := await call.read(), inference_pb2.PickManyResponse):
                for one in message.answers:
                    self._answer(one)
        except grpc.aio.AioRpcError as error:
            # UNIMPLEMENTED is a router of an earlier release.
            self._one_by_one = error.code() is grpc.StatusCode.UNIMPLEMENTED
        finally:
            writer.cancel()
            call.cancel()
            self._break()

    async def _write(self, call: Call) -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._dirty.wait()
                except TimeoutError:
                    if self._waiting or self._outbox.picks:
                        continue
                    await call.done_writing()
                    return
                self._dirty.clear()
                outbox, self._outbox = self._outbox, inference_pb2.PickManyRequest()
                if outbox.picks:
                    await call.write(outbox)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader knows why

    def _break(self) -> None:
        self._outbox = inference_pb2.PickManyRequest()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_BrokenError)

    def _answer(self, one: inference_pb2.PickAnswer) -> None:
        answer = self._waiting.get(one.id)
        if answer is None or answer.done():
            return
        if one.HasField("picked"):
            answer.set_result(one.picked)
        else:
            code = _CODES.get(one.code, grpc.StatusCode.UNKNOWN)
            answer.set_exception(_error(code, one.message, ("loraserve-router", "")))


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _error(code: grpc.StatusCode, details: str, *trailers: tuple[str, str]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)
