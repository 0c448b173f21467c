"""`inference.GRPCInferenceService` in a router: the Open Inference Protocol with Triton's streaming call.

Each request becomes one of `loraserve.v1.Inference` and goes through that service in process, so that it is
admitted, routed, counted and continued elsewhere like any other.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from loraserve import __version__
from loraserve.errors import BadInputError, LoraServeError, NotFoundError
from loraserve.router.service_oip_answer import Answers, failed
from loraserve.router.service_oip_context import CallEndedError, InnerContext, NativeService
from loraserve.router.service_oip_models import encode_config, encode_index, encode_metadata, find_model
from loraserve.router.service_oip_request import InferCall, parse_infer
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.oip.open_inference_pb2_grpc import GRPCInferenceServiceServicer
from loraserve.rpc.status import abort_with, status_of
from placement.table import RoutingTable

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
SERVER_NAME = "loraserve"
EXTENSIONS = ("model_configuration", "model_repository", "parameters")
"""The names that Triton gives to what it adds to the protocol and is served here too."""

MAX_CONCURRENT_PER_STREAM = 64
"""Requests of one stream that run at a time. Later ones are not read until there is room."""

Context = grpc.aio.ServicerContext[Any, Any]
Send = Callable[[oip.ModelStreamInferResponse], Awaitable[None]]


class OpenInferenceService(GRPCInferenceServiceServicer):
    """The protocol over a native service; `table` is the routing table in use, `serving` what health says."""

    def __init__(
        self, native: NativeService, *, table: Callable[[], RoutingTable], serving: Callable[[], bool]
    ) -> None:
        self._native = native
        self._table = table
        self._serving = serving

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:
        """True: it answers."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:
        """What `grpc.health.v1` answers."""
        return oip.ServerReadyResponse(ready=self._serving())

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:
        """Whether a replica holds this model in this version."""
        ready = False
        if self._serving():
            try:
                ready = find_model(self._table(), request.name, request.version).ready
            except NotFoundError:
                ready = False
            except LoraServeError as error:
                await abort_with(context, error)
        return oip.ModelReadyResponse(ready=ready)

    async def ServerMetadata(
        self, request: oip.ServerMetadataRequest, context: Context
    ) -> oip.ServerMetadataResponse:
        """This program and its release."""
        return oip.ServerMetadataResponse(name=SERVER_NAME, version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(
        self, request: oip.ModelMetadataRequest, context: Context
    ) -> oip.ModelMetadataResponse:
        """The model's version, inputs and outputs."""
        try:
            return encode_metadata(find_model(self._table(), request.name, request.version))
        except LoraServeError as error:
            await abort_with(context, error)

    async def ModelConfig(self, request: oip.ModelConfigRequest, context: Context) -> oip.ModelConfigResponse:
        """The same in Triton's terms."""
        try:
            return encode_config(find_model(self._table(), request.name, request.version))
        except LoraServeError as error:
            await abort_with(context, error)

    async def RepositoryIndex(
        self, request: oip.RepositoryIndexRequest, context: Context
    ) -> oip.RepositoryIndexResponse:
        """The base model and the adapters of the table."""
        if request.repository_name:
            await abort_with(context, BadInputError("repository_name: there is one; leave it empty"))
        return encode_index(self._table(), ready_only=request.ready)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:
        """One answer, with the native service's trailing metadata."""
        try:
            call = parse_infer(request, self._table())
            if call.streaming:
                raise BadInputError("streaming: ModelInfer answers once; stream with ModelStreamInfer")
            inner = InnerContext(context, on_message=_no_message, timeout_s=call.timeout_s)
            async with asyncio.timeout(call.timeout_s):
                message = await self._native.complete(call.body, inner)
            context.set_trailing_metadata(inner.trailers)
            return Answers(call).take(message)
        except CallEndedError as ended:
            await _abort(context, ended)
        except Exception as error:
            await abort_with(context, error)

    # The generated base class knows servers that yield; this one writes.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[oip.ModelInferRequest], context: Context
    ) -> None:
        """The answers to the stream's requests as they are ready; ends when all have been given.

        A request's failure is an answer of its own.
        """
        # gRPC takes one write at a time, so one task writes; a full queue holds the requests up.
        answers: asyncio.Queue[oip.ModelStreamInferResponse] = asyncio.Queue(maxsize=1)

        async def write_all() -> None:
            while True:
                await context.write(await answers.get())
                answers.task_done()

        async def serve_all() -> None:
            await _run_bounded(request_iterator, lambda request: self._answer(request, context, answers.put))
            await answers.join()

        tasks = [asyncio.create_task(write_all()), asyncio.create_task(serve_all())]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                await task
        except Exception:
            # A client that went away fails the write to it before its cancellation arrives.
            if not (context.done() or context.cancelled()):
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: oip.ModelInferRequest, context: Context, send: Send) -> None:
        """All answers to one request of a stream; its failure is the last of them and not raised."""
        answers: Answers | None = None
        try:
            call = parse_infer(request, self._table())
            answers = Answers(call)
            async with asyncio.timeout(call.timeout_s):
                await self._answer_call(call, answers, context, send)
        except Exception as error:
            if isinstance(error, CallEndedError):
                code, details = error.code, error.details
            else:
                code, details = status_of(error)
                if code is grpc.StatusCode.INTERNAL:
                    logger.error("a request of a stream failed: %s", error, exc_info=error)
            if answers is None or not answers.ended:
                await send(failed(request, code, details))

    async def _answer_call(self, call: InferCall, answers: Answers, context: Context, send: Send) -> None:
        async def pass_on(message: bytes) -> None:
            await send(answers.stream(message))
            answers.ended = answers.final

        inner = InnerContext(context, on_message=pass_on, timeout_s=call.timeout_s)
        if call.streaming:
            await self._native.generate(call.body, inner)
        else:
            await pass_on(await self._native.complete(call.body, inner))
        if not answers.ended:
            await send(answers.end())


async def _run_bounded(
    requests: AsyncIterator[oip.ModelInferRequest],
    serve: Callable[[oip.ModelInferRequest], Awaitable[None]],
) -> None:
    """Serve each request in a task of its own until all have ended; cancelling cancels them."""
    room = asyncio.Semaphore(MAX_CONCURRENT_PER_STREAM)
    running: set[asyncio.Task[None]] = set()
    source = aiter(requests)

    async def serve_one(request: oip.ModelInferRequest) -> None:
        try:
            await serve(request)
        finally:
            room.release()

    try:
        while True:
            await room.acquire()
            request = await anext(source, None)
            if request is None:
                break
            task = asyncio.create_task(serve_one(request))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _no_message(message: bytes) -> None:
    raise AssertionError("a unary request has no messages before its answer")


async def _abort(context: Context, ended: CallEndedError) -> NoReturn:
    await context.abort(ended.code, ended.details, ended.trailers)
    raise AssertionError("abort returned")
