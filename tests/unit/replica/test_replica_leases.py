"""Clients that come to a replica directly: their leases hold the weights, and end in one way only."""

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.errors import StaleError
from loraserve.replica.leases import GRACE_S, LeaseBook
from loraserve.replica.pool import AdapterPool
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.server import make_channel
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc
from placement.types import VersionId
from tests.support.engine_kit import adapter
from tests.support.replica_bench import ReplicaBench, eventually, status_of_call

CODE = grpc.StatusCode
A = VersionId("a@0")


def direct(bench: ReplicaBench, lease_id: str = "l1", **fields: Any) -> inference_pb2.GenerateRequest:
    lease = inference_pb2.Lease(lease_id=lease_id, adapter_version="a@0", table_version=1)
    sampling = inference_pb2.SamplingParams(max_tokens=4, ignore_eos=True)
    given: dict[str, Any] = {"adapter": "a", "text": "hi", "sampling": sampling, "lease": lease}
    return inference_pb2.GenerateRequest(**given | fields)


def grant(bench: ReplicaBench, lease_id: str = "l1", *, version: str = "a@0", lease_s: float = 5.0) -> None:
    bench.router.link.grant_lease(
        internal_pb2.LeaseGrant(lease_id=lease_id, version_id=version, lease_s=lease_s)
    )


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return CODE.OK, ""


async def test_a_leased_request_is_served_and_the_router_hears_that_it_came(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    grant(bench)
    await eventually(lambda: bench.server.leases.num_open == 1)
    async with make_channel(bench.server.describe().address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        messages = [message async for message in stub.Generate(direct(bench, request_id="mine"))]
    assert (messages[0].request_id, messages[0].adapter_version) == ("mine", "a@0")
    assert sum(len(message.token_ids) for message in messages) == 4
    assert bench.server.leases.num_open == 0
    await eventually(lambda: bench.router.ended_leases == ["l1"])


async def test_a_client_may_be_faster_than_the_routers_word(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    async with make_channel(bench.server.describe().address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        await stub.Complete(direct(bench))
    grant(bench)
    await eventually(lambda: bench.router.ended_leases == ["l1"])
    assert bench.server.leases.num_open == 0


async def test_a_drain_waits_for_a_lease_and_serves_its_request(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    grant(bench)
    await eventually(lambda: bench.server.leases.num_open == 1)
    dropping = asyncio.create_task(bench.server.unload_adapter(A))
    await eventually(lambda: bench.server.pool.resident() == ())
    async with make_channel(bench.server.describe().address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        without = await code_of(stub.Complete(direct(bench, "other")))
        assert without == (CODE.FAILED_PRECONDITION, "a@0 is draining on this replica; choose another holder")
        assert not dropping.done()
        assert (await code_of(stub.Complete(direct(bench))))[0] is CODE.OK
    await dropping
    assert await bench.engine.resident() == frozenset()


async def test_a_lease_that_has_run_out_is_stale_and_holds_nothing(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    clock = ManualClock()
    bench.server.leases._clock = clock
    grant(bench, lease_s=5.0)
    await eventually(lambda: bench.server.leases.num_open == 1)
    clock.advance(5.0 + GRACE_S)
    await eventually(lambda: bench.router.ended_leases == ["l1"])
    async with make_channel(bench.server.describe().address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        status = await code_of(stub.Complete(direct(bench)))
    assert status == (CODE.FAILED_PRECONDITION, "lease: it has run out before the request came; pick again")
    await bench.server.unload_adapter(A)


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({"lease": None}, CODE.INVALID_ARGUMENT, "lease: missing"),
        (
            {"adapter": "b"},
            CODE.INVALID_ARGUMENT,
            "lease.adapter_version: 'a@0' is no version of adapter 'b'",
        ),
        (
            {"resume": inference_pb2.Resume(token_ids=[1], adapter_version="a@9")},
            CODE.FAILED_PRECONDITION,
            "resume.adapter_version: 'a@9' is not what the adapter is now",
        ),
    ],
)
async def test_a_direct_request_that_makes_no_sense_is_refused(
    bench: ReplicaBench, fields: dict[str, Any], code: grpc.StatusCode, details: str
) -> None:
    await bench.server.load_adapter(adapter("a"))
    async with make_channel(bench.server.describe().address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        got = await code_of(stub.Complete(direct(bench, **fields)))
        assert got[0] is code
        assert details in got[1]
        pick = await code_of(stub.Pick(inference_pb2.PickRequest(adapter="a")))
        assert pick[0] is CODE.UNIMPLEMENTED


async def test_of_two_attempts_the_earlier_one_is_aborted(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    first = await bench.running("k", version="a@0")
    message = bench.message("k", version="a@0", max_tokens=3)
    message.router_attempt = 2
    second = bench.router.call(message)
    with pytest.raises(grpc.aio.AioRpcError, match="a later attempt has taken over") as caught:
        await first.read()
    assert caught.value.code() is CODE.ABORTED
    await bench.engine.allow()
    assert sum([len(part.token_ids) async for part in second]) == 3


@pytest.mark.parametrize(("arriving", "lower_ends"), [((2, 3), CODE.ABORTED), ((3, 2), CODE.ALREADY_EXISTS)])
async def test_of_three_attempts_the_latest_one_runs(
    bench: ReplicaBench, arriving: tuple[int, int], lower_ends: grpc.StatusCode
) -> None:
    first = await bench.running("k")
    calls = {}
    for attempt in arriving:
        message = bench.message("k", max_tokens=3)
        message.router_attempt = attempt
        # Both leave in one frame, so that both wait for the first attempt to let go.
        calls[attempt] = bench.router.call(message)
    assert (await status_of_call(first))[0] is CODE.ABORTED
    assert (await status_of_call(calls[2]))[0] is lower_ends
    await bench.engine.allow()
    assert sum([len(part.token_ids) async for part in calls[3]]) == 3


@given(
    script=st.lists(
        st.tuples(st.sampled_from(["grant", "use", "wait", "late"]), st.integers(0, 5), st.floats(0.1, 4.0))
    )
)
def test_each_lease_ends_once_and_its_pin_with_it(script: list[tuple[str, int, float]]) -> None:
    pool = AdapterPool(max_adapters=1, capacity_bytes=1000)
    pool.begin_load(adapter("a"))
    pool.finish_load(A)
    clock = ManualClock()
    book = LeaseBook(pool, clock)
    ended: list[str] = []
    granted: set[str] = set()
    for serial, (what, which, seconds) in enumerate(script):
        lease_id = str(which)
        if what == "grant" and lease_id not in granted:
            granted.add(lease_id)
            book.grant(lease_id, A, seconds, ended.append)
        elif what == "use":
            try:
                book.check(lease_id)
            except StaleError:
                assert lease_id in ended, f"step {serial}: stale and never ended"
            else:
                book.use(lease_id)
        else:
            clock.advance(seconds)
            book.sweep()
        pool.check_invariants(book.ids())
    clock.advance(100.0)
    book.sweep()
    assert sorted(ended) == sorted(granted)
    assert book.num_open == 0
    pool.check_invariants(frozenset())
