"""The Open Inference service over a native service that does what a real one only rarely does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from loraserve.errors import OverloadedError
from loraserve.router.service_oip import OpenInferenceService
from loraserve.router.testing import table_of
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.oip.open_inference_pb2_grpc import (
    GRPCInferenceServiceStub,
    add_GRPCInferenceServiceServicer_to_server,
)
from loraserve.rpc.server import bind, make_channel, make_server
from loraserve.rpc.v1 import inference_pb2
from tests.support.oip_messages import infer, is_final, outputs_of
from tests.support.router_bench import code_of

Code = grpc.StatusCode
TABLE = table_of(1, {"r0": "127.0.0.1:1"}, {"one": ("r0",)})
DEADLINE_S = 20.0


def step(text: str, *, last: bool = False) -> bytes:
    reason = inference_pb2.FINISH_REASON_STOP if last else inference_pb2.FINISH_REASON_UNSPECIFIED
    return inference_pb2.GenerateResponse(text=text, finish_reason=reason).SerializeToString()


class Scripted:
    """Both methods run `script`; what it returns is the unary answer."""

    def __init__(self, script: Callable[[Any], Awaitable[bytes]]) -> None:
        self._script = script

    async def generate(self, body: bytes, context: Any) -> None:
        await self._script(context)

    async def complete(self, body: bytes, context: Any) -> bytes:
        return await self._script(context)


@asynccontextmanager
async def serving(script: Callable[[Any], Awaitable[bytes]]) -> AsyncIterator[Any]:
    server = make_server()
    service = OpenInferenceService(Scripted(script), table=lambda: TABLE, serving=lambda: True)
    add_GRPCInferenceServiceServicer_to_server(service, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with make_channel(f"127.0.0.1:{port}") as channel:
        yield GRPCInferenceServiceStub(channel)
    await server.stop(None)


async def streamed(client: Any, *requests: oip.ModelInferRequest) -> list[oip.ModelStreamInferResponse]:
    return [answer async for answer in client.ModelStreamInfer(iter(requests), timeout=DEADLINE_S)]


def with_timeout(seconds: float, *, streaming: bool) -> oip.ModelInferRequest:
    request = infer(streaming=streaming)
    request.parameters["timeout"].int64_param = int(seconds * 1e6)
    return request


async def test_nothing_follows_the_last_answer_of_a_request() -> None:
    async def script(context: Any) -> bytes:
        await context.write(step("a", last=True))
        raise OverloadedError("too late to tell")

    async with serving(script) as client:
        (answer,) = await streamed(client, infer(streaming=True))
    assert is_final(answer)
    assert not answer.error_message


async def test_what_is_still_being_written_when_the_last_request_ends_arrives() -> None:
    texts = [str(number) * 400_000 for number in range(8)]

    async def script(context: Any) -> bytes:
        for text in texts:
            await context.write(step(text, last=text is texts[-1]))
        return b""

    async with serving(script) as client:
        answers = await streamed(client, infer(streaming=True))
    assert [outputs_of(answer.infer_response)["text_output"] for answer in answers] == texts


async def test_a_timeout_ends_a_request_that_does_not_end_by_itself() -> None:
    cancelled = []

    async def script(context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(context.time_remaining())
        return b""

    async with serving(script) as client:
        (answer,) = await streamed(client, with_timeout(0.1, streaming=True))
        assert answer.error_message.startswith("DEADLINE_EXCEEDED: ")
        call = client.ModelInfer(with_timeout(0.1, streaming=False), timeout=DEADLINE_S)
        assert await code_of(call) is Code.DEADLINE_EXCEEDED
    assert len(cancelled) == 2
    assert max(cancelled) <= 0.05


async def test_the_sooner_of_the_calls_deadline_and_the_requests_timeout_holds() -> None:
    seen: list[float | None] = []

    async def script(context: Any) -> bytes:
        seen.append(context.time_remaining())
        return step("a", last=True)

    async with serving(script) as client:
        await client.ModelInfer(with_timeout(5, streaming=False), timeout=100)
        await client.ModelInfer(with_timeout(100, streaming=False), timeout=5)
        await client.ModelInfer(with_timeout(5, streaming=False))
        await client.ModelInfer(infer(), timeout=5)
        await client.ModelInfer(infer())
    assert all(remaining is not None and 0 < remaining <= 5.1 for remaining in seen[:4]), seen
    assert seen[4] is None


async def test_an_error_of_the_inside_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async def script(context: Any) -> bytes:
        raise RuntimeError("secret")

    async with serving(script) as client:
        answers = await streamed(client, infer(id="a"), infer(id="b", streaming=True))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.ModelInfer(infer())
    assert caught.value.code() is Code.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    assert {answer.infer_response.id for answer in answers} == {"a", "b"}
    assert all(answer.error_message.startswith("INTERNAL: ") for answer in answers)
    assert not any("secret" in answer.error_message for answer in answers)
    assert "secret" in caplog.text
