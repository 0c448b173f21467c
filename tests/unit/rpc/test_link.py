"""The multiplexed link: order, credit, silence, breaks, frames of any size."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.errors import StaleError
from loraserve.rpc import link_client, link_server
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.link_client import CREDIT, StreamEndedError
from loraserve.rpc.link_server import LinkServer
from loraserve.rpc.server import bind, make_server
from loraserve.rpc.v1 import inference_pb2
from tests.support.link_calls import LinkBench, linked
from tests.support.replica_bench import eventually


class Echo(internal_pb2_grpc.ReplicaServicer):
    """Answers `max_tokens` numbered messages of as many characters as the text says."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.closed: list[str] = []
        self.refusals: list[internal_pb2.Refusal] = []
        self.links = 0
        self.address = ""
        self.server: grpc.aio.Server

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.links += 1
        try:
            await LinkServer(self, context, report_interval_s=0.01).serve()
        finally:
            self.links -= 1

    async def open(self, start: internal_pb2.Start) -> AsyncGenerator[bytes, None]:
        request = inference_pb2.GenerateRequest.FromString(start.generate)
        if request.adapter == "gone":
            raise StaleError("it is not here")
        try:
            for number in range(request.sampling.max_tokens):
                if request.adapter == "hang":
                    await asyncio.Event().wait()
                self.sent[start.request_id] = number + 1
                text = "x" * int(request.text)
                yield inference_pb2.GenerateResponse(token_ids=[number], text=text).SerializeToString()
                await asyncio.sleep(0)
        finally:
            self.closed.append(start.request_id)

    def grant(self, lease: internal_pb2.LeaseGrant, ended: Callable[[str], None]) -> None:
        ended(lease.lease_id)

    def refused(self, refusal: internal_pb2.Refusal) -> None:
        self.refusals.append(refusal)

    def load(self) -> internal_pb2.LoadReport:
        return internal_pb2.LoadReport(protocol_version=PROTOCOL_VERSION, replica_id="echo")


@asynccontextmanager
async def echo_server() -> AsyncIterator[Echo]:
    echo = Echo()
    echo.server = make_server()
    internal_pb2_grpc.add_ReplicaServicer_to_server(echo, echo.server)
    echo.address = f"127.0.0.1:{bind(echo.server, '127.0.0.1', 0)}"
    await echo.server.start()
    try:
        yield echo
    finally:
        await echo.server.stop(None)


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    async with echo_server() as server:
        yield server


def start(name: str, messages: int, chars: int = 0, *, adapter: str = "") -> internal_pb2.Start:
    body = inference_pb2.GenerateRequest(
        adapter=adapter, text=str(chars), sampling=inference_pb2.SamplingParams(max_tokens=messages)
    )
    return internal_pb2.Start(request_id=name, generate=body.SerializeToString())


async def numbers(bench: LinkBench, request: internal_pb2.Start) -> list[int]:
    return [token async for message in bench.call(request) for token in message.token_ids]


async def test_every_stream_gets_its_own_messages_in_order(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        counts = [index * 7 % 101 for index in range(1, 65)]
        answers = await asyncio.gather(
            *(numbers(bench, start(f"q{index}", count)) for index, count in enumerate(counts))
        )
    assert answers == [list(range(count)) for count in counts]
    assert sorted(echo.closed) == sorted(f"q{index}" for index in range(64))


async def test_messages_and_requests_larger_than_a_frame_pass(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        chars = 3 * link_server.MAX_FRAME_BYTES // 4
        large = start("large", 5, chars)
        large.generate += inference_pb2.GenerateRequest(request_id="i" * chars).SerializeToString()
        answers = await asyncio.gather(numbers(bench, large), numbers(bench, start("small", 50)))
    assert list(answers) == [list(range(5)), list(range(50))]


async def test_a_reader_that_stalls_stops_its_own_stream_alone(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        stalled = bench.call(start("stalled", 500))
        assert await numbers(bench, start("other", 500)) == list(range(500))
        # What it may have sent ahead is its credit; the engine is not asked for the next one.
        assert echo.sent["stalled"] == CREDIT
        assert [token async for message in stalled for token in message.token_ids] == list(range(500))


async def test_a_status_reaches_its_stream_alone(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        good = bench.call(start("good", 100))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await numbers(bench, start("bad", 1, adapter="gone"))
        assert (caught.value.code(), caught.value.details()) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "it is not here",
        )
        assert len([message async for message in good]) == 100


async def test_a_cancelled_stream_ends_at_the_replica_even_before_its_first_turn(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        running = bench.call(start("running", 3, adapter="hang"))
        bench.call(start("stillborn", 3)).cancel()
        await numbers(bench, start("later", 1))
        running.cancel()
        await eventually(lambda: "running" in echo.closed)
        assert echo.sent.get("stillborn", 0) == 0


async def test_a_deadline_ends_the_stream_at_the_replica(echo: Echo) -> None:
    async with linked(echo.address) as bench:
        call = bench.call(start("late", 3, adapter="hang"), timeout=0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: echo.closed == ["late"])


async def test_a_link_that_breaks_ends_all_its_streams_on_both_sides(echo: Echo) -> None:
    states: list[bool] = []
    async with linked(echo.address, on_state=states.append) as bench:
        streams = [bench.call(start(f"q{index}", 3, adapter="hang")) for index in range(5)]
        await eventually(lambda: bench.link.up)
        await numbers(bench, start("probe", 1))
        await echo.server.stop(None)
        for stream in streams:
            with pytest.raises(StreamEndedError, match="replica was lost") as caught:
                await stream.stream.read()
            assert caught.value.lost
        await eventually(lambda: len(echo.closed) == 6)
        assert not bench.link.up
        assert states[:2] == [True, False]


async def test_a_replica_that_falls_silent_is_lost(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_client, "SILENCE_S", 0.3)
    monkeypatch.setattr(link_client, "WATCH_S", 0.05)
    async with linked(echo.address) as bench:
        stream = bench.call(start("q", 3, adapter="hang"))
        # As after a SIGSTOP: the connection stands and nothing comes.
        monkeypatch.setattr(LinkServer, "_frame", lambda server: None)
        with pytest.raises(grpc.aio.AioRpcError, match=r"silent for 0\.3 s"):
            await stream.read()
        await eventually(lambda: "q" in echo.closed)


async def test_a_router_that_falls_silent_leaves_nothing_running(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "SILENCE_S", 0.3)
    async with grpc.aio.insecure_channel(echo.address) as channel:
        call: Any = internal_pb2_grpc.ReplicaStub(channel).Connect()
        hello = internal_pb2.Hello(protocol_version=PROTOCOL_VERSION, router_id="mute")
        request = start("q", 3, adapter="hang")
        request.stream_id, request.credit, request.remaining_s = 1, 8, 60.0
        await call.write(internal_pb2.RouterFrame(hello=hello, starts=[request]))
        await eventually(lambda: echo.closed == ["q"])
        await eventually(lambda: echo.links == 0)


@settings(max_examples=20, deadline=None)
@given(
    plans=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.booleans()), min_size=1, max_size=12)
)
async def test_whatever_is_read_left_or_finished_nothing_is_lost_or_stays(
    plans: list[tuple[int, int, bool]],
) -> None:
    async with echo_server() as echo, linked(echo.address) as bench:

        async def one(index: int, messages: int, read: int, cancel: bool) -> None:
            call = bench.call(start(f"q{index}", messages))
            got: list[int] = []
            while len(got) < (read if cancel else messages + 1):
                message = await call.read()
                if message is grpc.aio.EOF:
                    break
                got += message.token_ids
            assert got == list(range(len(got)))
            assert cancel or len(got) == messages
            call.cancel()

        await asyncio.gather(*(one(index, *plan) for index, plan in enumerate(plans)))
        await numbers(bench, start("last", 1))
        await eventually(lambda: not bench.link._streams)
