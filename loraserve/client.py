"""The asyncio client of a LoRAServe router: generate, manage adapters, ask for the state.

    async with Client("127.0.0.1:50051") as client:
        stream = client.generate("Hello", adapter="support")
        async for step in stream:
            print(step.text, end="", flush=True)

Knows the public protocol only. Every failure is one of `loraserve.errors`.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from loraserve import client_types
from loraserve.client_types import AdapterStatus, ClusterStatus, ServedBy
from loraserve.errors import BadInputError, LoraServeError, UnavailableError
from loraserve.request import ChatTurn, GenerationRequest, GenerationStep, SamplingParams
from loraserve.rpc import codec
from loraserve.rpc.server import make_channel
from loraserve.rpc.status import error_of
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc, management_pb2, management_pb2_grpc

Prompt = str | tuple[int, ...] | tuple[ChatTurn, ...]
T = TypeVar("T")

READY_POLL_S = 0.05
DEFAULT_SAMPLING = SamplingParams()

StreamCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer; `step` holds all of its tokens and text."""

    step: GenerationStep
    request_id: str
    adapter_version: str | None
    served_by: ServedBy


class GenerationStream:
    """The steps of one request, in order; the last one carries a finish reason.

    Iterating raises the request's error. Leaving early needs `aclose`, which cancels the request on the
    server; ending the iteration, failing, and cancelling the reading task need nothing.
    """

    def __init__(self, call: StreamCall, address: str) -> None:
        self._call = call
        self._address = address
        self._messages = call.__aiter__()
        self.request_id: str | None = None
        self.adapter_version: str | None = None
        self.served_by = ServedBy()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationStep:
        try:
            message = await anext(self._messages)
        except StopAsyncIteration:
            self.served_by = _served_by(await self._call.trailing_metadata())
            raise
        except grpc.aio.AioRpcError as error:
            self.served_by = _served_by(error.trailing_metadata())
            raise _error_of(error, self._address) from error
        except asyncio.CancelledError:
            self._call.cancel()
            raise
        if self.request_id is None:
            self.request_id = message.request_id
            self.adapter_version = message.adapter_version or None
        return codec.decode_step(message)

    def cancel(self) -> None:
        """Cancel the request if it still runs."""
        self._call.cancel()

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self._call.cancel()


class Client:
    """One connection to one router.

    `timeout_s` bounds generation, `management_timeout_s` everything else; both are deadlines that the
    router sees, and DeadlineError when they pass.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 600.0,
        management_timeout_s: float = 600.0,
        max_message_bytes: int = 16 * 1024**2,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._management_timeout_s = management_timeout_s
        self._channel = make_channel(address, max_message_bytes=max_message_bytes)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._management = management_pb2_grpc.ManagementStub(self._channel)
        self._check_health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> GenerationStream:
        """Send a request now and stream its steps; `adapter` '' names the base model."""
        message = _message(prompt, adapter, sampling, request_id)
        call = self._inference.Generate(message, timeout=timeout_s or self._timeout_s)
        return GenerationStream(call, self.address)

    async def complete(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Completion:
        """The same as `generate`, answered at once."""
        message = _message(prompt, adapter, sampling, request_id)
        call = self._inference.Complete(message, timeout=timeout_s or self._timeout_s)
        answer = await self._answer(call)
        return Completion(
            step=codec.decode_step(answer),
            request_id=answer.request_id,
            adapter_version=answer.adapter_version or None,
            served_by=_served_by(await call.trailing_metadata()),
        )

    async def register_adapter(self, name: str, source: str, *, replace: bool = False) -> AdapterStatus:
        """Register an adapter; returns once requests may name it."""
        request = management_pb2.RegisterAdapterRequest(name=name, source=source, replace=replace)
        call = self._management.RegisterAdapter(request, timeout=self._management_timeout_s)
        return client_types.adapter_status((await self._answer(call)).adapter)

    async def remove_adapter(self, name: str) -> int:
        """Take an adapter out of service; returns the version of the routing table without it."""
        request = management_pb2.RemoveAdapterRequest(name=name)
        call = self._management.RemoveAdapter(request, timeout=self._management_timeout_s)
        return (await self._answer(call)).table_version

    async def list_adapters(self) -> tuple[AdapterStatus, ...]:
        """All registered adapters."""
        request = management_pb2.ListAdaptersRequest()
        call = self._management.ListAdapters(request, timeout=self._management_timeout_s)
        return tuple(client_types.adapter_status(one) for one in (await self._answer(call)).adapters)

    async def status(self) -> ClusterStatus:
        """The cluster as the router knows it."""
        request = management_pb2.GetStatusRequest()
        call = self._management.GetStatus(request, timeout=self._management_timeout_s)
        return client_types.cluster_status(await self._answer(call))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the router says SERVING; UnavailableError if it does not within the time."""
        reason = "nothing listens there"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    reason = await self._health_answer(timeout_s)
                    if reason == "SERVING":
                        return
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise UnavailableError(
                f"router {self.address}: not ready within {timeout_s:g} s: {reason}"
            ) from None

    async def close(self) -> None:
        """Close the connection, cancelling what still runs; safe to call twice."""
        await self._channel.close()

    async def _health_answer(self, timeout_s: float) -> str:
        try:
            answer = await self._check_health(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error


def _message(
    prompt: Prompt, adapter: str, sampling: SamplingParams, request_id: str
) -> inference_pb2.GenerateRequest:
    request = GenerationRequest(request_id=request_id, prompt=prompt, sampling=sampling)
    try:
        return codec.encode_generate(request, adapter=adapter)
    except (ValueError, TypeError) as error:
        # A number that its field cannot hold, or text that is no UTF-8.
        raise BadInputError(f"the request cannot be sent: {error}") from error


def _served_by(metadata: object) -> ServedBy:
    if not isinstance(metadata, grpc.aio.Metadata):
        return ServedBy()
    version = metadata.get("loraserve-table-version")
    return ServedBy(
        replica=_text(metadata.get("loraserve-replica")),
        table_version=int(version) if version is not None and version.isdigit() else None,
        reason=_text(metadata.get("loraserve-reason")),
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _error_of(error: grpc.aio.AioRpcError, address: str) -> LoraServeError:
    """A connection that failed is told by its address: gRPC's own text is no help to a person."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        return UnavailableError(f"router {address}: cannot be reached; is the cluster up?")
    return error_of(error)
