"""A reader that stands still must not keep an adapter or a replica from going."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from loraserve.replica import server as replica_server
from loraserve.rpc.link_client import CREDIT
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc
from placement.types import VersionId
from tests.support.engine_kit import adapter
from tests.support.link_calls import LinkCall
from tests.support.replica_bench import MakeBench, ReplicaBench, eventually

A = VersionId("a@0")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_server, "STALLED_S", 0.05)


async def stalled(bench: ReplicaBench) -> LinkCall:
    """A stream that has used up its credit, in an engine that goes on merging."""
    await bench.server.load_adapter(adapter("a"))
    call = bench.execute("q", version=A, max_tokens=2000)
    link = bench.router.link
    await eventually(lambda: bench.server.load_report().outstanding_tokens <= 2000 - CREDIT)
    inbox = link._streams[call.stream.stream_id]._inbox
    await eventually(lambda: len(inbox) == CREDIT)
    return call


@asynccontextmanager
async def stalled_directly(bench: ReplicaBench) -> AsyncIterator[Any]:
    """A look-aside stream whose answer is far longer than gRPC holds for a client that does not read.

    Its engine has finished, so nothing but its status is left to be said.
    """
    await bench.server.load_adapter(adapter("a"))
    window = (
        ("grpc.http2.lookahead_bytes", 1024),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.enable_http_proxy", 0),
    )
    async with grpc.aio.insecure_channel(bench.server.describe().address, options=window) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(
            inference_pb2.GenerateRequest(
                adapter="a",
                text="hello",
                idempotency_key="q",
                sampling=inference_pb2.SamplingParams(max_tokens=2000, ignore_eos=True, logprobs=20),
                lease=inference_pb2.Lease(lease_id="l1", adapter_version=A, table_version=1),
            )
        )
        await eventually(lambda: bench.server.load_report().outstanding_tokens > 0)
        await eventually(lambda: (load := bench.engine.load()).running + load.waiting == 0)
        yield call


async def rest(call: Any) -> tuple[int, str]:
    """The messages that were on their way, and the status after them."""
    messages = 0
    try:
        while await call.read() is not grpc.aio.EOF:
            messages += 1
    except grpc.aio.AioRpcError as error:
        return messages, f"{error.code().name} {error.details()}"
    return messages, "it ended as if nothing had happened"


async def test_a_drop_ends_a_stream_that_nobody_reads(make_bench: MakeBench) -> None:
    bench = await make_bench(replica={"drain_timeout_s": 1.0})
    call = await stalled(bench)
    async with asyncio.timeout(10):
        await bench.server.unload_adapter(A)
    assert await bench.engine.resident() == frozenset()
    messages, details = await rest(call)
    assert messages == CREDIT
    assert details == "UNAVAILABLE request q was ended by replica r0 while draining"


async def test_a_drain_ends_a_stream_that_nobody_reads(make_bench: MakeBench) -> None:
    bench = await make_bench()
    call = await stalled(bench)
    async with asyncio.timeout(10):
        assert await bench.server.drain(0.05) == 1
    assert await rest(call) == (CREDIT, "UNAVAILABLE request q was ended by replica r0 while draining")


async def test_a_drop_ends_a_look_aside_stream_that_nobody_reads(make_bench: MakeBench) -> None:
    bench = await make_bench(replica={"drain_timeout_s": 1.0})
    async with stalled_directly(bench) as call, asyncio.timeout(10):
        await bench.server.unload_adapter(A)
        assert await bench.engine.resident() == frozenset()
        messages, details = await rest(call)
    assert messages > 0
    assert details == "UNAVAILABLE request q was ended by replica r0 while draining"


async def test_a_client_that_leaves_without_reading_is_no_error(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await make_bench()
    async with stalled_directly(bench) as call:
        call.cancel()
        await eventually(lambda: bench.server.load_report().outstanding_tokens == 0)
        await bench.server.unload_adapter(A)
    await bench.server.stop(0.0)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
