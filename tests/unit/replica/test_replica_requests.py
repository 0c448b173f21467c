"""Requests to a replica over real gRPC: refusals, releases, endings."""

import asyncio
import time
from typing import Any

import grpc
import pytest

from loraserve.engines.base import EngineInfo
from loraserve.errors import UnavailableError
from loraserve.replica.server import ReplicaServer
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.server import make_channel
from loraserve.rpc.v1 import inference_pb2
from placement.types import ReplicaId, VersionId
from tests.support.engine_kit import adapter
from tests.support.replica_bench import MakeBench, ReplicaBench, eventually, status_of_call

CODE = grpc.StatusCode


async def test_a_stream_names_request_and_weights_once_and_then_only_what_is_new(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    messages = [message async for message in bench.execute("q1", version="a@0", max_tokens=5)]
    assert [message.request_id for message in messages] == ["q1"] + [""] * (len(messages) - 1)
    assert messages[0].adapter_version == "a@0"
    assert not any(message.adapter_version for message in messages[1:])
    assert messages[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert messages[-1].output_tokens == sum(len(message.token_ids) for message in messages) == 5


async def test_the_unary_answer_is_the_joined_stream(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    options: dict[str, Any] = {"version": "a@0", "max_tokens": 40, "seed": 7, "logprobs": 2}
    parts = [part async for part in bench.execute("q1", **options)]
    whole = await bench.execute("q2", unary=True, **options)
    assert list(whole.token_ids) == [token for part in parts for token in part.token_ids]
    assert whole.text == "".join(part.text for part in parts)
    assert list(whole.logprobs) == [entry for part in parts for entry in part.logprobs]
    assert (whole.request_id, whole.adapter_version) == ("q2", "a@0")
    assert (whole.prompt_tokens, whole.output_tokens, whole.finish_reason) == (
        parts[-1].prompt_tokens,
        40,
        inference_pb2.FINISH_REASON_LENGTH,
    )


@pytest.mark.parametrize("unary", [False, True])
async def test_a_version_that_is_not_here_is_refused(bench: ReplicaBench, unary: bool) -> None:
    code, details = await status_of_call(bench.execute(version="a@0", unary=unary))
    assert code is CODE.FAILED_PRECONDITION
    assert details == "a@0 is not here on this replica; choose another holder"


@pytest.mark.parametrize(
    ("generate", "details"),
    [
        (b"\xff\xff\xff", "generate: not a serialized loraserve.v1.GenerateRequest"),
        (b"", "prompt: missing; give text, token_ids or chat"),
    ],
)
async def test_bytes_that_are_no_request_are_refused(
    bench: ReplicaBench, generate: bytes, details: str
) -> None:
    for unary in (False, True):
        message = bench.message()
        message.generate = generate
        status = await status_of_call(bench.router.call(message, unary=unary))
        assert status == (CODE.INVALID_ARGUMENT, details)


async def test_a_request_id_in_flight_is_refused_and_free_again_afterwards(bench: ReplicaBench) -> None:
    first = await bench.running("q")
    code, details = await status_of_call(bench.execute("q"))
    assert code is CODE.ALREADY_EXISTS
    assert details == "request_id: q is in flight; choose another"
    await bench.engine.allow()
    assert await status_of_call(first) == (CODE.OK, "")
    assert await status_of_call(bench.execute("q", max_tokens=1)) == (CODE.OK, "")


async def test_a_full_replica_refuses_at_once(make_bench: MakeBench) -> None:
    bench = await make_bench(replica={"max_in_flight": 2})
    calls = [await bench.running("q1"), await bench.running("q2")]
    code, details = await status_of_call(bench.execute("q3"))
    assert code is CODE.RESOURCE_EXHAUSTED
    assert details == "replica r0 has 2 requests, its limit"
    calls[0].cancel()
    await eventually(lambda: bench.engine.load().running == 1)
    await bench.engine.allow()
    assert await status_of_call(bench.execute("q3", max_tokens=1)) == (CODE.OK, "")
    assert await status_of_call(calls[1]) == (CODE.OK, "")


@pytest.mark.parametrize("started", [False, True])
async def test_a_cancelled_stream_releases_all_it_held(bench: ReplicaBench, started: bool) -> None:
    await bench.server.load_adapter(adapter("a"))
    if started:
        call = await bench.running(version="a@0")
    else:
        await bench.engine.allow(steps=0)
        call = bench.execute(version="a@0")
        await eventually(lambda: bench.server.load_report().outstanding_tokens > 0)
    call.cancel()
    await eventually(lambda: bench.server.load_report().outstanding_tokens == 0)
    bench.server.check_invariants(idle=True)
    assert bench.engine.load().running == bench.engine.load().waiting == 0
    # No step is allowed: it ends only because nothing pins the copy.
    await bench.server.unload_adapter(VersionId("a@0"))
    assert await bench.engine.resident() == frozenset()


@pytest.mark.parametrize("unary", [False, True])
async def test_a_deadline_that_passes_releases_all_it_held(bench: ReplicaBench, unary: bool) -> None:
    await bench.server.load_adapter(adapter("a"))
    await bench.engine.allow(steps=2)
    message = bench.message(version="a@0", max_tokens=1000)
    code, _ = await status_of_call(bench.router.call(message, unary=unary, timeout=0.05))
    assert code is CODE.DEADLINE_EXCEEDED
    await eventually(lambda: bench.server.load_report().outstanding_tokens == 0)
    bench.server.check_invariants(idle=True)
    assert bench.engine.load().running == bench.engine.load().waiting == 0
    await bench.server.unload_adapter(VersionId("a@0"))


async def test_an_engine_that_dies_ends_its_streams_as_unavailable(bench: ReplicaBench) -> None:
    call = await bench.running()
    bench.engine.crash("out of memory")
    assert await status_of_call(call) == (CODE.UNAVAILABLE, "out of memory")
    code, _ = await status_of_call(bench.execute("later"))
    assert code is CODE.UNAVAILABLE


async def test_outstanding_tokens_shrink_as_they_are_sent(bench: ReplicaBench) -> None:
    call = await bench.running(max_tokens=10)
    assert bench.server.load_report().outstanding_tokens == 9
    await bench.engine.allow(steps=3)
    while (await call.read()).output_tokens < 4:
        pass
    assert bench.server.load_report().outstanding_tokens == 6
    call.cancel()


async def test_load_reports_tell_changes_at_once_and_beat_in_between(bench: ReplicaBench) -> None:
    reports = bench.router.reports
    call = await bench.running(max_tokens=10)
    await eventually(lambda: reports[-1].outstanding_tokens == 9)
    call.cancel()
    await eventually(lambda: reports[-1].outstanding_tokens == 0)
    known, begun_s = len(reports), time.monotonic()
    await eventually(lambda: len(reports) > known)
    # Nothing changes any more: this one is the heartbeat.
    assert time.monotonic() - begun_s > 0.5
    assert (reports[-1].running, reports[-1].outstanding_tokens, reports[-1].routers) == (0, 0, 1)
    sequence = [report.sequence for report in reports]
    assert sequence == sorted(set(sequence))
    assert {report.replica_id for report in reports} == {"r0"}
    assert {report.incarnation for report in reports} == {bench.server.incarnation}


async def test_a_router_of_another_protocol_version_is_refused(bench: ReplicaBench) -> None:
    async with make_channel(bench.server.describe().address) as channel:
        call: Any = internal_pb2_grpc.ReplicaStub(channel).Connect()
        hello = internal_pb2.Hello(protocol_version=PROTOCOL_VERSION + 1, router_id="router-7")
        await call.write(internal_pb2.RouterFrame(hello=hello))
        code, details = await status_of_call(call)
    assert code is CODE.INVALID_ARGUMENT
    assert (
        f"router router-7 speaks version {PROTOCOL_VERSION + 1} and this side {PROTOCOL_VERSION}" in details
    )


async def test_stopping_ends_running_streams(make_bench: MakeBench) -> None:
    bench = await make_bench()
    call = await bench.running()
    stopping = asyncio.create_task(bench.server.stop(0.0))
    code, _ = await status_of_call(call)
    assert code in (CODE.UNAVAILABLE, CODE.CANCELLED)
    await stopping


async def test_a_replica_describes_what_it_holds_once_started(bench: ReplicaBench) -> None:
    with pytest.raises(UnavailableError, match="replica r1 has not started"):
        ReplicaServer(ReplicaId("r1"), bench.server.config, bench.engine).describe()
    await bench.server.load_adapter(adapter("b", size_bytes=300))
    await bench.server.load_adapter(adapter("a", size_bytes=200))
    description = bench.server.describe()
    assert description.resident == ("a@0", "b@0")
    assert isinstance(description.engine, EngineInfo)
    assert (description.spec.pool_adapters, description.spec.pool_bytes) == (2, 10_000)
    report = await bench.server.report()
    assert (report.resident, report.resident_bytes) == (("a@0", "b@0"), 500)
